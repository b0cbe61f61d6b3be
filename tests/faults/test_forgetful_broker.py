"""What a broker does by its own clock: it ends transactions, forgets producers, compacts. Workers go on exactly, or stop with a clear word."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, TransactionState
from kafka.errors import TransactionalIdNotFoundError

from embedded.kafka import EmbeddedKafka, Place, free_ports
from pipeline.changelog import SNAPSHOT, Part
from tests.faults.conftest import Build
from tests.faults.rig import PARTITIONS, Rig

FORGETFUL = {
    "transactional.id.expiration.ms": "4000",
    "transaction.remove.expired.transaction.cleanup.interval.ms": "1000",
    "producer.id.expiration.ms": "4000",
    "producer.id.expiration.check.interval.ms": "1000",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
    "transaction.max.timeout.ms": "30000",
    "log.cleaner.backoff.ms": "500",
}


@pytest.fixture(scope="module")
def forgetful() -> Iterator[EmbeddedKafka]:
    """A broker that remembers nothing for long, and allows no transaction of a minute."""
    port, controller = free_ports(2)
    with EmbeddedKafka(quiet=True, place=Place(1, port, {1: controller}, FORGETFUL)) as broker:
        yield broker


@pytest.fixture
def build_forgetful(build: Build, forgetful: EmbeddedKafka) -> Build:
    return lambda: build(bootstrap=forgetful.bootstrap, settings={"SHOPSTREAM_TRANSACTION_SECONDS": "20"})


@pytest.fixture
def admin(forgetful: EmbeddedKafka) -> Iterator[KafkaAdminClient]:
    client = KafkaAdminClient(bootstrap_servers=[forgetful.bootstrap])
    yield client
    client.close()


def states(admin: KafkaAdminClient, rig: Rig) -> list[TransactionState]:
    """Of the partitions' transactional ids; without those that the broker does not know."""
    found = []
    for number in range(PARTITIONS):
        try:
            found += [one.state for one in admin.describe_transactions([f"{rig.topics.app_id}-{number}"]).values()]
        except TransactionalIdNotFoundError:
            continue
    return found


def test_transaction_that_outlives_its_timeout(build_forgetful: Build, admin: KafkaAdminClient) -> None:
    """Frozen in a transaction that the coordinator aborts meanwhile; woken, it asks for the commit."""
    rig = build_forgetful()
    point = f"in_transaction:{rig.random.randint(1, 4)}:stop"
    worker = rig.start(SHOPSTREAM_FAULT=point, SHOPSTREAM_TRANSACTION_SECONDS="3", SHOPSTREAM_SESSION_SECONDS="60")
    rig.produce(0.6)
    rig.wait_until_frozen(worker)
    rig.until(lambda: TransactionState.ONGOING not in states(admin, rig), 30, "the coordinator aborts it")
    worker.send_signal(signal.SIGCONT)
    rig.produce_aside(1)
    rig.settle()
    assert worker.poll() is None, rig.log
    assert "its transaction failed" in rig.log
    rig.stop_workers()
    rig.check()


def test_producer_ids_that_the_broker_has_forgotten(build_forgetful: Build, admin: KafkaAdminClient) -> None:
    rig = build_forgetful()
    worker = rig.start()
    rig.produce(0.5)
    rig.settle()
    rig.until(lambda: not states(admin, rig), 30, "the broker forgets the transactional ids")
    rig.produce(1)
    rig.settle()
    assert worker.poll() is None, rig.log
    assert "its transaction failed" in rig.log
    rig.stop_workers()
    rig.check()


def test_transaction_time_that_the_broker_does_not_allow_is_said_at_once(build_forgetful: Build) -> None:
    rig = build_forgetful()
    assert rig.exit_code(rig.start(SHOPSTREAM_TRANSACTION_SECONDS="60")) == 1, rig.log
    assert "lower SHOPSTREAM_TRANSACTION_SECONDS" in rig.log
    assert not re.search("Traceback|trying again", rig.log)


def test_compacted_changelog_stops_the_worker(build_forgetful: Build, admin: KafkaAdminClient) -> None:
    """Of many deltas compaction keeps the newest. Refused as long as it is set, and found in what it has done."""
    rig = build_forgetful()
    worker = rig.start()
    rig.produce(0.6)
    rig.settle()
    configure(admin, rig.topics.changelog, {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.0", "segment.ms": "500"})
    for part in range(1, 21):  # a segment ends with the first delta after its time
        rig.produce(0.6 + part / 100)
        rig.settle()
        if any(lacks_a_delta(rig, number) for number in range(PARTITIONS)):
            break
    worker.terminate()
    assert rig.exit_code(worker, 90) == 0, rig.log
    assert any(lacks_a_delta(rig, number) for number in range(PARTITIONS))
    worker = rig.start()
    assert rig.exit_code(worker) == 1, rig.log
    assert "has cleanup.policy=compact: set cleanup.policy=delete" in rig.log
    configure(admin, rig.topics.changelog, {"cleanup.policy": "delete"})
    worker = rig.start()
    assert rig.exit_code(worker) == 1, rig.log
    assert re.search(r"changelog\[\d\]: flush .* is gone\. The state is gone: .*`shopstream rebuild --from earliest`", rig.log)


def configure(admin: KafkaAdminClient, topic: str, configs: dict[str, str]) -> None:
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, configs)])


def lacks_a_delta(rig: Rig, number: int) -> bool:
    """Whether the flushes from the newest snapshot on are not one after the other."""
    flushes: list[int] = []
    with closing(KafkaConsumer(bootstrap_servers=[rig.bootstrap], isolation_level="read_committed")) as consumer:
        tp = TopicPartition(rig.topics.changelog, number)
        consumer.assign([tp])
        consumer.seek_to_beginning(tp)
        end = consumer.end_offsets([tp])[tp]
        while consumer.position(tp) < end:
            for record in consumer.poll(timeout_ms=500).get(tp, []):
                flush = msgspec.msgpack.decode(record.value, type=Part).flush
                flushes = [flush] if record.key == SNAPSHOT else [*flushes, flush]
    return sorted(set(flushes)) != list(range(min(flushes), max(flushes) + 1))
