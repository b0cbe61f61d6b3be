"""From when on a rebuild can be asked for, where Kafka has deleted the beginning of a topic: never too early, and not later than it has to be."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic

from embedded.kafka import EmbeddedKafka
from pipeline.cli.clients import Wrong
from pipeline.cli.rebuild_from import since_ms
from pipeline.definitions_file import load

HOUR = 3_600_000
T0 = 1_767_225_600_000  # 2026-01-01
DELETED = [T0 + i * HOUR for i in range(10)]
NEWEST_DELETED = DELETED[-1]
LATENESS = load(None).lateness_ms


def event(ts: int | str) -> bytes:
    return json.dumps({"event_id": f"e{ts}", "event": "page_view", "ts": ts, "user_id": "u"}).encode()


LEFT = event(NEWEST_DELETED - 2 * HOUR), event(NEWEST_DELETED + HOUR)
FIRST_LEFT = {
    "an event that counts": [],
    "broken": [b"{", b"", event("yesterday")],
    "too late": [event(NEWEST_DELETED - LATENESS - 48 * HOUR)],
    "from the future": [event(T0 + 20 * 365 * 24 * HOUR)],
}


@pytest.fixture(scope="module")
def kafka() -> Iterator[str]:
    with EmbeddedKafka(quiet=True) as broker:
        yield broker.bootstrap


def told(kafka: str, topic: str, records: list[bytes], deleted: int) -> int:
    """The date (ms) that a refusal names, of a topic with these records, the first of which are deleted."""
    admin, place = KafkaAdminClient(bootstrap_servers=[kafka]), TopicPartition(topic, 0)
    admin.create_topics([NewTopic(topic, 1, 1)])
    producer = KafkaProducer(bootstrap_servers=[kafka])
    for record in records:
        producer.send(topic, record, partition=0).get(20)
    producer.close()
    admin.delete_records({place: deleted})
    admin.close()
    consumer = KafkaConsumer(bootstrap_servers=[kafka])
    try:
        with pytest.raises(Wrong) as refused:
            since_ms("2025-12-01", load(None), consumer, [place])
    finally:
        consumer.close()
    found = re.search(r"--from (\S+)\. With", str(refused.value))
    assert found is not None
    return round(datetime.fromisoformat(found[1] + "+00:00").timestamp() * 1000)


@pytest.mark.parametrize("first", FIRST_LEFT)
def test_the_date_is_behind_all_that_is_deleted_whatever_comes_first(kafka: str, first: str) -> None:
    records = [*map(event, DELETED), *FIRST_LEFT[first], *LEFT]
    assert told(kafka, first.replace(" ", "-"), records, len(DELETED)) == NEWEST_DELETED + HOUR + LATENESS


def test_where_nothing_is_left_it_is_now(kafka: str) -> None:
    before = time.time() * 1000
    assert before - 60_000 <= told(kafka, "nothing", list(map(event, DELETED)), len(DELETED)) <= time.time() * 1000 + 60_000
