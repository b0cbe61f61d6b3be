"""Topics of a pipeline: created, or checked when they are there. Uses kafka-python's admin client; called by the commands.

Partition p of every topic belongs together, so all have the same number of partitions, and it never changes without `shopstream rebuild`.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError, TopicAlreadyExistsError

from pipeline.topic_names import LARGEST_MESSAGE, Topics

KAFKA_PORT = 9092
KNOCK_SECONDS = 5.0
KEEPS_ALL = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
"""The changelog is the state: it must never lose a record by age, size or key."""


class TopicsError(Exception):
    """The topics are not as the pipeline needs them; the message says which and what to do."""


def wanted_topics(topics: Topics) -> dict[str, dict[str, str]]:
    """Every topic of the pipeline with its configuration."""
    large = {"max.message.bytes": str(LARGEST_MESSAGE)}
    return {
        topics.clickstream: large,
        topics.orders: large,
        topics.rekeyed: large,
        **dict.fromkeys(topics.rejected, large),
        topics.changelog: large | KEEPS_ALL,
    }


def connect(client: dict[str, Any]) -> Any:
    """An admin client; `client` has kafka-python's bootstrap_servers and security arguments. Raises TopicsError."""
    servers = ",".join(client["bootstrap_servers"])
    try:
        _knock(client["bootstrap_servers"], min(KNOCK_SECONDS, client.get("bootstrap_timeout_ms", 30_000) / 1000))
        return KafkaAdminClient(**client)
    except (KafkaError, OSError, ValueError) as error:
        raise TopicsError(f"no Kafka answers at {servers} ({error!r}). Check SHOPSTREAM_BROKER and the security settings.") from error


def _knock(servers: list[str], seconds: float) -> None:
    """Raises OSError or ValueError when nothing listens at any of the addresses: the client itself would go on trying for half a minute."""
    trouble: Exception = ValueError("no address")
    for server in servers:
        try:
            parts = urlsplit(f"//{server}")
            socket.create_connection((parts.hostname or "", parts.port or KAFKA_PORT), seconds).close()
            return
        except (OSError, ValueError) as error:
            trouble = error
    raise trouble


def ensure_topics(
    client: dict[str, Any], topics: Topics, partitions: int, replication_factor: int = 1, min_insync_replicas: int = 1
) -> dict[str, str]:
    """Create what is missing; what became of each ('created' or 'present'). Raises TopicsError rather than let partitions fall apart."""
    admin = connect(client)
    try:
        counts = partition_counts(admin, list(wanted_topics(topics)))
        present = {name: count for name, count in counts.items() if count}
        sources = {name: count for name, count in present.items() if name in topics.sources}
        if len(set(sources.values())) > 1:
            listed = ", ".join(f"{name}: {count}" for name, count in sources.items())
            raise TopicsError(
                f"the source topics need the same number of partitions, but have {listed}. Add partitions where they are missing; a changed number "
                "then needs `shopstream rebuild --from earliest`."
            )
        number = next(iter(sources.values()), partitions)
        wrong = {name: count for name, count in present.items() if count != number}
        if wrong:
            listed = ", ".join(f"{name} has {count}" for name, count in wrong.items())
            raise TopicsError(
                f"the topics need {number} partitions like the source topics, but {listed}. State belongs to a partition number: "
                "`shopstream rebuild --from earliest` goes over to a changed one."
            )
        if sources and number != partitions:
            raise TopicsError(
                f"the topics have {number} partitions, {partitions} are asked for: say --partitions {number}; to have more, add partitions to the source "
                "topics and run `shopstream rebuild --from earliest`."
            )
        _check_changelog(admin, topics.changelog, present)
        durable = {"min.insync.replicas": str(min_insync_replicas)}
        new = {
            name: {"num_partitions": number, "replication_factor": replication_factor, "configs": configs | durable}
            for name, configs in wanted_topics(topics).items()
            if name not in present
        }
        if new:
            admin.create_topics(new, wait_for_metadata=True)
        return {name: "present" if name in present else "created" for name in wanted_topics(topics)}
    except TopicAlreadyExistsError:
        return ensure_topics(
            client, topics, partitions, replication_factor, min_insync_replicas
        )  # another process was faster: check what it made
    except KafkaError as error:
        raise TopicsError(f"Kafka refused: {error}. Check the broker's address and the rights of the user.") from error
    finally:
        admin.close()


def ensure_compacted(client: dict[str, Any], name: str, replication_factor: int = 1, min_insync_replicas: int = 1) -> None:
    """A topic of one partition that keeps the newest record of each key. Raises TopicsError."""
    admin = connect(client)
    try:
        if not partition_counts(admin, [name])[name]:
            configs = {
                "cleanup.policy": "compact",
                "segment.bytes": str(16 << 20),  # only a closed segment is compacted
                "min.insync.replicas": str(min_insync_replicas),
            }
            admin.create_topics(
                {name: {"num_partitions": 1, "replication_factor": replication_factor, "configs": configs}}, wait_for_metadata=True
            )
    except TopicAlreadyExistsError:
        return
    except KafkaError as error:
        raise TopicsError(f"Kafka refused to create {name}: {error}. Check the rights of the user.") from error
    finally:
        admin.close()


def partition_counts(admin: Any, names: list[str]) -> dict[str, int]:
    """Partitions of each topic, 0 for one that is not there."""
    there = set(admin.list_topics())
    counts = dict.fromkeys(names, 0)
    found = [name for name in names if name in there]
    if found:
        for described in admin.describe_topics(found):
            counts[described.get("topic") or described.get("name")] = len(described["partitions"])
    return counts


def delete_topics(client: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Delete those that are there; which."""
    admin = connect(client)
    try:
        if there := [name for name, count in partition_counts(admin, list(names)).items() if count]:
            admin.delete_topics(there)
        return there
    finally:
        admin.close()


def grow(client: dict[str, Any], names: Iterable[str], partitions: int) -> None:
    """Add partitions to those of the topics that are there and have fewer."""
    admin = connect(client)
    try:
        if short := {name: partitions for name, count in partition_counts(admin, list(names)).items() if 0 < count < partitions}:
            admin.create_partitions(short)
    finally:
        admin.close()


def members(admin: Any, group: str) -> int:
    """How many workers a consumer group has."""
    return len(admin.describe_groups([group]).get(group, {}).get("members") or [])


def describe(client: dict[str, Any], topics: Topics) -> dict[str, int]:
    """Partitions of each of the pipeline's topics, 0 for one that is not there. Raises TopicsError."""
    admin = connect(client)
    try:
        return partition_counts(admin, list(wanted_topics(topics)))
    finally:
        admin.close()


def _check_changelog(admin: Any, changelog: str, present: dict[str, int]) -> None:
    if changelog not in present:
        return
    found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, changelog)], config_filter="all")
    check_keeps_all(changelog, {key: data["value"] for by_name in found.values() for of in by_name.values() for key, data in of.items()})


def check_keeps_all(changelog: str, configs: Mapping[str, str]) -> None:
    """Raises TopicsError when the changelog of this configuration would forget something."""
    for key, needed in KEEPS_ALL.items():
        if configs.get(key, needed) != needed:
            raise TopicsError(
                f"{changelog} holds the state, but has {key}={configs[key]}: set {key}={needed}, or state will be lost at a restart."
            )
