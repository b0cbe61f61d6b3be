"""`shopstream topics` on a real Kafka: creates what is missing, checks what is there, refuses what would tear partitions apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType

from embedded.kafka import EmbeddedKafka
from pipeline.topic_names import Topics
from pipeline.topics import TopicsError, describe, ensure_topics, wanted_topics

Client = dict[str, Any]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with EmbeddedKafka(quiet=True) as broker:
        yield {"bootstrap_servers": [broker.bootstrap]}


@pytest.fixture
def topics() -> Topics:
    name = uuid4().hex[:8]
    return Topics(f"{name}.clickstream", f"{name}.orders", name)


def make(client: Client, name: str, partitions: int, **configs: str) -> None:
    admin = KafkaAdminClient(**client)
    admin.create_topics(
        {name: {"num_partitions": partitions, "replication_factor": 1, "configs": {k.replace("_", "."): v for k, v in configs.items()}}},
        wait_for_metadata=True,
    )
    admin.close()


def test_all_topics_are_created_alike(client: Client, topics: Topics) -> None:
    outcome = ensure_topics(client, topics, 3)
    assert outcome == dict.fromkeys(wanted_topics(topics), "created")
    assert describe(client, topics) == dict.fromkeys(wanted_topics(topics), 3)


def test_the_changelog_never_forgets(client: Client, topics: Topics) -> None:
    ensure_topics(client, topics, 1)
    admin = KafkaAdminClient(**client)
    found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topics.changelog)], config_filter="all")
    admin.close()
    (configs,) = (of for by_name in found.values() for of in by_name.values())
    assert {k: configs[k]["value"] for k in ("cleanup.policy", "retention.ms")} == {"cleanup.policy": "delete", "retention.ms": "-1"}


def test_a_second_call_changes_nothing(client: Client, topics: Topics) -> None:
    ensure_topics(client, topics, 2)
    assert set(ensure_topics(client, topics, 2).values()) == {"present"}


def test_only_what_is_missing_is_created(client: Client, topics: Topics) -> None:
    make(client, topics.clickstream, 2)
    outcome = ensure_topics(client, topics, 2)
    assert outcome.pop(topics.clickstream) == "present"
    assert set(outcome.values()) == {"created"}


def test_another_partition_count_than_asked_is_refused(client: Client, topics: Topics) -> None:
    ensure_topics(client, topics, 2)
    with pytest.raises(TopicsError, match="--partitions 2"):
        ensure_topics(client, topics, 4)


def test_sources_that_are_not_copartitioned_are_refused_and_nothing_is_created(client: Client, topics: Topics) -> None:
    make(client, topics.clickstream, 2)
    make(client, topics.orders, 3)
    with pytest.raises(TopicsError, match="same number of partitions"):
        ensure_topics(client, topics, 2)
    assert describe(client, topics)[topics.changelog] == 0


def test_an_internal_topic_of_another_count_is_refused(client: Client, topics: Topics) -> None:
    make(client, topics.changelog, 5)
    make(client, topics.clickstream, 2)
    with pytest.raises(TopicsError, match=r"changelog has 5"):
        ensure_topics(client, topics, 2)


def test_a_changelog_that_would_lose_state_is_refused(client: Client, topics: Topics) -> None:
    make(client, topics.changelog, 2, cleanup_policy="compact")
    with pytest.raises(TopicsError, match=r"cleanup\.policy=delete"):
        ensure_topics(client, topics, 2)


def test_no_broker_is_said_with_the_address(topics: Topics) -> None:
    with pytest.raises(TopicsError, match=r"127\.0\.0\.1:1"):
        ensure_topics({"bootstrap_servers": ["127.0.0.1:1"], "bootstrap_timeout_ms": 1000}, topics, 2)
