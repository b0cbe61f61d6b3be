"""The whole pipeline but Kafka against ClickHouse: whatever the number of partitions and the order of arrival, every number of every report.

Messages go through `pipeline.partition` (with a restart from its changelog half way) into the embedded warehouse; the views must show what
`tests.oracle.sql` computes from the same raw JSON.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from itertools import groupby
from typing import Any

import pytest
from kafka.partitioner.default import murmur2

from pipeline.definitions import Definitions
from pipeline.definitions_file import DEFAULT_FILE, loads
from pipeline.partition import Flush, Partition, Run, Topics
from pipeline.sinks.catalog import install
from pipeline.sinks.embedded import EmbeddedWarehouse
from schemas.rows import COLUMNS
from tests.oracle import shops
from tests.oracle.shops import Sent
from tests.oracle.sql import Oracle

TOPICS = Topics()
GARBAGE = (b"", b'{"event_id":', b"[1]", b'{"event_id":"x","event":"y","ts":1772323200000}', b"\xff")
EXTRA = """
[[funnel]]
name = "plain"
conversion_window = "7d"
entry_window = "1w"
[[funnel.step]]
event = "view_item"
[[funnel.step]]
event = "add_to_cart"
[[funnel.step]]
event = "purchase"

[[funnel]]
name = "strict"
conversion_window = "1h"
entry_window = "1h"
order = "strict"
breakdown = "device"
[[funnel.step]]
events = ["page_view", "search"]
[[funnel.step]]
event = "view_item"

[[funnel]]
name = "any"
conversion_window = "2d"
entry_window = "1d"
order = "any"
[[funnel.step]]
event = "search"
[[funnel.step]]
event = "view_item"
where = { price = { gte = 50 }, device = { ne = "tablet" } }

[[funnel]]
name = "optional"
conversion_window = "1d"
entry_window = "1mo"
[[funnel.step]]
event = "order_created"
[[funnel.step]]
event = "payment_failed"
optional = true
[[funnel.step]]
event = "purchase"

[[funnel]]
name = "refunded"
conversion_window = "30d"
entry_window = "1mo"
[[funnel.step]]
event = "purchase"
[[funnel.step]]
event = "refund"

[[retention]]
name = "weekly"
cohort = { event = "add_to_cart", where = { country = ["DE", "AT", "FR"] } }
return = { event = "view_item", where = { price = { lt = 300 } } }
period = "week"
periods = 8
breakdown = "device"
value = "price"

[[kpi]]
name = "units"
aggregate = "sum"
event = "add_to_cart"
field = "quantity"
dimensions = ["item_category", "country"]
windows = ["1h", "1w"]
"""
ZONES = {"generated": "Europe/Berlin", "ecom": "Asia/Shanghai", "rees46": "UTC", "online_retail": "Europe/London"}
WINDOWS = {
    "generated": '"1m", "1h", "1d"',
    "ecom": '"1h", "1d"',
    "rees46": '"1m", "1h", "1d"',
    "online_retail": '"1d"',
}  # a year of minutes is slow
ARRIVALS = ("in_order", "shuffled", "duplicated")
RUNS = [("generated", n, arrival) for n in (1, 4, 7) for arrival in ARRIVALS] + [
    (name, n, arrival) for name in ("ecom", "rees46", "online_retail") for n, arrival in zip((1, 4, 7), ARRIVALS, strict=True)
]


@dataclass(frozen=True)
class Record:
    offset: int
    key: bytes
    value: bytes
    timestamp: int
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass
class Driver:
    """What the streaming layer does for one partition: offers runs, flushes, sinks, and restarts from the changelog."""

    number: int
    partitions: int
    definitions: Definitions
    warehouse: EmbeddedWarehouse
    changelog: list[tuple[bytes | None, bytes | None]] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        self.subject = Partition(self.number, self.partitions, self.definitions, TOPICS)

    def offer(self, topic: str, messages: list[Sent]) -> None:
        begin = self.offsets[topic]
        now = max(m.ts for m in messages)
        records = [Record(begin + i, m.key, m.value, now) for i, m in enumerate(messages)]
        self.offsets[topic] += len(records)
        self.subject.offer(Run(topic, self.number, records, self.offsets[topic], begin))

    def flush(self) -> Flush | None:
        flush = self.subject.snapshot()
        if flush is not None:
            self.changelog += [(r.key, r.value) for r in flush.records if r.topic == TOPICS.changelog]
            self.subject.committed(flush)
        return flush

    def sink(self) -> None:
        taken = self.subject.sink_rows()
        if taken is not None:
            self.warehouse.insert(taken[1])
            self.subject.sunk(taken[0])

    def restart(self) -> None:
        self.subject = Partition(self.number, self.partitions, self.definitions, TOPICS)
        self.subject.restore(self.changelog)


@pytest.fixture(scope="module")
def warehouse() -> Iterator[EmbeddedWarehouse]:
    opened = EmbeddedWarehouse("")
    opened.migrate()
    yield opened
    opened.close()


@dataclass(frozen=True)
class Case:
    definitions: Definitions
    messages: list[Sent]
    funnels: dict[Any, int]
    retentions: dict[Any, Any]
    kpis: dict[Any, Decimal]


@pytest.fixture(scope="module")
def case_of(warehouse: EmbeddedWarehouse) -> Callable[[str], Case]:
    known: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in known:
            messages = getattr(shops, name)()
            text = DEFAULT_FILE.read_text().replace('time_zone = "UTC"', f'time_zone = "{ZONES[name]}"')
            definitions = loads(text.replace('"1m", "1h", "1d"', WINDOWS[name]) + EXTRA)
            assert definitions.time_zone == ZONES[name]
            oracle = Oracle(warehouse.query, definitions, [(m.topic, m.value) for m in messages])
            known[name] = Case(definitions, messages, oracle.funnels(), oracle.retentions(), oracle.kpis())
            assert known[name].funnels
            assert known[name].retentions
            assert known[name].kpis
        return known[name]

    return make


def arranged(messages: list[Sent], arrival: str, lateness_ms: int, r: random.Random) -> list[Sent]:
    """In the order of `arrival`; nothing comes later than the lateness allows."""
    if arrival == "in_order":
        return messages
    if arrival == "shuffled":
        return sorted(messages, key=lambda m: m.ts + r.randint(0, lateness_ms))
    out = []
    for message in messages:
        out.append(message)
        if r.random() < 0.05:
            out.append(message)
    again = [m for m in messages if r.random() < 0.05]
    return sorted(out + again, key=lambda m: m.ts + r.randint(0, 300_000))


def consume(case: Case, messages: list[Sent], partitions: int, warehouse: EmbeddedWarehouse, r: random.Random) -> int:
    """Everything through all partitions into the warehouse; how many pieces of garbage were among it."""
    lanes: dict[int, list[Sent]] = {p: [] for p in range(partitions)}
    for message in messages:
        lanes[(murmur2(message.key) & 0x7FFFFFFF) % partitions].append(message)
    garbage = 0
    for p, lane in lanes.items():
        driver = Driver(p, partitions, case.definitions, warehouse)
        at, restart_at = 0, r.randrange(len(lane) + 1)
        while at < len(lane):
            size = r.choice((1, 50, 400, 2000, 4000))
            cut = lane[at : at + size]
            for topic, group in groupby(sorted(cut, key=lambda m: m.topic), key=lambda m: m.topic):
                run = list(group)
                if r.random() < 0.3:
                    run.insert(r.randrange(len(run) + 1), Sent(topic, b"k", r.choice(GARBAGE), run[0].ts))
                    garbage += 1
                driver.offer(topic, run)
            flush = driver.flush() if r.random() < 0.5 else None
            if r.random() < 0.5:
                driver.sink()
            if flush is not None and at <= restart_at < at + len(cut):
                driver.restart()
            at += len(cut)
        driver.flush()
        driver.sink()
    return garbage


def ms(when: datetime) -> int:
    return int(when.timestamp()) * 1000


def reported(warehouse: EmbeddedWarehouse) -> tuple[dict[Any, int], dict[Any, Any], dict[Any, Decimal]]:
    funnels = warehouse.query("SELECT funnel, window_start, segment, step, users FROM funnel_report")
    retentions = warehouse.query("SELECT retention, cohort_start, segment, period, users, users_on_or_after, value FROM retention_report")
    kpis = warehouse.query("SELECT kpi, window, window_start, dimension, dimension_value, currency, value FROM kpi_report")
    return (
        {(f, ms(w), s, step): n for f, w, s, step, n in funnels},
        {(name, ms(w), s, n): tuple(values) for name, w, s, n, *values in retentions if any(values)},
        {(kpi, window, ms(w), d, v, c): value for kpi, window, w, d, v, c, value in kpis},
    )


def same(kind: str, found: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    different = [(key, found.get(key), wanted.get(key)) for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    different.sort(key=lambda d: tuple(map(str, d[0])))
    assert not different, f"{len(different)} of {len(wanted)} rows of {kind} differ (key, report, SQL): {different[:8]}"


@pytest.mark.parametrize(("name", "partitions", "arrival"), RUNS, ids=lambda v: str(v))
def test_reports_equal_sql(case_of: Callable[[str], Case], warehouse: EmbeddedWarehouse, name: str, partitions: int, arrival: str) -> None:
    case = case_of(name)
    for table in COLUMNS:
        warehouse.query(f"TRUNCATE TABLE {table}")
    install(warehouse, case.definitions, 1)
    r = random.Random(f"{name} {partitions} {arrival}")
    messages = arranged(case.messages, arrival, case.definitions.lateness_ms, r)
    garbage = consume(case, messages, partitions, warehouse, r)

    funnels, retentions, kpis = reported(warehouse)
    same("funnel_report", funnels, case.funnels)
    same("retention_report", retentions, case.retentions)
    same("kpi_report", kpis, case.kpis)
    counts = warehouse.query(
        "SELECT sum(a), sum(d), sum(l) FROM (SELECT argMax(applied, version) AS a, argMax(duplicates, version) AS d, argMax(too_late, version) AS l "
        "FROM progress GROUP BY topic, partition)"
    )
    assert [int(n) for n in counts[0]] == [len(case.messages), len(messages) - len(case.messages), 0]
    assert int(warehouse.query("SELECT count() FROM (SELECT DISTINCT topic, partition, offset FROM rejects)")[0][0]) == garbage
