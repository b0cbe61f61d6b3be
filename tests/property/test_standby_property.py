"""A standby that read the changelog in any pieces is what a restore of all of it is; and both are what the owner was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.definitions_file import DEFAULT_FILE, load
from pipeline.partition import Options, Partition, Run
from pipeline.streaming.standby import Standby
from pipeline.topic_names import Topics

T0 = 1_767_225_600_000
HOUR = 3_600_000
TOPICS = Topics()
DEFINITIONS = load(DEFAULT_FILE)
NAMES = ("page_view", "view_item", "add_to_cart", "begin_checkout", "purchase")


@dataclass(frozen=True)
class Record:
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: int = T0 + 1000 * HOUR
    headers: tuple[tuple[str, bytes], ...] = ()


def new(snapshot_bytes: int = 10 << 20) -> Partition:
    return Partition(0, 1, DEFINITIONS, TOPICS, Options(snapshot_bytes=snapshot_bytes))


def history(random: Random, flushes: int) -> tuple[Partition, list[Record]]:
    """An owner that flushed so many times, and its changelog: events out of order, twice and bad ones, a sink that now and then confirms, two snapshots or more."""
    owner = new(snapshot_bytes=random.choice((2000, 20_000, 10 << 20)))
    owner.idle.add(TOPICS.orders)
    log: list[Record] = []
    offset = 0
    for n in range(flushes):
        run = []
        for _ in range(random.randint(1, 30)):
            ts = T0 + n * HOUR - random.choice((0, 0, 1, 20)) * HOUR + random.randrange(HOUR)
            body = {"event_id": f"e{random.randrange(600)}", "event": random.choice(NAMES), "ts": ts, "user_id": f"u{random.randrange(40)}"}
            body |= {"channel": random.choice(("email", "ads")), "value": 3, "order_id": f"o{random.randrange(99)}"}
            value = b"{" if random.random() < 0.03 else json.dumps(body).encode()
            run.append(Record(offset, b"u", value))
            offset += 1
        owner.offer(Run(TOPICS.clickstream, 0, run, offset, run[0].offset))
        flush = owner.snapshot()
        assert flush is not None
        log += [Record(len(log) + i, r.key, r.value) for i, r in enumerate(flush.records) if r.topic == TOPICS.changelog]
        owner.committed(flush)
        if random.random() < 0.4 and (rows := owner.sink_rows()) is not None:
            owner.sunk(rows[0])
    return owner, log


def state(partition: Partition) -> dict[str, Any]:
    """All that counts of a state. A version counts once the sink may lack it; cells of 0 without such a version are as good as none."""
    cells, n = partition.board.cells.arrays, len(partition.board.cells)
    values, unsunk = {}, {}
    for key, value, version in zip(cells.keys[:n].tolist(), cells.values[:n].tolist(), cells.versions[:n].tolist(), strict=True):
        if value:
            values[tuple(key)] = value
        if version > partition.sunk_flush:
            unsunk[tuple(key)] = (value, version)
    seen = partition.board.seen.dump()
    return {
        "values": values,
        "unsunk": unsunk,
        "seen": sorted(zip(seen["event_id"].tolist(), seen["ts"].tolist(), strict=True)),
        "users": partition.board.users.dump().tolist(),
        "strings": partition.board.strings.texts,
        "topics": partition.states,
        "place": (partition.flushed, partition.horizon),
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 25))
def test_read_in_any_pieces_it_is_what_a_restore_is(seed: int, flushes: int) -> None:
    random = Random(seed)
    owner, log = history(random, flushes)
    restored = new()
    restored.restore([(record.key, record.value) for record in log])
    standby = Standby(new())
    at, until = 0, random.randint(0, len(log))
    while at < until:
        piece = log[at : min(until, at + random.choice((1, 2, 7)))]
        standby.follow(piece)
        at += len(piece)
        assert standby.offset == at
    taken = standby.take_over([(record.key, record.value) for record in log[at:]])
    assert state(taken) == state(restored)
    assert state(taken)["values"] == state(owner)["values"]
    later = [Record(10_000 + i, b"u", json.dumps(body(i, owner)).encode()) for i in range(20)]
    for one in (owner, taken, restored):
        one.idle.add(TOPICS.orders)
        one.offer(Run(TOPICS.clickstream, 0, later, 10_020, one.positions[TOPICS.clickstream]))
    assert state(taken)["values"] == state(restored)["values"] == state(owner)["values"]
    assert taken.states == restored.states == owner.states


def body(i: int, owner: Partition) -> dict[str, Any]:
    return {
        "event_id": f"e{i * 30}",
        "event": NAMES[i % 5],
        "ts": owner.watermark - i * HOUR,
        "user_id": f"u{i}",
        "value": 1,
        "order_id": f"o{i}",
    }
