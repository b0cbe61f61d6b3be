"""Topics and groups emptied, deleted or changed under the workers: they go on exactly, or stop with a clear word. Never silent, never stuck."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from pipeline.topics import ensure_topics
from tests.faults.conftest import Build
from tests.faults.rig import PARTITIONS, Rig


def admin(rig: Rig) -> KafkaAdminClient:
    return KafkaAdminClient(bootstrap_servers=[rig.bootstrap])


def half_way_and_stopped(rig: Rig) -> None:
    """60% produced, some of it applied in every partition, no worker running."""
    worker = rig.start()
    rig.produce(0.6)
    rig.while_applying(everywhere=True)
    worker.terminate()
    assert rig.exit_code(worker, 90) == 0, rig.log


def test_consumer_group_is_deleted(build: Build) -> None:
    rig = build()
    half_way_and_stopped(rig)
    client = admin(rig)
    rig.until(lambda: _deleted(client, rig.topics.app_id), 30, "the group is deleted")
    client.close()
    rig.start()
    rig.produce_aside(1)
    rig.finish()


def _deleted(client: KafkaAdminClient, group: str) -> bool:
    try:
        client.delete_groups([group])
    except Exception:
        return False
    return True


def test_session_shorter_than_the_broker_allows_stops_the_worker(build: Build) -> None:
    rig = build()
    worker = rig.start(SHOPSTREAM_SESSION_SECONDS="2")
    assert rig.exit_code(worker) == 1, rig.log
    assert "Raise SHOPSTREAM_SESSION_SECONDS (6 is allowed everywhere), or set group.min.session.timeout.ms" in rig.log


def test_events_deleted_by_retention_before_they_were_read_stop_the_worker(build: Build) -> None:
    rig = build()
    half_way_and_stopped(rig)
    rig.produce(0.9)
    delete_all_records(rig, rig.topics.clickstream, range(PARTITIONS))
    worker = rig.start()
    assert rig.exit_code(worker) == 1, rig.log
    assert "were deleted by the topic's retention before they were read" in rig.log
    assert "SHOPSTREAM_ACCEPT_DELETED_EVENTS" in rig.log
    before = rig.applied()
    rig.start(SHOPSTREAM_ACCEPT_DELETED_EVENTS="true")
    rig.produce(1)
    rig.settle()
    rig.stop_workers()
    assert rig.applied() > before, "it goes on with what is there"


def delete_all_records(rig: Rig, topic: str, partitions: Iterable[int]) -> None:
    consumer = KafkaConsumer(bootstrap_servers=[rig.bootstrap])
    ends = consumer.end_offsets([TopicPartition(topic, p) for p in partitions])
    consumer.close()
    assert all(ends.values()), f"nothing to delete in one of them: {ends}"
    client = admin(rig)
    client.delete_records(ends)
    client.close()


@pytest.mark.parametrize("partitions", [range(PARTITIONS), [0]], ids=["all", "one"])
def test_emptied_changelog_stops_the_worker(build: Build, partitions: Iterable[int]) -> None:
    rig = build()
    half_way_and_stopped(rig)
    delete_all_records(rig, rig.topics.changelog, partitions)
    worker = rig.start()
    assert rig.exit_code(worker) == 1, rig.log
    assert "all were deleted. The state is gone" in rig.log
    assert "shopstream rebuild --from earliest" in rig.log


def test_deleted_changelog_stops_the_worker(build: Build) -> None:
    rig = build()
    half_way_and_stopped(rig)
    client = admin(rig)
    client.delete_topics([rig.topics.changelog])
    rig.until(lambda: rig.topics.changelog not in client.list_topics(), 30, "the topic is deleted")
    client.close()
    worker = rig.start()
    assert rig.exit_code(worker) == 1, rig.log
    assert f"there is no topic {rig.topics.changelog}" in rig.log
    ensure_topics({"bootstrap_servers": [rig.bootstrap]}, rig.topics, PARTITIONS)
    worker = rig.start()
    assert rig.exit_code(worker) == 1, rig.log
    assert "has no changelog" in rig.log


def test_added_partitions_stop_the_worker(build: Build) -> None:
    rig = build()
    running = rig.start()
    rig.produce(0.5)
    rig.while_applying()
    client = admin(rig)
    names = (*rig.topics.sources, *rig.topics.rejected, rig.topics.changelog)
    client.create_partitions(dict.fromkeys(names, PARTITIONS + 1))
    client.close()
    assert rig.exit_code(running, 90) == 1, rig.log  # it has looked again
    assert "users have moved between partitions" in rig.log
    again = rig.start()
    assert rig.exit_code(again) == 1, rig.log
    assert rig.log.count("users have moved between partitions") > 1


def test_dead_letter_topic_is_gone_and_comes_back(build: Build) -> None:
    rig = build()
    rig.start()
    rig.produce(0.5)
    rig.while_applying()
    rig.settle()
    kept = rig.dead_letters()
    client = admin(rig)
    client.delete_topics(list(rig.topics.rejected))
    rig.until(lambda: not set(rig.topics.rejected) & set(client.list_topics()), 30, "the topics are deleted")
    rig.produce(1)
    rig.until(lambda: "its transaction failed" in rig.log, 100, "the worker says that it can't go on")
    ensure_topics({"bootstrap_servers": [rig.bootstrap]}, rig.topics, PARTITIONS)
    rig.settle()
    rig.stop_workers()
    assert rig.dead_letters() + kept == rig.day.bad
