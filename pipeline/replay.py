"""Files to Kafka, flat out: key = user, Kafka's own partitioner, the record's timestamp is the time of sending (event time is in the event)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import aiokafka
import numpy as np

from pipeline.files import Keyed
from pipeline.tables.kernel import murmur2_partitions, text_rows

BATCH = 5000


async def replay(
    client: dict[str, Any], records: Iterable[Keyed], topic_of: dict[str, str], partitions: int, progress: Callable[[int], None]
) -> int:
    """Send all records in order (within a partition); how many. `progress` hears the number of records of each step."""
    producer = aiokafka.AIOKafkaProducer(**client, max_batch_size=1 << 20, max_request_size=8 << 20, linger_ms=5, acks="all")
    await producer.start()
    sent, source = 0, iter(records)
    try:
        while chunk := list(islice(source, BATCH)):
            targets = np.empty(len(chunk), np.int32)
            murmur2_partitions(*text_rows([record.key or "" for record in chunk]), partitions, targets)
            for topic in dict.fromkeys(record.topic for record in chunk):
                for partition in range(partitions):
                    mine = [r for r, p in zip(chunk, targets.tolist(), strict=True) if p == partition and r.topic == topic]
                    await _send(producer, topic_of[topic], partition, mine)
            sent += len(chunk)
            progress(len(chunk))
        await producer.flush()
    finally:
        await producer.stop()
    return sent


async def _send(producer: Any, topic: str, partition: int, records: list[Keyed]) -> None:
    batch = producer.create_batch()
    for record in records:
        key = record.key.encode(errors="surrogatepass") if record.key else None
        if batch.append(key=key, value=record.value, timestamp=None) is None:
            if batch.record_count():
                batch.close()
                await producer.send_batch(batch, topic, partition=partition)
                batch = producer.create_batch()
            if batch.append(key=key, value=record.value, timestamp=None) is None:  # larger than a batch: alone
                await producer.send(topic, record.value, key, partition)
    if batch.record_count():
        batch.close()
        await producer.send_batch(batch, topic, partition=partition)
