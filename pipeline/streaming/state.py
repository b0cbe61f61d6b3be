"""A partition's state as its changelog's records: taken out, put into an empty changelog in one transaction, closed for good.

For `shopstream backup` and `restore`, and for a revision that succeeds another one (`streaming.succession`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from pipeline.changelog import SEALED, ChangelogError
from pipeline.partition import End, OutRecord, end_of
from pipeline.streaming.changelog import Records, Recovery, TransactionRefused, fence, grew, read_to_end, stop_producer, transact
from pipeline.topic_names import Topics

KAFKA_TROUBLE = (KafkaError, TransactionRefused, TimeoutError, OSError)
"""What the calls here raise when Kafka is away or refuses."""


async def read_state(client: dict[str, Any], topics: Topics, number: int) -> tuple[Records, int]:
    """Committed records of the partition's changelog and the offset of its end.

    Its transactional id is fenced first: a transaction that a killed worker left open is settled, and a zombie can't commit any more.
    """
    await stop_producer(await fence(client, f"{topics.app_id}-{number}"))
    recovery = Recovery()
    records = await read_to_end(client, TopicPartition(topics.changelog, number), recovery)
    return records, recovery.end


async def write_state(client: dict[str, Any], topics: Topics, number: int, records: Records) -> None:
    """All of it or nothing."""
    producer = await fence(client, f"{topics.app_id}-{number}")
    try:
        await transact(producer, [OutRecord(topics.changelog, number, key, value or b"", []) for key, value in records], topics.changelog)
    finally:
        await stop_producer(producer)


async def seal(client: dict[str, Any], topics: Topics, number: int, successor: int) -> End | None:
    """Close the changelog for the revision `successor`: whoever takes the partition over from it finds that out, and a present owner can't commit.

    Returns where it ended; None when there is no changelog or nothing of use in it. May be repeated.
    """
    if number >= await _partitions(client, topics.changelog):
        return None
    producer = await fence(client, f"{topics.app_id}-{number}")
    try:
        try:
            records = await read_to_end(client, TopicPartition(topics.changelog, number), Recovery())
            sealed = bool(records) and records[-1][0] == SEALED
            end = end_of(records[:-1] if sealed else records)
        except ChangelogError:  # it is lost, and its owner can't go on either
            sealed, end = False, None
        if not sealed:
            await transact(producer, [OutRecord(topics.changelog, number, SEALED, str(successor).encode(), [])], topics.changelog)
        return end
    finally:
        await stop_producer(producer)


async def _partitions(client: dict[str, Any], topic: str) -> int:
    """0 for a topic that is not there."""
    admin = AIOKafkaAdminClient(**client)
    try:
        await admin.start()
        if topic not in await admin.list_topics():
            return 0
        return len((await admin.describe_topics([topic]))[0]["partitions"])
    finally:
        await admin.close()


async def grown(client: dict[str, Any], topics: Topics, ends: list[int]) -> list[int]:
    """Partitions whose changelog has been written to since it ended at `ends`."""
    return [number for number, end in enumerate(ends) if await grew(client, TopicPartition(topics.changelog, number), end)]


async def end_offsets(client: dict[str, Any], topic_partitions: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
    """Where each (topic, partition) ends."""
    consumer = aiokafka.AIOKafkaConsumer(**client, enable_auto_commit=False)
    try:
        await consumer.start()
        found = await consumer.end_offsets([TopicPartition(*tp) for tp in topic_partitions])
    finally:
        await consumer.stop()
    return {(tp.topic, tp.partition): end for tp, end in found.items()}
