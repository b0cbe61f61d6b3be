"""Wrong uses of every command: code 2 (1 when the outside world is what is wrong), one message that says what to do, no traceback, nothing on stdout.

Each is what somebody might well type. `{…}` in an argument is a file or folder of `places`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from pipeline.cli.main import app
from pipeline.sinks.open import open_warehouse
from tests.command_line import shopstream

LINE = b'{"event_id":"e","event":"view_item","ts":1772323200000,"user_id":"u"}\n'
LEAST, MOST = "greater than or equal to", "less than or equal to"


class Use(NamedTuple):
    """What is typed, the code it ends with, what the message must hold, and the environment."""

    typed: str
    code: int
    said: str
    environment: dict[str, str] = {}  # noqa: RUF012 never changed


FILES = "--clickstream {events}"
USES = [
    # the command itself
    Use("rapport", 2, "No such command"),
    Use("reprot funnel", 2, "Did you mean.*report"),
    Use("--verbose", 2, "No such option"),
    Use("version now", 2, "unexpected extra argument"),
    # run
    Use("run", 2, "Missing option '--warehouse'"),
    Use("run --warehouse {new}", 2, "--clickstream"),
    Use("run --warehouse {new} --clickstream {none}", 2, "does not exist"),
    Use("run --warehouse {new} --clickstream {folder}", 2, "is a directory"),
    Use("run --warehouse {new} --clickstream {text}", 2, "ending says no format"),
    Use(f"run --warehouse {{text}} {FILES}", 2, "--warehouse names a folder"),
    Use(f"run --warehouse {{folder}} {FILES}", 2, "--overwrite"),
    Use(f"run --warehouse {{folder}} {FILES} --overwrite", 2, "is not a warehouse"),
    Use(f"run --warehouse {{new}} {FILES} --definitions {{wrong}}", 2, "wrong.toml: .*funnel"),
    Use(f"run --warehouse {{new}} {FILES} --definitions {{binary}}", 2, "binary.toml.*UTF-8"),
    Use(f"run --warehouse {{new}} {FILES} --map {{wrong}}", 2, "wrong.toml"),
    Use(f"run --warehouse {{new}} {FILES} --partitions 0", 2, f"--partitions.*{LEAST} 1"),
    Use(f"run --warehouse {{new}} {FILES} --partitions four", 2, "valid int"),
    Use(f"run --warehouse {{new}} {FILES} --workers 1000", 2, f"--workers.*{MOST} 64"),
    Use(f"run --warehouse {{new}} {FILES} --partition 4", 2, "No such option.*--partitions"),
    # rebuild
    Use("rebuild", 2, "say --from earliest"),
    Use("rebuild --from earliest --drop-old", 2, "say --from earliest"),
    Use("rebuild --from soon", 2, "--from 'soon' is no date"),
    Use("rebuild --from earliest --warehouse chdb://{folder}", 2, "embedded warehouse lets in one process"),
    Use("rebuild --from earliest --definitions {wrong}", 2, "wrong.toml: .*funnel"),
    Use("rebuild --from earliest --warehouse clickhouse://u@127.0.0.1:1/d", 1, "does not answer"),
    Use("rebuild --drop-old --warehouse clickhouse://u@127.0.0.1:1/d", 1, "does not answer"),
    # demo, replay
    Use("demo --minutes 0", 2, f"--minutes.*{LEAST} 0.01"),
    Use("demo --minutes soon", 2, "valid number"),
    Use("demo --speed 0.5", 2, f"--speed.*{LEAST} 1"),
    Use("demo --visitors 3", 2, f"--visitors.*{LEAST} 50"),
    Use("demo --head-start 400", 2, f"--head-start.*{MOST} 365"),
    Use("demo --second 3", 2, "No such option.*--seed"),
    Use("demo --warehouse {text}", 2, "--warehouse names a folder"),
    Use("demo --warehouse {folder}", 2, "--overwrite"),
    Use("demo --warehouse {folder} --overwrite", 2, "is not a warehouse"),
    Use("replay", 2, "Missing argument"),
    Use("replay {events}", 2, "--topic clickstream or --topic orders"),
    Use("replay {none} --topic orders", 2, "does not exist"),
    Use("replay {text} --topic orders", 2, "ending says no format"),
    Use("replay {events} --topic returns", 2, "clickstream.*orders"),
    Use("replay {events} --topic orders --map {wrong}", 2, "leave --topic out"),
    Use("replay {events} --map {wrong}", 2, "wrong.toml"),
    Use("replay {events} --topic orders --speed 0", 2, "--speed"),
    # worker
    Use("worker --definitions {none}", 2, "does not exist"),
    Use("worker --definitions {wrong}", 2, "wrong.toml: .*funnel"),
    Use("worker --warehouse postgres://x", 2, "chdb:///folder"),
    Use("worker --warehouse clickhouse://me:secret@host/db", 2, "give it apart"),
    Use("worker --warehouse shared://127.0.0.1:1", 1, "SHOPSTREAM_WAREHOUSE_KEY"),
    Use("worker", 2, "SHOPSTREAM_SECURITY_PROTOCOL", {"SHOPSTREAM_SECURITY_PROTOCOL": "TLS"}),
    Use("worker", 2, "needs sasl_mechanism, sasl_username and sasl_password", {"SHOPSTREAM_SECURITY_PROTOCOL": "SASL_SSL"}),
    Use("worker", 2, "SHOPSTREAM_FLUSH_SECONDS.*greater than 0", {"SHOPSTREAM_FLUSH_SECONDS": "-1"}),
    Use("worker", 2, "SHOPSTREAM_BROKERS is no setting", {"SHOPSTREAM_BROKERS": "h:1"}),
    Use("worker", 2, "which is not a file: create it", {"SHOPSTREAM_SETTINGS": "{none}"}),
    Use("worker", 2, "SHOPSTREAM_SURPRISE: is no setting", {"SHOPSTREAM_SETTINGS": "{surprise}"}),
    Use("worker", 2, "can't be read", {"SHOPSTREAM_SASL_PASSWORD_FILE": "{none}"}),
    Use("worker", 2, "text.txt", {"SHOPSTREAM_SETTINGS": "{text}"}),
    # traffic
    Use("traffic --visitors 1", 2, f"--visitors.*{LEAST} 10"),
    Use("traffic --alive {none}/alive", 2, "--alive.*can't be written"),
    Use("traffic --broker 127.0.0.1:1", 1, "no Kafka answers at 127.0.0.1:1"),
    # topics, migrate
    Use("topics --partitions 0", 2, f"--partitions.*{LEAST} 1"),
    Use("topics --broker 127.0.0.1:1", 1, "no Kafka answers at 127.0.0.1:1.*SHOPSTREAM_BROKER"),
    Use("topics --broker 127.0.0.1:http", 1, "Check SHOPSTREAM_BROKER"),
    Use("topics --broker 127.0.0.1:99999", 1, "Check SHOPSTREAM_BROKER"),
    Use("topics", 2, "can't be met by replication_factor", {"SHOPSTREAM_MIN_INSYNC_REPLICAS": "2"}),
    Use("migrate --warehouse nowhere", 2, "SHOPSTREAM_WAREHOUSE: a warehouse URL is one of"),
    Use("migrate --warehouse clickhouse://127.0.0.1:1/db", 1, "127.0.0.1:1"),
    Use("migrate --warehouse clickhouse://h/db?secrue=1", 2, "unknown option secrue.*secure"),
    Use("migrate --warehouse shared://127.0.0.1:1", 1, "SHOPSTREAM_WAREHOUSE_KEY"),
    # backup, restore
    Use("backup", 2, "(?i)missing argument 'folder'"),
    Use("backup {folder}", 2, "not an empty folder: name a new one"),
    Use("backup {text}", 2, "not an empty folder: name a new one"),
    Use("backup {new} --definitions {wrong}", 2, "wrong.toml: .*funnel"),
    Use("backup {new} --broker 127.0.0.1:1", 1, "no Kafka answers at 127.0.0.1:1.*SHOPSTREAM_BROKER"),
    Use("restore", 2, "(?i)missing argument 'folder'"),
    Use("restore {none}", 2, "does not exist"),
    Use("restore {folder}", 2, "is no finished backup.*manifest.json"),
    # report
    Use("report", 2, "funnel.*retention.*kpi.*health"),
    Use("report funel", 2, "Did you mean.*funnel"),
    Use("report funnel --warehouse {none}", 2, "shopstream run --warehouse"),
    Use("report funnel --warehouse {folder}", 2, "is no warehouse"),
    Use("report funnel --warehouse chdb://", 2, "name a folder"),
    Use("report funnel --warehouse clickhouse://[::1/db", 2, "SHOPSTREAM_WAREHOUSE"),
    Use("report funnel --warehouse clickhouse://h:99999/db", 2, "SHOPSTREAM_WAREHOUSE"),
    Use("report funnel --warehouse clickhouse://127.0.0.1:1/db", 1, "SHOPSTREAM_WAREHOUSE, or say --warehouse FOLDER"),
    Use("report funnel --warehouse {other}", 1, "shopstream migrate"),
    Use("report funnel --warehouse {warehouse} --name none", 2, "there is no funnel 'none'"),
    Use("report funnel --warehouse {warehouse} --from yesterday", 2, "2026-03-01"),
    Use("report funnel --warehouse {warehouse} --from 2026-03-02 --to 2026-03-01", 2, "--to.*is not after --from"),
    Use("report funnel --warehouse {warehouse} --to 1815-12-10", 2, "between 2000 and 2100"),
    Use("report funnel --warehouse {warehouse} --limit 0", 2, f"--limit.*{LEAST} 1"),
    Use("report funnel --warehouse {warehouse} --json --csv", 2, "--json and --csv exclude each other"),
    Use("report funnel --warehouse {warehouse} --csv --watch 1", 2, "--csv can't be watched"),
    Use("report funnel --warehouse {warehouse} --watch 0", 2, f"--watch.*{LEAST} 0.2"),
    Use("report funnel --warehouse {warehouse} --window 1d", 2, "No such option"),
    Use("report funnel checkout --warehouse {warehouse}", 2, "unexpected extra argument"),
    Use("report retention --warehouse {warehouse} --name weekly", 2, "there is no retention 'weekly'"),
    Use("report retention --warehouse {warehouse} --reading never", 2, "'in', 'after'"),
    Use("report kpi --warehouse {warehouse} --name gmw", 2, "there is no KPI 'gmw'"),
    Use("report kpi --warehouse {warehouse} --window 5m", 2, "'1m', '1h', '1d'"),
    Use("report kpi --warehouse {warehouse} --segment mobile", 2, "--dimension device --segment mobile"),
    Use("report kpi --warehouse {warehouse} --dimension channel", 2, "--dimension needs one KPI"),
    Use("report health --warehouse {warehouse} --limit 3", 2, "No such option"),
    Use("report health", 2, "definitions.toml|binary.toml", {"SHOPSTREAM_DEFINITIONS": "{binary}"}),
    # rejects
    Use("rejects", 2, "list.*show.*replay"),
    Use("rejects list --warehouse {warehouse} --reason bad", 2, "there is no reason 'bad': there are tombstone"),
    Use("rejects list --warehouse {warehouse} --since monday", 2, "2026-03-01"),
    Use("rejects list --warehouse {none}", 2, "shopstream run --warehouse"),
    Use("rejects show --warehouse {warehouse}", 2, "(?i)missing argument 'topic'"),
    Use("rejects show clickstream zero 1 --warehouse {warehouse}", 2, "valid int"),
    Use("rejects show clickstream 0 1 --warehouse {warehouse}", 2, "shopstream rejects list --topic clickstream"),
    Use("rejects replay --warehouse {warehouse} --offset 3", 2, "--offset needs --topic and --partition"),
    Use("rejects replay --warehouse {warehouse} --limit 1000000", 2, f"--limit.*{MOST} 10000"),
    # doctor, config
    Use("doctor --timeout 0", 2, f"--timeout.*{LEAST} 0.5"),
    Use("doctor --fix", 2, "No such option"),
    Use("doctor --broker 127.0.0.1:1 --warehouse clickhouse://[::1/db --timeout 5", 1, "SHOPSTREAM_WAREHOUSE"),
    Use("doctor --broker [::1 --warehouse {warehouse} --timeout 5", 1, "correct SHOPSTREAM_BROKER"),
    Use("doctor --broker , --warehouse {warehouse} --timeout 5", 1, "correct SHOPSTREAM_BROKER"),
    Use("doctor --broker 127.0.0.1:1 --warehouse {none} --timeout 5", 1, "start Kafka, or correct SHOPSTREAM_BROKER"),
    Use("config --json extra", 2, "unexpected extra argument"),
    Use("config", 2, "SHOPSTREAM_PARTITIONS", {"SHOPSTREAM_PARTITIONS": "1.5"}),
    Use("config --definitions {none}", 2, "SHOPSTREAM_DEFINITIONS"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("uses")
    made = {
        "events": ("events.ndjson", LINE),
        "text": ("text.txt", b"hello\n"),
        "wrong": ("wrong.toml", b"[[funnel]]\nname = 'x'\n"),
        "binary": ("binary.toml", b"\xff\xfe\x00"),
        "surprise": ("surprise.toml", b"surprise = 1\n"),
    }
    paths = {name: root / file for name, (file, _) in made.items()}
    for name, (_, content) in made.items():
        paths[name].write_bytes(content)
    paths |= {name: root / name for name in ("folder", "new", "none", "warehouse", "other")}
    (paths["folder"] / "precious").mkdir(parents=True)
    for name in ("other", "warehouse"):
        warehouse = open_warehouse(f"chdb://{paths[name]}")
        if name == "warehouse":
            warehouse.migrate()
        else:
            warehouse.query("CREATE TABLE others (x Int8) ENGINE = MergeTree ORDER BY x")
        warehouse.close()
    return paths


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.typed} {' '.join(use.environment)}".strip())
def test_a_wrong_use_is_answered_with_what_to_do(use: Use, places: dict[str, Path]) -> None:
    names = {name: str(path) for name, path in places.items()}
    environment = {variable: value.format(**names) for variable, value in use.environment.items()}
    said = shopstream(*(word.format(**names) for word in use.typed.split()), columns=300, **environment)
    assert "Traceback" not in said.all
    assert said.code == use.code, said.all
    assert re.search(use.said, said.all, re.DOTALL), said.all
    assert said.out == "" or use.typed.split()[-1] in ("report", "rejects") or use.typed.startswith("doctor")
    assert (places["folder"] / "precious").is_dir()
    assert not places["new"].exists()
    assert not places["none"].exists()


def test_every_command_is_used_wrongly() -> None:
    """A command that comes later has its wrong uses here, or in a list of its own."""
    group = typer.main.get_command(app)
    commands = {
        (name, *sub) for name, command in group.commands.items() for sub in ([(s,) for s in getattr(command, "commands", {})] or [()])
    }  # type: ignore[attr-defined]
    used = {tuple(use.typed.split()[:n]) for use in USES for n in (1, 2)}
    assert commands - used == set()
    assert len(USES) >= 60


def test_no_password_in_a_refused_url_is_repeated() -> None:
    for command in ("worker", "migrate", "report funnel", "rejects list", "doctor --timeout 1 --broker 127.0.0.1:1", "config"):
        said = shopstream(*command.split(), "--warehouse", "clickhouse://me:secret@127.0.0.1/db", columns=300)
        assert "secret" not in said.all
