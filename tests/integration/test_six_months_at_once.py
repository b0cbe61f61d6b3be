"""Half a year of a shop through `shopstream run` in one go: nothing that was in order within its partition is late, and every number is SQL's.

Also that a topic without a single event does not hold back for ever what is final.
"""

from __future__ import annotations

import csv
import gzip
import io
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.definitions_file import load
from pipeline.files import Keyed, read
from pipeline.mapping import load_mapping
from pipeline.sinks.embedded import EmbeddedWarehouse
from tests.integration.driving import reported, same
from tests.oracle import shops
from tests.oracle.finals import funnel_is_final
from tests.oracle.sql import Oracle

MAPS = Path(__file__).parents[2] / "deploy" / "maps"
DEFINITIONS = """
[[funnel]]
name = "buying"
conversion_window = "7d"
entry_window = "1w"
[[funnel.step]]
event = "view_item"
[[funnel.step]]
event = "add_to_cart"
[[funnel.step]]
event = "purchase"

[[funnel]]
name = "by_channel"
conversion_window = "1d"
breakdown = "channel"
[[funnel.step]]
event = "search"
[[funnel.step]]
event = "view_item"
[[funnel.step]]
event = "add_to_cart"

[[retention]]
name = "visits"
cohort = { event = "*" }
period = "day"
periods = 30
breakdown = "device"

[[kpi]]
name = "actives"
aggregate = "users"
event = "*"
windows = ["1d"]
dimensions = ["channel"]
"""


def run(folder: Path, *arguments: str) -> str:
    """`shopstream run` into folder/warehouse; what it printed."""
    (folder / "shopstream.toml").write_text(DEFINITIONS)
    command = [sys.executable, "-m", "pipeline.cli.main", "run", "--warehouse", str(folder / "warehouse")]
    done = subprocess.run(
        [*command, "--definitions", str(folder / "shopstream.toml"), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def opened(folder: Path) -> Iterator[EmbeddedWarehouse]:
    warehouse = EmbeddedWarehouse(str(folder / "warehouse"))
    try:
        yield warehouse
    finally:
        warehouse.close()


def progress(warehouse: EmbeddedWarehouse) -> dict[str, tuple[int, int, int, int]]:
    rows = warehouse.query(
        "SELECT topic, sum(a), sum(d), sum(r), sum(l) FROM (SELECT topic, argMax(applied, version) AS a, argMax(duplicates, version) AS d, "
        "argMax(rejected, version) AS r, argMax(too_late, version) AS l FROM progress GROUP BY topic, partition) GROUP BY topic"
    )
    return {topic: (int(a), int(d), int(r), int(late)) for topic, a, d, r, late in rows}


def in_order_of_time(source: Path, target: Path, column: str, rows: int | None = None) -> None:
    text = gzip.decompress(source.read_bytes()).decode()
    read_rows = sorted(csv.DictReader(io.StringIO(text)), key=lambda row: row[column])[:rows]
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(read_rows[0]))
        writer.writeheader()
        writer.writerows(read_rows)


def events(file: Path, mapping: str) -> list[Keyed]:
    return list(read(file, "clickstream", load_mapping(MAPS / mapping)))


def equal_to_sql(warehouse: EmbeddedWarehouse, folder: Path, sent: list[Keyed]) -> None:
    oracle = Oracle(warehouse.query, load(folder / "shopstream.toml"), [(e.topic, e.value) for e in sent])
    truth: tuple[Any, ...] = oracle.funnels(), oracle.retentions(), oracle.kpis()
    for kind, found, wanted in zip(("funnel_report", "retention_report", "kpi_report"), reported(warehouse), truth, strict=True):
        same(kind, found, wanted)


def test_six_months_replayed_at_once_lose_nothing_as_late(tmp_path: Path) -> None:
    """The file goes user by user; `--sort` sends it as it happened."""
    file, facts = shops.file_of("ecom", "events.csv.gz"), shops.facts("ecom")
    printed = run(tmp_path, "--clickstream", str(file), "--map", str(MAPS / "ecom.toml"), "--sort")
    sent = events(file, "ecom.toml")
    assert len(sent) == facts["rows"]
    assert f"read {len(sent):,}" in " ".join(printed.split())
    with opened(tmp_path) as warehouse:
        per_topic = Counter(e.topic for e in sent)
        assert progress(warehouse) == {topic: (n, 0, 0, 0) for topic, n in per_topic.items()}
        assert per_topic["orders"] == facts["events_per_type"]["purchase"]
        equal_to_sql(warehouse, tmp_path, sent)
        returned = dict(warehouse.query("SELECT period, sum(users) FROM retention_report WHERE retention = 'visits' GROUP BY period"))
        known = {0: facts["users"]} | {n: facts["retention"][f"day{n}"]["returned"] for n in (1, 2, 3, 7, 14, 30)}
        assert {n: int(returned[n]) for n in known} == known


@pytest.mark.parametrize("partitions", [2])
def test_run_of_one_file_ends_with_final_numbers(tmp_path: Path, partitions: int) -> None:
    """There are no orders at all: the end of the input is the end of waiting for them."""
    file = tmp_path / "events.csv"
    in_order_of_time(shops.file_of("ecom", "events.csv.gz"), file, "timestamp", 5000)
    rows = [row for row in csv.DictReader(file.open()) if row["event"] != "purchase"]
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    run(tmp_path, "--clickstream", str(file), "--map", str(MAPS / "ecom.toml"), "--partitions", str(partitions))
    sent = events(file, "ecom.toml")
    definitions = load(tmp_path / "shopstream.toml")
    with opened(tmp_path) as warehouse:
        equal_to_sql(warehouse, tmp_path, sent)
        smallest = warehouse.query("SELECT smallest FROM watermarks")[0][0]
        shown = warehouse.query("SELECT funnel, toUnixTimestamp(window_start), final FROM funnel_report")
        assert {bool(final) for _, _, final in shown} == {True, False}
        assert all(bool(final) == funnel_is_final(definitions, funnel, start * 1000, smallest) for funnel, start, final in shown)
