"""The reading commands on small warehouses of hand-written rows: filters, forms of output, settings and their sources."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.clients import Wrong
from pipeline.cli.reading import masked, parse_span, parse_time
from pipeline.definitions import Definitions, Funnel, Kpi, Match, Retention, Step
from pipeline.sinks.catalog import install
from pipeline.sinks.open import open_warehouse
from schemas.rows import COLUMNS
from tests.command_line import Said, shopstream

DAY = 86_400_000
SHANGHAI_MIDNIGHT = int(datetime(2026, 3, 1, 16, tzinfo=UTC).timestamp() * 1000)  # of March 2nd
EVIL = b'\x1b[31m{"a":\x00\xff\x07\n'


def steps(*names: str) -> tuple[Step, ...]:
    return tuple(Step(name, Match((name.lower(),))) for name in names)


DEFINITIONS = Definitions(
    funnels=(Funnel("checkout", steps("View", "Paid"), DAY, "1d", breakdown="channel", version="f1"),),
    retentions=(Retention("weekly", Match(("*",)), Match(("*",)), "day", 3, version="r1"),),
    kpis=(
        Kpi("orders", "events", "count", Match(("purchase",)), dimensions=("device",), windows=("1d",), version="k1"),
        Kpi("gmv", "events", "sum", Match(("purchase",)), field="value", windows=("1d",), money=True, version="k2"),
    ),
    time_zone="Asia/Shanghai",
    currency="CNY",
)


def rows(table: str, *values: tuple[Any, ...]) -> dict[str, dict[str, Any]]:
    return {table: {name: [value[i] for value in values] for i, name in enumerate(COLUMNS[table])}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three days from March 2nd in Shanghai; the last one may still change."""
    path = tmp_path_factory.mktemp("reports") / "warehouse"
    path.mkdir()
    warehouse = open_warehouse(f"chdb://{path}")
    warehouse.migrate()
    install(warehouse, DEFINITIONS, 1)
    final = [SHANGHAI_MIDNIGHT + (i + 3) * DAY for i in range(3)]
    start = [SHANGHAI_MIDNIGHT + i * DAY for i in range(3)]
    watermark = SHANGHAI_MIDNIGHT + 4 * DAY + 1
    warehouse.insert({
        **rows(
            "funnel_cells",
            *(("checkout", "f1", start[i], "email", level, 40, 0, n, final[i], 1) for i in range(3) for level, n in ((1, 6), (2, 4 - i))),
            ("checkout", "f1", start[0], "social", 1, 0, 1, 5, final[0], 1),
        ),
        **rows("retention_cells", ("weekly", "r1", start[0], "", 0, "users", 0, 8, final[0], 1), ("weekly", "r1", start[0], "", 1, "users", 0, 2, final[1], 1)),
        **rows(
            "kpi_cells",
            *(("orders", "k1", "1d", start[i], "", "", "", -1, 0, 10 * (i + 1), final[i], 1) for i in range(3)),
            *(("orders", "k1", "1d", start[i], "device", "mobile", "", -1, 0, 7, final[i], 1) for i in range(3)),
            ("gmv", "k2", "1d", start[1], "", "", "CNY", -1, 0, 123_450_000, final[1], 1),
        ),
        **rows(
            "rejects",
            ("clickstream", 0, 5, "malformed_json", "at \x1b[2Jbyte 3", b"key\x07", EVIL, SHANGHAI_MIDNIGHT, 1),
            ("clickstream", 0, 6, "tombstone", "no value", b"k", b"", SHANGHAI_MIDNIGHT + 1, 1),
            ("orders", 1, 2, "too_large", "2,000,000 bytes", b"", b"x" * 9000, SHANGHAI_MIDNIGHT + DAY, 1),
            ("orders", 1, 3, "from_the_future", "ts is ahead", b"u1", b'{"event_id":"e"}', SHANGHAI_MIDNIGHT + DAY, 1),
            ("shopstream.rekeyed", 1, 9, "wrong_partition", "again", b"u1", b"{}", SHANGHAI_MIDNIGHT, 1),
        ),
        **rows("progress", ("clickstream", 0, 7, watermark, 5, 1, 2, 0, 0, 1, 0), ("orders", 1, 4, watermark, 2, 0, 2, 0, 0, 1, 0)),
    })  # fmt: skip
    warehouse.close()
    return path


def ask(folder: Path, *arguments: str | int) -> Said:
    said = shopstream(*arguments, "--warehouse", folder)
    assert said.code == 0, said.err
    return said


def answer(folder: Path, *arguments: str | int) -> Any:
    return json.loads(ask(folder, *arguments, "--json").out)


# --- report -------------------------------------------------------------------------------------------------------------------


def test_days_are_the_warehouses_zone_whatever_definitions_are_at_hand(folder: Path) -> None:
    (report,) = answer(folder, "report", "funnel")["funnels"]
    assert [window["start"] for window in report["windows"]] == [f"2026-03-0{d}T00:00:00+08:00" for d in (2, 3, 4)]
    assert [window["final"] for window in report["windows"]] == [True, True, False]


def test_from_is_included_and_to_is_not(folder: Path) -> None:
    (report,) = answer(folder, "report", "funnel", "--from", "2026-03-03", "--to", "2026-03-04")["funnels"]
    assert [window["users"] for window in report["windows"]] == [[9, 3]]


def test_a_segment_is_one_value_of_the_breakdown(folder: Path) -> None:
    (report,) = answer(folder, "report", "funnel", "--segment", "social")["funnels"]
    assert [step["users"] for step in report["steps"]] == [5, 0]


def test_a_segment_that_is_empty_in_this_time_is_no_error(folder: Path) -> None:
    (report,) = answer(folder, "report", "funnel", "--segment", "social", "--from", "2026-03-04")["funnels"]
    assert report["windows"] == []


def test_a_name_that_is_not_there_is_answered_with_those_that_are(folder: Path) -> None:
    said = shopstream("report", "funnel", "--name", "chekout", "--warehouse", folder)
    assert (said.code, said.out) == (2, "")
    assert "did you mean 'checkout'?" in said.err


@pytest.mark.parametrize("name", ["'; DROP TABLE funnel_cells; --", "%(begin)s", "\\' OR 1 = 1", "x\x1b[2J", "checkout' --"])
def test_a_hostile_name_is_only_a_name(folder: Path, name: str) -> None:
    for report in ("funnel", "retention", "kpi"):
        said = shopstream("report", report, "--name", name, "--warehouse", folder)
        assert said.code == 2
        assert "\x1b" not in said.err
    assert "\x1b" not in shopstream("rejects", "show", name, 0, 1, "--warehouse", folder).err
    assert shopstream("report", "funnel", "--segment", name, "--warehouse", folder).code == 2
    assert answer(folder, "report", "funnel")["funnels"][0]["steps"][0]["users"] == 32


def test_kpis_are_the_windows_values_with_their_units(folder: Path) -> None:
    (report,) = answer(folder, "report", "kpi")["kpis"]
    found = {series["name"]: (series["unit"], series["currency"], [p["value"] for p in series["points"]]) for series in report["series"]}
    assert found == {"orders": ("count", "", [10, 20, 30, 0, 0]), "gmv": ("money", "CNY", [0, 12345, 0, 0, 0])}


def test_a_dimension_gives_a_series_a_value(folder: Path) -> None:
    (report,) = answer(folder, "report", "kpi", "--name", "orders", "--dimension", "device", "--segment", "mobile")["kpis"]
    assert [(series["dimension_value"], series["points"][0]["value"]) for series in report["series"]] == [("mobile", 7)]


def test_one_kpi_is_drawn_as_a_chart_with_its_numbers(folder: Path) -> None:
    said = ask(folder, "report", "kpi", "--name", "orders")
    assert "│" in said.out
    assert "2026-03-04" in said.out


def test_limit_keeps_the_newest_windows(folder: Path) -> None:
    (report,) = answer(folder, "report", "kpi", "--name", "orders", "--limit", 3)["kpis"]
    assert [p["value"] for p in report["series"][0]["points"]] == [30, 0, 0]


def test_retention_is_a_share_of_the_cohort(folder: Path) -> None:
    header, *lines = csv.reader(io.StringIO(ask(folder, "report", "retention", "--csv").out))
    assert header[:6] == ["retention", "segment", "cohort_start", "period", "users", "share"]
    assert [line[3:6] for line in lines][:2] == [["0", "8", "1.000000"], ["1", "2", "0.250000"]]


def test_health_shows_partitions_and_reasons(folder: Path) -> None:
    (report,) = answer(folder, "report", "health")["health"]
    assert [(p["topic"], p["next_offset"], p["rejected"]) for p in report["partitions"]] == [("clickstream", 7, 2), ("orders", 4, 2)]
    assert report["freshness_ms"] > 0


def test_who_came_back_then_is_settled_while_somebody_may_still_come_back_later(folder: Path) -> None:
    cells = {
        reading: ask(folder, "report", "retention", "--reading", reading).out.split("2026-03-02")[1].split()[:2]
        for reading in ("in", "after")
    }
    assert cells["in"] == ["8", "25%"]
    assert cells["after"][1].endswith("~"), "three days are counted, and the third is not over"


@pytest.mark.parametrize("report", ["funnel", "retention", "kpi", "health"])
def test_plain_text_has_no_escape_codes_and_fits(folder: Path, report: str) -> None:
    said = ask(folder, "report", report)
    assert "\x1b" not in said.out
    assert all(len(line) <= 80 for line in said.out.splitlines())
    assert said.err == ""


def test_watching_json_is_a_document_a_line_until_ctrl_c(folder: Path) -> None:
    process = watched(folder, "--json")
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert all("funnels" in json.loads(line) for line in [*lines, *rest.splitlines()])


def test_watching_on_a_pipe_prints_state_after_state_and_ctrl_c_is_clean(folder: Path) -> None:
    process = watched(folder)
    assert process.stdout is not None
    threading.Timer(2, process.send_signal, [signal.SIGINT]).start()
    seen, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert seen.count("funnel checkout") >= 2
    assert "\x1b" not in seen


def watched(folder: Path, *more: str) -> subprocess.Popen[str]:
    """A watching command in a process of its own, that has drawn once."""
    command = [sys.executable, "-m", "pipeline.cli.main", "report", "funnel", "--watch", "0.2", "--warehouse", str(folder), *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_a_reader_that_goes_away_and_a_terminal_of_few_characters_are_no_errors(folder: Path) -> None:
    command = f"{sys.executable} -m pipeline.cli.main report funnel --warehouse {folder}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    left = subprocess.run(f"{command} --csv | true", shell=True, env=environment, capture_output=True, text=True, timeout=60)
    assert left.stderr == ""
    ascii_only = subprocess.run(command.split(), env={**environment, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60)
    assert (ascii_only.returncode, ascii_only.stderr) == (0, b"")
    assert b"funnel checkout" in ascii_only.stdout


def test_an_empty_warehouse_says_so_and_is_no_error(tmp_path: Path) -> None:
    warehouse = open_warehouse(f"chdb://{tmp_path}/w")
    warehouse.migrate()
    warehouse.close()
    for report in ("funnel", "retention", "kpi", "health"):
        said = ask(tmp_path / "w", "report", report)
        assert said.out.strip()
    assert answer(tmp_path / "w", "rejects", "list") == {"total": 0, "reasons": {}, "rejects": []}


def test_a_warehouse_before_its_migrations_is_answered_with_the_remedy(tmp_path: Path) -> None:
    warehouse = open_warehouse(f"chdb://{tmp_path}/w")
    warehouse.query("CREATE TABLE others (x Int8) ENGINE = MergeTree ORDER BY x")
    warehouse.close()
    said = shopstream("report", "funnel", "--warehouse", tmp_path / "w")
    assert said.code == 1
    assert "shopstream migrate" in said.err


# --- dates --------------------------------------------------------------------------------------------------------------------


def test_a_day_begins_at_the_shops_midnight() -> None:
    begin, end = parse_span("2026-03-29", "2026-03-30", "Europe/Berlin")
    assert begin is not None
    assert end is not None
    assert (end.timestamp() - begin.timestamp()) / 3600 == 23  # the clocks go forward


def test_a_time_with_an_offset_is_taken_as_it_is() -> None:
    assert parse_time("--from", "2026-03-01T12:00:00+00:00", "Asia/Tokyo") == datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "2026-02-30", "", "1e9", "0001-01-01", "2026-03-01T25:00", "١٢"])
def test_what_is_no_date_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(Wrong, match=r"2026-03-01|between"):
        parse_time("--from", text, "UTC")


def test_an_end_before_its_beginning_is_refused() -> None:
    with pytest.raises(Wrong, match="not after"):
        parse_span("2026-03-02", "2026-03-02", "UTC")


# --- rejects ------------------------------------------------------------------------------------------------------------------


def test_rejects_are_counted_by_reason_and_filtered(folder: Path) -> None:
    everything = answer(folder, "rejects", "list")
    assert everything["total"] == 5
    assert answer(folder, "rejects", "list", "--topic", "orders")["reasons"] == {"from_the_future": 1, "too_large": 1}
    assert answer(folder, "rejects", "list", "--reason", "tombstone")["total"] == 1
    assert answer(folder, "rejects", "list", "--since", "2026-03-03")["total"] == 2
    bounded = answer(folder, "rejects", "list", "--limit", 2)
    assert (bounded["total"], len(bounded["rejects"])) == (5, 2)


def test_a_reject_is_shown_escaped_and_its_bytes_are_whole(folder: Path) -> None:
    said = ask(folder, "rejects", "show", "clickstream", 0, 5)
    assert all(character == "\n" or character.isprintable() for character in said.out)
    assert "\\x1b[31m" in said.out
    assert "\\xff" in said.out
    (reject,) = answer(folder, "rejects", "show", "clickstream", 0, 5)["rejects"]

    assert base64.b64decode(reject["raw"]) == EVIL
    assert base64.b64decode(reject["key"]) == b"key\x07"


def test_a_list_of_rejects_shows_their_causes_escaped(folder: Path) -> None:
    said = ask(folder, "rejects", "list")
    assert all(character == "\n" or character.isprintable() for character in said.out)


def test_a_long_reject_is_cut_unless_all_is_asked_for(folder: Path) -> None:
    assert ask(folder, "rejects", "show", "orders", 1, 2).out.count("x") < 5000
    assert ask(folder, "rejects", "show", "orders", 1, 2, "--all").out.count("x") >= 9000


def test_a_dry_run_says_what_would_be_sent_and_what_can_not_be(folder: Path) -> None:
    said = ask(folder, "rejects", "replay", "--dry-run")
    assert "would send 2 records to clickstream (1), orders (1)" in said.all
    assert "tombstone: it had no value" in said.all
    assert "too_large: only its beginning is kept" in said.all
    assert "shopstream.rekeyed is none of the source topics" in said.all


def test_nothing_is_sent_without_being_asked(folder: Path) -> None:
    said = shopstream("rejects", "replay", "--warehouse", folder)
    assert said.code == 2
    assert "--yes" in said.err


# --- config -------------------------------------------------------------------------------------------------------------------


def settings_of(said: Said) -> dict[str, tuple[Any, str]]:
    return {row["name"]: (row["value"], row["source"]) for row in json.loads(said.out)["settings"]}


def test_config_says_where_each_value_came_from(tmp_path: Path) -> None:
    (tmp_path / "shop.toml").write_text("partitions = 8\nbroker = 'file:1'\napp_id = 'from-file'\n")
    (tmp_path / "password").write_text("hunter2\n")
    said = shopstream(
        "config", "--json", "--broker", "option:1",
        SHOPSTREAM_SETTINGS=str(tmp_path / "shop.toml"), SHOPSTREAM_APP_ID="from-environment",
        SHOPSTREAM_WAREHOUSE_PASSWORD_FILE=str(tmp_path / "password"),
    )  # fmt: skip
    found = settings_of(said)
    assert found["broker"] == ("option:1", "option")
    assert found["app_id"] == ("from-environment", "environment")
    assert found["partitions"] == (8, "file")
    assert found["flush_seconds"] == (0.5, "default")
    assert found["warehouse_password"] == ("********", "environment")


def test_no_secret_is_ever_shown() -> None:
    secrets = {"SHOPSTREAM_WAREHOUSE_PASSWORD": "hunter2", "SHOPSTREAM_WAREHOUSE": "clickhouse://me:hunter3@h/db"}
    for more in ((), ("--json",), ("--changed",)):
        said = shopstream("config", *more, columns=200, **secrets)
        assert said.code == 0
        assert "hunter" not in said.out + said.err
        assert "***" in said.out


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("clickhouse://me:secret@h/db", "clickhouse://me:***@h/db"),
        ("clickhouse://me:se:c@ret@h:9000/db", "clickhouse://me:***@h:9000/db"),
        ("clickhouse://:secret@[::1/db", "clickhouse://:***@[::1/db"),
        ("clickhouse://me@h:9000/db?x=a:b@c", "clickhouse://me@h:9000/db?x=a:b@c"),
        ("chdb:///a/b:c@d", "chdb:///a/b:c@d"),
    ],
)
def test_a_password_in_a_url_is_masked_and_nothing_else(url: str, shown: str) -> None:
    assert masked(url) == shown


def test_changed_leaves_the_defaults_out() -> None:
    said = shopstream("config", "--changed", "--json", SHOPSTREAM_PARTITIONS="9")
    assert settings_of(said) == {"partitions": (9, "environment")}


# --- doctor -------------------------------------------------------------------------------------------------------------------


def findings(said: Said) -> dict[str, list[tuple[str, str, str]]]:
    found: dict[str, list[tuple[str, str, str]]] = {}
    for finding in json.loads(said.out)["findings"]:
        found.setdefault(finding["check"], []).append((finding["state"], finding["found"], finding["remedy"]))
    return found


def test_a_broker_that_is_down_fails_with_a_remedy_and_soon(folder: Path) -> None:
    said = shopstream("doctor", "--json", "--broker", "127.0.0.1:1", "--warehouse", folder)
    assert said.code == 1
    found = findings(said)
    assert found["broker"][0][0] == "fail"
    assert "SHOPSTREAM_BROKER" in found["broker"][0][2]
    assert [state for state, _, _ in found["migrations"]] == ["ok"]
    assert all(remedy or "not checked" in what for of in found.values() for state, what, remedy in of if state != "ok")


def test_a_broker_that_never_answers_hangs_nobody(folder: Path) -> None:

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        began = time.monotonic()
        said = shopstream(
            "doctor", "--json", "--timeout", 1, "--broker", f"127.0.0.1:{port}", "--warehouse", f"clickhouse://127.0.0.1:{port}/x"
        )
        assert time.monotonic() - began < 15
    found = findings(said)
    assert (said.code, found["broker"][0][0], found["warehouse"][0][0]) == (1, "fail", "fail")


def test_wrong_settings_are_a_finding() -> None:
    said = shopstream("doctor", "--json", SHOPSTREAM_PARTITIONS="many")
    assert said.code == 1
    assert "SHOPSTREAM_PARTITIONS" in findings(said)["settings"][0][1]


def test_missing_migrations_are_found(tmp_path: Path) -> None:
    warehouse = open_warehouse(f"chdb://{tmp_path}/w")
    warehouse.query("CREATE TABLE others (x Int8) ENGINE = MergeTree ORDER BY x")
    warehouse.close()
    state, what, remedy = findings(shopstream("doctor", "--json", "--broker", "127.0.0.1:1", "--warehouse", tmp_path / "w"))["migrations"][
        0
    ]
    assert (state, remedy) == ("fail", "run `shopstream migrate`")
    assert "0001_base_tables" in what


def test_doctor_makes_no_warehouse(tmp_path: Path) -> None:
    said = shopstream("doctor", "--broker", "127.0.0.1:1", "--warehouse", tmp_path / "none")
    assert said.code == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "command",
    [
        ("report",), ("report", "funnel"), ("report", "retention"), ("report", "kpi"), ("report", "health"),
        ("rejects",), ("rejects", "list"), ("rejects", "show"), ("rejects", "replay"), ("doctor",), ("config",),
        ("run",), ("worker",), ("topics",), ("migrate",), ("demo",), ("replay",),
    ],
)  # fmt: skip
def test_help_teaches_with_an_example(command: tuple[str, ...]) -> None:
    said = shopstream(*command, "--help", columns=120)
    assert said.code == 0
    assert "Example: " in said.out or (len(command) == 1 and command[0] in ("report", "rejects"))
