"""Kafka away, killed, emptied or changed under the workers: they wait, go on exactly, or stop with a clear word. Never silent, never stuck."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from embedded.kafka import EmbeddedKafka
from pipeline.topics import ensure_topics
from tests.clickhouse_server import free_port
from tests.faults.conftest import Build
from tests.faults.rig import PARTITIONS, Rig


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[EmbeddedKafka]:
    """A broker of the case's own, whose data outlive it."""
    with EmbeddedKafka(tmp_path / "kafka", quiet=True) as broker:
        yield broker


def admin(rig: Rig) -> KafkaAdminClient:
    return KafkaAdminClient(bootstrap_servers=[rig.bootstrap])


def bring_back(rig: Rig, broker: EmbeddedKafka) -> None:
    """Start the broker again and wait until it knows its topics: the producer of the test itself has no patience."""
    broker.start()
    consumer = KafkaConsumer(bootstrap_servers=[rig.bootstrap])
    topics = (rig.topics.clickstream, rig.topics.orders)
    rig.until(lambda: all(len(consumer.partitions_for_topic(t) or ()) == PARTITIONS for t in topics), 30, "the broker knows its topics")
    rig.until(
        lambda: len(consumer.end_offsets([TopicPartition(t, p) for t in topics for p in range(PARTITIONS)])) > 0, 30, "it serves them"
    )
    consumer.close()


def half_way_and_stopped(rig: Rig) -> None:
    """60% produced, some of it applied, no worker running."""
    worker = rig.start()
    rig.produce(0.6)
    rig.while_applying()
    worker.terminate()
    assert worker.wait(90) == 0, rig.log


@pytest.mark.parametrize("seconds", [2, 62])  # 62: longer than everything that waits a minute
def test_broker_killed_and_started_again(build: Build, fragile: EmbeddedKafka, seconds: int) -> None:
    rig = build(bootstrap=fragile.bootstrap)
    port = free_port()
    workers = [rig.start(SHOPSTREAM_METRICS_PORT=str(port), SHOPSTREAM_STUCK_SECONDS="8"), rig.start()]
    rig.produce(0.6)
    rig.while_applying()
    fragile.kill()
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        time.sleep(2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            assert answer.status == 200, "an outage is not being stuck"
    bring_back(rig, fragile)
    rig.produce_aside(1)
    rig.settle()
    assert all(worker.poll() is None for worker in workers), rig.log
    rig.stop_workers()
    rig.check()
    assert rig.log.count("\n") < 600, "an outage does not flood the log"


def test_worker_ended_while_the_broker_is_away(build: Build, fragile: EmbeddedKafka) -> None:
    rig = build(bootstrap=fragile.bootstrap)
    worker = rig.start()
    rig.produce(0.6)
    rig.while_applying()
    fragile.kill()
    time.sleep(1)
    worker.terminate()
    assert worker.wait(60) == 0, rig.log
    bring_back(rig, fragile)
    rig.start()
    rig.produce_aside(1)
    rig.finish()


@pytest.fixture
def on_a_small_disk(tmp_path: Path) -> Iterator[EmbeddedKafka]:
    """A broker whose log has a file system of 256 MiB to itself."""
    logs = tmp_path / "kafka" / "logs"
    logs.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", logs], check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a full disk needs a file system of its own, and mounting one is not allowed here: {mounted.stderr.strip()}")
    try:
        with EmbeddedKafka(tmp_path / "kafka", quiet=True) as broker:
            yield broker
    finally:
        subprocess.run(["umount", logs], check=True)


def test_full_disk_of_the_broker_ends_it_and_nothing_else(build: Build, on_a_small_disk: EmbeddedKafka) -> None:
    rig = build(bootstrap=on_a_small_disk.bootstrap)
    rig.produce(0.6)
    workers = [rig.start(), rig.start()]
    rig.while_applying()
    ballast = on_a_small_disk.folder / "logs" / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):  # ends with: no space left on device
        while file.write(bytes(1 << 16)):
            pass
    rig.until(lambda: not on_a_small_disk.runs, 60, "the broker ends itself")
    ballast.unlink()
    bring_back(rig, on_a_small_disk)
    rig.produce_aside(1)
    rig.settle()
    assert all(worker.poll() is None for worker in workers), rig.log
    rig.stop_workers()
    rig.check()


def test_broker_is_not_there_yet(build: Build, fragile: EmbeddedKafka) -> None:
    rig = build(bootstrap=fragile.bootstrap)
    fragile.kill()
    rig.start()
    rig.until(lambda: "can't be reached, trying again" in rig.log, 60, "the worker says what it waits for")
    bring_back(rig, fragile)
    rig.produce(1)
    rig.finish()


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
    assert worker.wait(60) == 1, rig.log
    assert "Raise SHOPSTREAM_SESSION_SECONDS (6 is allowed everywhere), or set group.min.session.timeout.ms" in rig.log


def test_events_deleted_by_retention_before_they_were_read_stop_the_worker(build: Build) -> None:
    rig = build()
    half_way_and_stopped(rig)
    rig.produce(0.9)
    delete_all_records(rig, rig.topics.clickstream, range(PARTITIONS))
    worker = rig.start()
    assert worker.wait(60) == 1, rig.log
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
    client = admin(rig)
    client.delete_records({tp: end for tp, end in ends.items() if end})
    client.close()


@pytest.mark.parametrize("partitions", [range(PARTITIONS), [0]], ids=["all", "one"])
def test_emptied_changelog_stops_the_worker(build: Build, partitions: Iterable[int]) -> None:
    rig = build()
    half_way_and_stopped(rig)
    delete_all_records(rig, rig.topics.changelog, partitions)
    worker = rig.start()
    assert worker.wait(60) == 1, rig.log
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
    assert worker.wait(60) == 1, rig.log
    assert f"there is no topic {rig.topics.changelog}" in rig.log
    ensure_topics({"bootstrap_servers": [rig.bootstrap]}, rig.topics, PARTITIONS)
    worker = rig.start()
    assert worker.wait(60) == 1, rig.log
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
    running.terminate()
    assert running.wait(90) in (0, 1), rig.log
    worker = rig.start()
    assert worker.wait(60) == 1, rig.log
    assert "users have moved between partitions" in rig.log


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
