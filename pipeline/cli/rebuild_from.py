"""From when on a rebuild can compute numbers: what Kafka still holds of the source topics. `pipeline.cli.rebuild` asks."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

from kafka import KafkaConsumer, TopicPartition

from pipeline.cli.clients import Wrong
from pipeline.cli.reading import parse_time
from pipeline.definitions import Definitions
from pipeline.event_times import time_of

EARLIEST = "earliest"
READ_SECONDS = 30.0
LOOKED_AT = 100


def since_ms(asked: str, definitions: Definitions, consumer: KafkaConsumer, places: list[TopicPartition]) -> int:
    """Windows that start before it (ms) keep their rows; 0 for all. Raises Wrong for a time from which Kafka no longer holds all events."""
    if asked == EARLIEST:
        return 0
    when = parse_time("--from", asked, definitions.time_zone)
    assert when is not None
    since = int(when.timestamp() * 1000)
    begins = {place: first for place, first in consumer.beginning_offsets(places).items() if first > 0}
    if not begins:
        return since
    complete = max(_newest_deleted(consumer, place, first, definitions) for place, first in begins.items())
    if since < complete:
        zone = ZoneInfo(definitions.time_zone)
        there = datetime.fromtimestamp(-(-complete // 60_000) * 60, UTC).astimezone(zone)
        raise Wrong(
            f"--from {asked}: Kafka no longer holds all events since then (the first ones of {', '.join(f'{p.topic}[{p.partition}]' for p in begins)} are "
            f"deleted). From {there:%Y-%m-%dT%H:%M} on it does: --from {there:%Y-%m-%dT%H:%M}. With --from earliest the reports begin where the topics do."
        )
    return since


def _newest_deleted(consumer: KafkaConsumer, place: TopicPartition, first: int, definitions: Definitions) -> int:
    """No event that counts and is deleted is later (ms): one that is left and counts is at most the lateness older than those before it.

    Some of what is left does not count, or not here: it is broken, too late, from the future, or sent on to another partition. So the newest of many is taken.
    """
    times = [ms for record in _records(consumer, place, first) if (ms := _time(record, definitions.future_ms)) is not None]
    return max(times) + definitions.lateness_ms if times else int(time.time() * 1000)


def _time(record: Any, future_ms: int) -> int | None:
    """Event time (ms) of a record; None when it has none, or one that is rejected."""
    ms = time_of(record.value or b"")
    return None if ms is None or ms > record.timestamp + future_ms else ms


def _records(consumer: KafkaConsumer, place: TopicPartition, offset: int) -> list[Any]:
    """The first LOOKED_AT records at or after the offset, or as many as there are."""
    consumer.assign([place])
    consumer.seek(place, offset)
    end = consumer.end_offsets([place])[place]
    deadline = time.monotonic() + READ_SECONDS
    found: list[Any] = []
    while len(found) < LOOKED_AT and consumer.position(place) < end and time.monotonic() < deadline:
        for records in consumer.poll(timeout_ms=500, max_records=LOOKED_AT - len(found)).values():
            found += records
    return found
