"""Records to Kafka, flat out: key = user, Kafka's own partitioner, the record's timestamp is the time of sending (event time is in the event).

`shopstream run` calls it with what `pipeline.files` reads; `pipeline.resumable` and the demo send their own way with `send`.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import aiokafka
import numpy as np

from pipeline.files import Keyed
from pipeline.tables.hashes import murmur2_partitions, text_rows

CHUNK = 20_000
BATCH_BYTES = 1 << 20
LARGEST_VALUE = 4 << 20
"""A longer record is cut here: far past what the worker takes, so it is rejected as too large all the same, and Kafka carries it."""


async def replay(
    client: dict[str, Any], records: Iterable[Keyed], topic_of: dict[str, str], partitions: int, progress: Callable[[int, int], None]
) -> int:
    """Send all records, in their order within a partition; how many. `progress` hears records and bytes of each step.

    `client`: aiokafka's bootstrap_servers and security arguments. `topic_of`: topic by topic kind.
    """
    sending = new_producer(client)
    await sending.start()
    sent, source = 0, iter(records)
    try:
        while chunk := list(islice(source, CHUNK)):
            await send(sending, chunk, topic_of, partitions)
            sent += len(chunk)
            progress(len(chunk), sum(len(record.value) for record in chunk))
    finally:
        await sending.stop()
    return sent


def new_producer(client: dict[str, Any], transactional_id: str | None = None) -> Any:
    """aiokafka's producer; idempotent, so that a request sent again doubles nothing."""
    transactions = {"transactional_id": transactional_id} if transactional_id else {"enable_idempotence": True}
    return aiokafka.AIOKafkaProducer(
        **client, **transactions, max_batch_size=BATCH_BYTES, max_request_size=LARGEST_VALUE + BATCH_BYTES, acks="all"
    )


async def send(producer: Any, records: list[Keyed], topic_of: dict[str, str], partitions: int) -> None:
    """Send them and wait until Kafka has all. Raises aiokafka's KafkaError."""
    waiting: list[Any] = []
    try:
        for (topic, partition), run in _by_partition(records, partitions).items():
            await _send(producer, topic_of[topic], partition, run, waiting)
    finally:  # every outcome is looked at, or asyncio complains
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def _by_partition(chunk: list[Keyed], partitions: int) -> dict[tuple[str, int], list[Keyed]]:
    targets = np.empty(len(chunk), np.int32)
    murmur2_partitions(*text_rows([record.key or "" for record in chunk]), partitions, targets)
    runs: dict[tuple[str, int], list[Keyed]] = defaultdict(list)
    for record, partition in zip(chunk, targets.tolist(), strict=True):
        runs[record.topic, partition].append(record)
    return runs


async def _send(producer: Any, topic: str, partition: int, records: list[Keyed], waiting: list[Any]) -> None:
    """`waiting` gets the futures of what is on its way."""
    now = int(time.time() * 1000)
    batch = producer.create_batch()
    for record in records:
        key = record.key.encode() if record.key else None
        value = record.value[:LARGEST_VALUE]
        if batch.append(key=key, value=value, timestamp=now) is not None:
            continue
        if batch.record_count():
            waiting.append(await _send_batch(producer, batch, topic, partition))
            batch = producer.create_batch()
        if batch.append(key=key, value=value, timestamp=now) is None:  # larger than a batch: alone
            waiting.append(await producer.send(topic, value, key, partition))
    if batch.record_count():
        waiting.append(await _send_batch(producer, batch, topic, partition))


async def _send_batch(producer: Any, batch: Any, topic: str, partition: int) -> Any:
    batch.close()
    return await producer.send_batch(batch, topic, partition=partition)
