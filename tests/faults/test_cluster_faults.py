"""Three brokers, one of them in trouble: leaders move, a broker is lost for good, the coordinator of a transaction dies. The numbers stay exact."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType, TransactionState
from kafka.errors import KafkaError, TransactionalIdNotFoundError
from kafka.structs import TopicPartition

from embedded.cluster import NODES, EmbeddedCluster
from embedded.kafka import EmbeddedKafka
from pipeline.topic_names import Topics
from pipeline.topics import wanted_topics
from tests.command_line import shopstream
from tests.faults.conftest import Build
from tests.faults.rig import PARTITIONS, Rig

BuildOnThree = Callable[[], Rig]


@pytest.fixture
def build_on_three(build: Build, cluster: EmbeddedCluster) -> Iterator[BuildOnThree]:
    """A pipeline whose topics have three replicas; a broker that the case has killed is started again after it. What a case that fails shows has the brokers' words."""
    yield lambda: build(bootstrap=cluster.bootstrap, replication=NODES)
    for number, node in cluster.nodes.items():
        print(
            f"node {number}:",
            *[line for line in node.log.read_text(errors="replace").splitlines() if not line.startswith("\t")][-80:],
            sep="\n",
        )
    for node in cluster.nodes.values():
        node.thaw()
        if not node.bootstrap:
            node.start()


@pytest.fixture
def admin(cluster: EmbeddedCluster) -> Iterator[KafkaAdminClient]:
    """A client that looks every second who is in the cluster: what it learned while a node was frozen it would believe for five minutes."""
    client = KafkaAdminClient(bootstrap_servers=cluster.bootstrap.split(","), metadata_max_age_ms=1000)
    yield client
    client.close()


def leaders(admin: KafkaAdminClient, topics: list[str]) -> dict[TopicPartition, int]:
    """The node that leads each partition of the topics; -1 without one."""
    return {
        TopicPartition(topic["name"], found["partition_index"]): found["leader_id"]
        for topic in admin.describe_topics(topics)
        for found in topic["partitions"]
    }


def move_leaders(admin: KafkaAdminClient, rig: Rig, by: int) -> None:
    """Every partition's leader to the node `by` further on."""
    lead(admin, rig, {tp: (leader + by - 1) % NODES + 1 for tp, leader in leaders(admin, list(wanted_topics(rig.topics))).items()})


def lead(admin: KafkaAdminClient, rig: Rig, wanted: dict[TopicPartition, int]) -> None:
    """Each partition by this node: another order of its replicas, then an election of the preferred one."""
    order = {tp: [leader, *(n for n in range(1, NODES + 1) if n != leader)] for tp, leader in wanted.items()}
    assert set(admin.alter_partition_reassignments(order).values()) == {None}
    rig.until(lambda: not admin.list_partition_reassignments(), 30, "the replicas are reordered")
    partitions: dict[str, list[int]] = {}
    for tp in wanted:
        partitions.setdefault(tp.topic, []).append(tp.partition)
    admin.elect_leaders(0, partitions)
    rig.until(lambda: leaders(admin, list(partitions)).items() >= wanted.items(), 30, "the leaders have moved")


def wait_until_led_without(admin: KafkaAdminClient, rig: Rig, lost: EmbeddedKafka) -> None:
    """Until the cluster has noticed the loss."""
    assert lost.place is not None
    number = lost.place.number

    def led() -> bool:
        try:
            return not {number, -1} & set(leaders(admin, list(wanted_topics(rig.topics))).values())
        except KafkaError:
            return False  # the client asked the one that is gone

    rig.until(led, 30, f"others lead what node {number} did")


def coordinators(admin: KafkaAdminClient, rig: Rig) -> list[int]:
    """The nodes that end the transactions of the partitions: of those that are open or being ended, if there are any."""
    found = []
    for number in range(PARTITIONS):
        with contextlib.suppress(TransactionalIdNotFoundError):  # not taken over yet
            found += admin.describe_transactions([f"{rig.topics.app_id}-{number}"]).values()
    busy = [one for one in found if one.state in (TransactionState.ONGOING, TransactionState.PREPARE_COMMIT)]
    return [one.coordinator_id for one in busy or found]


def coordinated(admin: KafkaAdminClient, rig: Rig) -> list[TopicPartition]:
    """The partitions of the coordinators' log, which the first question after a coordinator makes."""
    with contextlib.suppress(KafkaError):
        admin.describe_transactions([f"{rig.topics.app_id}-0"])
    return list(leaders(admin, ["__transaction_state"]))


def states(admin: KafkaAdminClient, nodes: list[int], rig: Rig) -> dict[str, TransactionState]:
    """Of the newest transaction of each transactional id that these nodes coordinate; of none while one of them does not answer."""
    try:
        found = admin.list_transactions(broker_ids=nodes)
    except KafkaError:
        return {}
    return {t.transactional_id: t.state for of_node in found.values() for t in of_node if t.transactional_id.startswith(rig.name)}


def test_leaders_move_while_events_are_applied(build_on_three: BuildOnThree, admin: KafkaAdminClient) -> None:
    rig = build_on_three()
    workers = [rig.start(), rig.start()]
    rig.produce(0.6)
    rig.while_applying()
    for by in (1, 2):
        move_leaders(admin, rig, by)
    rig.produce_aside(1)
    rig.finish(lived=workers)


def test_broker_is_lost_for_good(build_on_three: BuildOnThree, admin: KafkaAdminClient, cluster: EmbeddedCluster) -> None:
    rig = build_on_three()
    workers = [rig.start(), rig.start()]
    rig.produce(0.6)
    rig.while_applying()
    lost = cluster.nodes[rig.random.randint(1, NODES)]
    lost.kill()
    wait_until_led_without(admin, rig, lost)
    rig.produce_aside(1)
    rig.finish(lived=workers)
    assert not lost.bootstrap


def test_coordinator_dies_before_the_end_of_a_transaction(
    build_on_three: BuildOnThree, admin: KafkaAdminClient, cluster: EmbeddedCluster
) -> None:
    rig = build_on_three()
    worker = rig.start(SHOPSTREAM_FAULT=f"in_transaction:{rig.random.randint(1, 4)}:stop")
    rig.produce(0.6)
    rig.wait_until_frozen(worker)
    coordinator = cluster.nodes[rig.random.choice(coordinators(admin, rig))]
    coordinator.kill()
    worker.send_signal(signal.SIGCONT)
    time.sleep(rig.random.uniform(0, 3))
    coordinator.start()
    rig.produce_aside(1)
    rig.settle()
    assert worker.poll() is None, rig.log
    rig.stop_workers()
    rig.check()


def test_coordinator_dies_between_the_end_of_a_transaction_and_its_markers(
    build_on_three: BuildOnThree, admin: KafkaAdminClient, cluster: EmbeddedCluster
) -> None:
    """The leader of all that the transactions write to is frozen, so no marker can be written; once the end is on the coordinator's log, it is killed."""
    rig = build_on_three()
    coordinating, leading, reading = rig.random.sample(range(1, NODES + 1), NODES)
    rig.until(lambda: bool(coordinated(admin, rig)), 30, "there are coordinators")
    written = (rig.topics.changelog, *rig.topics.rejected, rig.topics.rekeyed)
    lead(
        admin,
        rig,
        {TopicPartition(topic, p): leading for topic in written for p in range(PARTITIONS)}
        | {TopicPartition(topic, p): reading for topic in (rig.topics.clickstream, rig.topics.orders) for p in range(PARTITIONS)}
        | dict.fromkeys(coordinated(admin, rig), coordinating),
    )
    worker = rig.start(SHOPSTREAM_FAULT=f"in_transaction:{rig.random.randint(1, 4)}:stop")
    rig.produce(0.6)
    rig.wait_until_frozen(worker)
    promised: set[str] = set()

    def ended() -> bool:
        promised.update(name for name, state in states(beside, [coordinating], rig).items() if state is TransactionState.PREPARE_COMMIT)
        return bool(promised)

    with contextlib.closing(KafkaAdminClient(bootstrap_servers=cluster.nodes[coordinating].bootstrap)) as beside:
        cluster.nodes[leading].freeze()
        worker.send_signal(signal.SIGCONT)
        rig.until(ended, 30, "an end is on the coordinator's log")
        cluster.nodes[coordinating].kill()
    cluster.nodes[leading].thaw()

    def marked() -> bool:
        now = states(admin, [leading, reading], rig)
        return all(now.get(name, TransactionState.PREPARE_COMMIT) is not TransactionState.PREPARE_COMMIT for name in promised)

    rig.until(marked, 60, "another coordinator has written the markers")
    cluster.nodes[coordinating].start()
    assert worker.poll() is None, rig.log
    worker.kill()  # who comes after it reads what was promised to it
    rig.start()
    rig.produce_aside(1)
    rig.finish()


def test_topics_command_makes_topics_that_outlive_a_broker(cluster: EmbeddedCluster, admin: KafkaAdminClient) -> None:
    said = shopstream(
        "topics",
        SHOPSTREAM_BROKER=cluster.bootstrap,
        SHOPSTREAM_APP_ID="durable",
        SHOPSTREAM_CLICKSTREAM_TOPIC="durable.clickstream",
        SHOPSTREAM_ORDERS_TOPIC="durable.orders",
        SHOPSTREAM_REPLICATION_FACTOR="3",
        SHOPSTREAM_MIN_INSYNC_REPLICAS="2",
    )
    assert said.code == 0, said
    topics = list(wanted_topics(Topics("durable.clickstream", "durable.orders", "durable")))
    found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic) for topic in topics], config_filter="all")
    assert [of["min.insync.replicas"]["value"] for by_name in found.values() for of in by_name.values()] == ["2"] * len(topics)
    assert {len(p["replica_nodes"]) for t in admin.describe_topics(topics) for p in t["partitions"]} == {NODES}
