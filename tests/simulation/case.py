"""What a schedule works on: records for the source topics and the settings of the pipeline, drawn from a seed.

Event times are such that the verdicts on lateness do not depend on the order in which topics are read, unless `late` says so:
a record in the wrong partition lies within the allowed lateness of the last event of all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np

from pipeline.definitions import Definitions, Funnel, Kpi, Match, Retention, Step
from pipeline.partition import Options
from pipeline.tables.hashes import murmur2_partitions, text_rows
from pipeline.topic_names import Topics

MINUTE = 60_000
HOUR = 60 * MINUTE
DAY = 24 * HOUR
T0 = 1_767_225_600_000  # 2026-01-01, midnight UTC
NOW = T0 + 30 * DAY  # the broker's timestamp of every record
LATENESS = 2 * HOUR
TOPICS = Topics()
PAGE, VIEW, CART, PURCHASE = (Match((name,)) for name in ("page_view", "view_item", "add_to_cart", "purchase"))
ANY = Match(("*",))
FUNNEL = Funnel("checkout", (Step("View", VIEW), Step("Cart", CART), Step("Buy", PURCHASE)), HOUR, "1h", version="f1")
COUNT = Kpi("events", "events", "count", ANY, windows=("1h",), version="k1")
SMALL = Definitions((FUNNEL,), kpis=(COUNT,), lateness_ms=LATENESS)
WHOLE = Definitions(
    (FUNNEL,),
    (Retention("return", VIEW, ANY, "day", 3, version="r1"),),
    (
        COUNT,
        Kpi("visitors", "events", "users", ANY, windows=("1h", "1d"), version="k2"),
        Kpi("sessions", "sessions", "count", windows=("1h",), version="k3"),
        Kpi("dwell", "sessions", "dwell", windows=("1d",), version="k4"),
        Kpi("new buyers", "first", "users", PURCHASE, windows=("1h",), version="k5"),
        Kpi("paid", "orders", "paid", windows=("1h",), version="k6"),
    ),
    lateness_ms=LATENESS,
)
USERS = tuple(f"u{i}" for i in range(12))
BAD = (b"{", b"[]", b"", None, b'{"event_id": "x", "event": "view_item", "ts": 1}', b"\xff\xfe")


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One record of a source topic; `body` is what a good one holds, `duplicate` says it is a copy of an earlier one."""

    topic: str
    partition: int
    key: bytes
    value: bytes | None
    body: tuple[str, str, int, str] | None = None  # event id, event, ts, user


@dataclass(frozen=True, slots=True)
class Case:
    """Everything of a schedule but its steps."""

    partitions: int
    workers: int
    records: tuple[SourceRecord, ...]
    definitions: Definitions
    snapshot_bytes: int  # small: snapshots come often
    part_bytes: int  # small: a flush has many changelog records
    send_at_once: int  # records of a transaction between two points at which it can be cut
    evict: bool
    compared: bool  # with a partition that was never interrupted; the plain recomputation is always compared
    late: bool  # verdicts on lateness depend on the order of reading: only the accounts can be compared

    @property
    def options(self) -> Options:
        return Options(snapshot_bytes=self.snapshot_bytes)


@lru_cache
def home(user: str, partitions: int) -> int:
    out = np.empty(1, np.int32)
    murmur2_partitions(*text_rows([user]), partitions, out)
    return int(out[0])


def draw_case(random: Random) -> Case:
    """A case of 4 to 28 records."""
    partitions, late = random.choice((1, 2)), random.random() < 0.15
    definitions = WHOLE if random.random() < 0.15 else SMALL
    snapshot_bytes, part_bytes = random.choice(((0, 250), (0, 900_000), (600, 250), (600, 900_000), (2000, 900_000), (1 << 20, 900_000)))
    return Case(
        partitions,
        random.choice((1, 2, 2, 3)),
        _draw_records(random, partitions, late),
        definitions,
        snapshot_bytes,
        part_bytes,
        random.choice((1, 100)),
        random.random() < 0.3,
        not late and (definitions is WHOLE or random.random() < 0.25),
        late,
    )


def _draw_records(random: Random, partitions: int, late: bool) -> tuple[SourceRecord, ...]:
    count, span = random.randint(4, 28), random.choice((HOUR, 9 * HOUR))
    users = random.sample(USERS, random.randint(1, 5))
    drawn: list[SourceRecord] = []
    for i in range(count):
        dice = random.random()
        if dice < 0.06:
            drawn.append(SourceRecord(random.choice(TOPICS.sources[:2]), random.randrange(partitions), b"u0", random.choice(BAD)))
            continue
        now = T0 + span * i // count
        topic, name = random.choice(((0, "page_view"), (0, "view_item"), (0, "add_to_cart"), (0, "add_to_cart"), (1, "purchase")))
        event_id, user = f"e{i}", random.choice(users)
        ts = max(T0, now - random.randint(0, LATENESS * 3 // 4)) if dice < 0.3 else now + random.randint(0, MINUTE)
        if dice > 0.95 or (late and dice > 0.8):
            ts = now - random.randint(0, 3 * LATENESS)
        good = [r for r in drawn if r.body is not None]
        if good and 0.3 < dice < 0.42:
            copied = random.choice(good)
            topic = TOPICS.sources.index(copied.topic)
            event_id, name, ts, user = copied.body  # type: ignore[misc]
        stray = random.random() < 0.1 and (late or ts > T0 + span - LATENESS + 2 * MINUTE)
        partition = random.randrange(partitions) if stray else home(user, partitions)
        drawn.append(source_record(TOPICS.sources[topic], partition, event_id, name, ts, user))
    return tuple(drawn)


def source_record(topic: str, partition: int, event_id: str, name: str, ts: int, user: str) -> SourceRecord:
    body = {"event_id": event_id, "event": name, "ts": ts, "user_id": user, "order_id": f"o-{user}"}
    return SourceRecord(topic, partition, user.encode(), json.dumps(body).encode(), (event_id, name, ts, user))
