"""From when on a rebuild can be asked for, where Kafka has deleted the beginning of a topic: never too early, and not later than it has to be."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic
from kafka.partitioner.default import murmur2

from embedded.kafka import EmbeddedKafka
from pipeline.cli.clients import Wrong
from pipeline.cli.rebuild_from import since_ms
from pipeline.definitions_file import load
from pipeline.sinks.embedded import EmbeddedWarehouse
from schemas.rows import COLUMNS

HOUR = 3_600_000
T0 = 1_767_225_600_000  # 2026-01-01
DELETED = [T0 + i * HOUR for i in range(10)]
NEWEST_DELETED = DELETED[-1]
LATENESS = load(None).lateness_ms
HERE, ELSEWHERE = (next(f"u{i}" for i in range(99) if (murmur2(f"u{i}".encode()) & 0x7FFFFFFF) % 2 == p) for p in range(2))


def event(ts: int | str) -> bytes:
    return json.dumps({"event_id": f"e{ts}", "event": "page_view", "ts": ts, "user_id": "u"}).encode()


LEFT = event(NEWEST_DELETED - 2 * HOUR), event(NEWEST_DELETED + HOUR)
FIRST_LEFT = {
    "an event that counts": [],
    "broken": [b"{", b"", event("yesterday")],
    "too late": [event(NEWEST_DELETED - LATENESS - 48 * HOUR)],
    "from the future": [event(T0 + 20 * 365 * 24 * HOUR)],
}
"""By what it is: the records that come first of those that are left; the workers have rejected them."""


@pytest.fixture(scope="module")
def kafka() -> Iterator[str]:
    with EmbeddedKafka(quiet=True) as broker:
        yield broker.bootstrap


def told(kafka: str, topic: str, left: Sequence[bytes], rejected: int = 0, read: int = 1000, keys: Sequence[str] = ()) -> int:
    """The date (ms) that a refusal names: DELETED are gone, `left` is there, the first `rejected` of it were rejected, and `read` of all were read."""
    admin, place = KafkaAdminClient(bootstrap_servers=[kafka]), TopicPartition(topic, 0)
    admin.create_topics([NewTopic(topic, 2, 1)])
    producer = KafkaProducer(bootstrap_servers=[kafka])
    for record, key in zip([*map(event, DELETED), *left], [*[HERE] * len(DELETED), *(keys or [HERE] * len(left))], strict=True):
        producer.send(topic, record, key=key.encode(), partition=0).get(20)
    producer.close()
    admin.delete_records({place: len(DELETED)})
    admin.close()
    warehouse = EmbeddedWarehouse("")
    warehouse.migrate()
    bad = [(topic, 0, len(DELETED) + i, "too_late", "", b"", b"", 1, 1) for i in range(rejected)]
    progress = [(topic, 0, read, NEWEST_DELETED, 1, 0, 0, 0, 0, 1, 0)]
    warehouse.insert({table: columns(table, rows) for table, rows in (("rejects", bad), ("progress", progress)) if rows})
    consumer = KafkaConsumer(bootstrap_servers=[kafka])
    try:
        with pytest.raises(Wrong) as refused:
            since_ms("2025-12-01", load(None), consumer, [place, TopicPartition(topic, 1)], warehouse)
    finally:
        consumer.close()
        warehouse.close()
    found = re.search(r"--from (\S+)\. With", str(refused.value))
    assert found is not None
    return round(datetime.fromisoformat(found[1] + "+00:00").timestamp() * 1000)


def columns(table: str, rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    return dict(zip(COLUMNS[table], map(list, zip(*rows, strict=True)), strict=True))


def is_now(ms: int) -> bool:
    return abs(ms - time.time() * 1000) < 120_000


@pytest.mark.parametrize("first", FIRST_LEFT)
def test_the_date_is_behind_all_that_is_deleted_whatever_comes_first(kafka: str, first: str) -> None:
    date = told(kafka, first.replace(" ", "-"), [*FIRST_LEFT[first], *LEFT], len(FIRST_LEFT[first]))
    assert date == NEWEST_DELETED - 2 * HOUR + LATENESS


def test_what_was_sent_on_to_another_partition_says_nothing(kafka: str) -> None:
    old = event(NEWEST_DELETED - LATENESS - 48 * HOUR)
    assert told(kafka, "misplaced", [old, *LEFT], keys=[ELSEWHERE, HERE, HERE]) == NEWEST_DELETED - 2 * HOUR + LATENESS


def test_where_nothing_is_left_or_nothing_of_it_was_read_it_is_now(kafka: str) -> None:
    assert is_now(told(kafka, "nothing", []))
    assert is_now(told(kafka, "unread", LEFT, read=len(DELETED)))
