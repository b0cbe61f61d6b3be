"""From when on a rebuild can compute numbers: what Kafka still holds of the source topics. `pipeline.cli.rebuild` asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

from kafka import KafkaConsumer, TopicPartition
from kafka.partitioner.default import murmur2

from pipeline.cli.clients import Wrong
from pipeline.cli.reading import parse_time
from pipeline.definitions import Definitions
from pipeline.event_times import time_of
from pipeline.sinks.warehouse import Warehouse

EARLIEST = "earliest"
READ_SECONDS = 30.0
LOOKED_AT = 1000  # offsets of each topic partition


def since_ms(asked: str, definitions: Definitions, consumer: KafkaConsumer, places: list[TopicPartition], warehouse: Warehouse) -> int:
    """Windows that start before it (ms) keep their rows; 0 for all. Raises Wrong for a time from which Kafka no longer holds all events."""
    if asked == EARLIEST:
        return 0
    when = parse_time("--from", asked, definitions.time_zone)
    assert when is not None
    since = int(when.timestamp() * 1000)
    begins = {place: first for place, first in consumer.beginning_offsets(places).items() if first > 0}
    if not begins:
        return since
    partitions = len({place.partition for place in places})
    judged = [(first, _judged(warehouse, place, first, partitions)) for place, first in begins.items()]
    complete = max(_newest_deleted(consumer, first, of_place, definitions.lateness_ms) for first, of_place in judged)
    if since < complete:
        zone = ZoneInfo(definitions.time_zone)
        there = datetime.fromtimestamp(-(-complete // 60_000) * 60, UTC).astimezone(zone)
        raise Wrong(
            f"--from {asked}: Kafka no longer holds all events since then (the first ones of {', '.join(f'{p.topic}[{p.partition}]' for p in begins)} are "
            f"deleted). From {there:%Y-%m-%dT%H:%M} on it does: --from {there:%Y-%m-%dT%H:%M}. With --from earliest the reports begin where the topics do."
        )
    return since


def _newest_deleted(consumer: KafkaConsumer, first: int, judged: _Judged, lateness_ms: int) -> int:
    """No event that counts and is deleted is later (ms): the first that is left and counts is at most the lateness older than those before it."""
    for record in _records(consumer, judged.place, first):
        ms = time_of(record.value or b"")
        if ms is not None and judged.counts(record):
            return ms + lateness_ms
    return int(time.time() * 1000)


@dataclass(frozen=True, slots=True)
class _Judged:
    """What the workers have made of a topic partition's records: read up to `reached`, and without those rejected and those sent on to another partition."""

    place: TopicPartition
    partitions: int
    reached: int
    rejected: frozenset[int]

    def counts(self, record: Any) -> bool:
        at_home = record.key is not None and (murmur2(record.key) & 0x7FFFFFFF) % self.partitions == self.place.partition
        return at_home and record.offset < self.reached and record.offset not in self.rejected


def _judged(warehouse: Warehouse, place: TopicPartition, first: int, partitions: int) -> _Judged:
    values = {"topic": place.topic, "number": place.partition, "first": first, "last": first + LOOKED_AT}
    one = 'topic = %(topic)s AND "partition" = %(number)s'
    reached = warehouse.query(f"SELECT max(next_offset) FROM current_progress WHERE {one}", values)  # noqa: S608 our own text
    rejected = warehouse.query(f'SELECT "offset" FROM rejects WHERE {one} AND "offset" BETWEEN %(first)s AND %(last)s', values)  # noqa: S608
    return _Judged(place, partitions, int(reached[0][0] or 0) if reached else 0, frozenset(int(offset) for (offset,) in rejected))


def _records(consumer: KafkaConsumer, place: TopicPartition, offset: int) -> Iterator[Any]:
    """Those at or after the offset, of LOOKED_AT offsets."""
    consumer.assign([place])
    consumer.seek(place, offset)
    end = min(consumer.end_offsets([place])[place], offset + LOOKED_AT)
    deadline = time.monotonic() + READ_SECONDS
    while consumer.position(place) < end and time.monotonic() < deadline:
        for records in consumer.poll(timeout_ms=500, max_records=100).values():
            yield from records
