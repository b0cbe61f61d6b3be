"""Taking over four partitions with a million users from their changelog: wall and CPU seconds. `python -m benchmarks.restore [users] [events a user]`.

In: seeded events, three a user and day, flushed as a worker does that keeps up with 20,000 events/s (2,500 events a partition and transaction), into an
embedded Kafka, up to the worst moment: shortly before the next snapshot. Measured: `Owner.assigned` until every partition is owned, as in a worker that
has just started: fence, read, restore, two at a time.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
from aiokafka.structs import TopicPartition
from rich.console import Console

from benchmarks.decode import RawRecord
from embedded.kafka import EmbeddedKafka
from generator.bench import START_MS, events
from pipeline.definitions import Definitions
from pipeline.definitions_file import DEFAULT_FILE, load
from pipeline.partition import Options, Partition, Run
from pipeline.streaming.changelog import delete_before, fence, stop_producer, transact
from pipeline.streaming.memory import settle
from pipeline.streaming.options import WorkerOptions
from pipeline.streaming.owner import Owner
from pipeline.streaming.warm_up import warm_up
from pipeline.tables.hashes import murmur2_partitions, text_rows
from pipeline.topic_names import Topics
from pipeline.topics import ensure_topics

PARTITIONS = 4
CHUNK = 400_000
DAY_MS = 86_400_000
EVENTS_A_DAY = 3  # of a user
FLUSH = 2500  # events of a partition
TOPICS = Topics()
console = Console()


def chunks(users: int) -> Iterator[list[list[RawRecord]]]:
    """Records by partition, each user as likely as any other, without an end."""
    offsets = [0] * PARTITIONS
    span = DAY_MS * CHUNK // (EVENTS_A_DAY * users)
    for i in count():
        keys, values = events(CHUNK, users, seed=i + 1, start_ms=START_MS + span * i, span_ms=span, exponent=0)
        home = np.empty(CHUNK, np.int32)
        murmur2_partitions(*text_rows([key.decode() for key in keys]), PARTITIONS, home)
        parts: list[list[RawRecord]] = [[] for _ in range(PARTITIONS)]
        for key, value, number in zip(keys, values, home.tolist(), strict=True):
            parts[number].append(RawRecord(offsets[number], key, value, START_MS + span * (i + 1)))
            offsets[number] += 1
        yield parts


async def write(client: dict[str, Any], definitions: Definitions, users: int, least: int) -> list[Partition]:
    """The changelog of all partitions after at least so many events; returns them as they are at its end."""
    partitions = [Partition(number, PARTITIONS, definitions, TOPICS, Options()) for number in range(PARTITIONS)]
    for partition in partitions:
        partition.idle.add(TOPICS.orders)  # nothing comes there
    producers = [await fence(client, f"{TOPICS.app_id}-{number}") for number in range(PARTITIONS)]
    for i, parts in enumerate(chunks(users)):
        for partition, producer, records in zip(partitions, producers, parts, strict=True):
            for first in range(0, len(records), FLUSH):
                run = records[first : first + FLUSH]
                partition.offer(Run(TOPICS.clickstream, partition.number, run, run[-1].offset + 1, run[0].offset))
                await _flush(client, partition, producer)
        if (i + 1) * CHUNK >= least and all(p.changelog_bytes[1] > 0.9 * p.snapshot_after for p in partitions):
            break
    for producer in producers:
        await stop_producer(producer)
    return partitions


async def _flush(client: dict[str, Any], partition: Partition, producer: Any) -> None:
    flush = partition.snapshot()
    assert flush is not None
    first = await transact(producer, flush.records, TOPICS.changelog)
    partition.committed(flush)
    if (rows := partition.sink_rows()) is not None:
        partition.sunk(rows[0])
    if flush.snapshot and first:
        await delete_before(client, TopicPartition(TOPICS.changelog, partition.number), first)


async def take_over(bootstrap: str, definitions: Definitions) -> tuple[list[Partition], float, float]:
    """The partitions, wall and CPU seconds until all are owned."""
    owner = Owner(definitions, WorkerOptions(bootstrap, TOPICS))
    began, cpu = time.monotonic(), time.process_time()
    owner.assigned([TopicPartition(topic, number) for topic in TOPICS.sources for number in range(PARTITIONS)])
    while owner.taking:  # noqa: ASYNC110  nobody tells
        await asyncio.sleep(0.01)
    seconds = time.monotonic() - began, time.process_time() - cpu
    restored = [owner.owned[number].partition for number in range(PARTITIONS)]
    await owner.close()
    return restored, *seconds


def same(found: list[Partition], wanted: list[Partition]) -> bool:
    return all(f.states == w.states and len(f.board.users) == len(w.board.users) for f, w in zip(found, wanted, strict=True))


def main(users: int = 1_000_000, each: int = 6) -> None:
    definitions = load(DEFAULT_FILE)
    warm_up(definitions)
    settle()
    with EmbeddedKafka() as kafka:
        client = {"bootstrap_servers": kafka.bootstrap}
        ensure_topics({"bootstrap_servers": [kafka.bootstrap]}, TOPICS, PARTITIONS)
        with console.status(f"writing the changelog of {users * each:,} events or some more"):
            written = asyncio.run(write(client, definitions, users, users * each))
        snapshots, deltas = (sum(sizes) for sizes in zip(*(p.changelog_bytes for p in written), strict=True))
        users_, applied = sum(len(p.board.users) for p in written), sum(p.states[TOPICS.clickstream].applied for p in written)
        sizes = f"snapshots {snapshots >> 20} MB, deltas since {deltas >> 20} MB"
        console.print(f"{applied:,} events, {users_:,} users; {sizes}", highlight=False)
        for round_ in range(3):
            restored, wall, cpu = asyncio.run(take_over(kafka.bootstrap, definitions))
            assert same(restored, written)
            del restored
            console.print(f"round {round_ + 1}: {wall:.1f} s, {cpu:.1f} CPU s", highlight=False)
        console.print(f"largest memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB", highlight=False)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
