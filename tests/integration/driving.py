"""Drives partitions as the streaming layer does, without Kafka: in go messages in an order of arrival, out come the rows of a warehouse.

Called by the tests that compare reports with `tests.oracle`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import groupby
from typing import Any, NamedTuple

from kafka.partitioner.default import murmur2

from pipeline.definitions import Definitions
from pipeline.partition import Flush, Partition, Run
from pipeline.sinks.embedded import EmbeddedWarehouse
from pipeline.topic_names import Topics
from tests.oracle.shops import Sent

TOPICS = Topics()
GARBAGE = (b"", b'{"event_id":', b"[1]", b'{"event_id":"x","event":"y","ts":1772323200000}', b"\xff")


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
    idle: frozenset[str] = frozenset()
    changelog: list[tuple[bytes | None, bytes | None]] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.subject = Partition(self.number, self.partitions, self.definitions, TOPICS)
        self.subject.idle |= self.idle

    def offer(self, topic: str, messages: Sequence[Sent]) -> None:
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

    def restart(self, definitions: Definitions | None = None) -> None:
        """Begin again from the changelog, with other definitions if given."""
        self.definitions = definitions or self.definitions
        self._begin()
        self.subject.restore(self.changelog)


def lanes(messages: list[Sent], partitions: int) -> list[list[Sent]]:
    """The messages of each partition, as Kafka's own partitioner spreads the keys."""
    out: list[list[Sent]] = [[] for _ in range(partitions)]
    for message in messages:
        out[(murmur2(message.key) & 0x7FFFFFFF) % partitions].append(message)
    return out


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


def idle_topics(messages: list[Sent]) -> frozenset[str]:
    """Source topics without a single message: a worker finds them idle."""
    return frozenset({TOPICS.clickstream, TOPICS.orders} - {m.topic for m in messages})


def drivers(definitions: Definitions, partitions: int, warehouse: EmbeddedWarehouse, idle: frozenset[str]) -> list[Driver]:
    return [Driver(p, partitions, definitions, warehouse, idle) for p in range(partitions)]


def consume(driving: list[Driver], messages: list[Sent], r: random.Random) -> int:
    """Everything through all partitions into the warehouse, each restarted once; how many pieces of garbage were among it."""
    return sum(_consume(driver, lane, r) for driver, lane in zip(driving, lanes(messages, len(driving)), strict=True))


def _consume(driver: Driver, lane: list[Sent], r: random.Random) -> int:
    garbage, at, restart_at = 0, 0, r.randrange(len(lane) + 1)
    while at < len(lane):
        cut = lane[at : at + r.choice((1, 50, 400, 2000, 4000))]
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


class Reports(NamedTuple):
    """The three reports by key: values as `tests.oracle.sql.Oracle` gives them (retentions without empty periods), then the other columns."""

    funnels: dict[Any, int]
    retentions: dict[Any, Any]
    kpis: dict[Any, Decimal]
    times: dict[Any, tuple[int, int]]
    funnel_finals: dict[Any, bool]
    retention_finals: dict[Any, bool]
    kpi_finals: dict[Any, bool]


def reports(warehouse: Any, where: str = "1") -> Reports:
    """Every column of the reports, each read once: a view is computed anew for each query."""
    out = Reports({}, {}, {}, {}, {}, {}, {})
    funnel = "funnel, toUnixTimestamp(window_start), segment, step, users, median_ms, p90_ms, final"
    for name, start, segment, step, users, median, p90, final in warehouse.query(f"SELECT {funnel} FROM funnel_report WHERE {where}"):
        key = (name, start * 1000, segment, step)
        out.funnels[key], out.times[key], out.funnel_finals[key] = users, (median, p90), bool(final)
    retention = "retention, toUnixTimestamp(cohort_start), segment, period, final, users, users_on_or_after, value"
    for name, start, segment, n, final, *values in warehouse.query(f"SELECT {retention} FROM retention_report WHERE {where}"):
        key = (name, start * 1000, segment, n)
        out.retention_finals[key] = bool(final)
        if any(values):
            out.retentions[key] = tuple(values)
    kpi = "kpi, window, toUnixTimestamp(window_start), dimension, dimension_value, currency, value, final"
    for name, window, start, dimension, of, currency, value, final in warehouse.query(f"SELECT {kpi} FROM kpi_report WHERE {where}"):
        found = (name, window, start * 1000, dimension, of, currency)
        out.kpis[found], out.kpi_finals[found] = value, bool(final)
    return out


def reported(warehouse: Any, where: str = "1") -> tuple[dict[Any, int], dict[Any, Any], dict[Any, Decimal]]:
    """Funnels, retentions and KPIs."""
    return reports(warehouse, where)[:3]


def same(kind: str, found: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    if found == wanted:
        return
    different = [(key, found.get(key), wanted.get(key)) for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    different.sort(key=lambda d: tuple(map(str, d[0])))
    assert not different, f"{len(different)} of {len(wanted)} rows of {kind} differ (key, report, SQL): {different[:8]}"
