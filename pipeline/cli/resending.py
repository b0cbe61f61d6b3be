"""What `shopstream rejects` asks of Kafka: rejected records read again where they came from, and sent back there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError

from pipeline.cli.clients import Failed
from pipeline.reports.rejects import Reject
from pipeline.topic_names import LARGEST_MESSAGE
from pipeline.topics import connect, partition_counts

SEND_SECONDS = 30
SENT_AT_ONCE = 500
READ_SECONDS = 30


def read_again(client: dict[str, Any], rejects: list[Reject]) -> tuple[list[Reject], int]:
    """The rejects with key and bytes as Kafka has them, in their order, and how many of them it no longer holds. Raises Failed."""
    _check_partitions(client, rejects)
    consumer = None
    try:
        consumer = KafkaConsumer(**client, enable_auto_commit=False, max_partition_fetch_bytes=1)  # a batch at a time
        places = {TopicPartition(reject.topic, reject.partition) for reject in rejects}
        held = {tp: _read(consumer, tp, sorted({r.offset for r in rejects if tp == (r.topic, r.partition)})) for tp in places}
    except (KafkaError, OSError, ValueError) as error:
        raise Failed(f"Kafka can't be read: {error!r}. Check the broker's address and the rights of the user.") from None
    finally:
        if consumer is not None:
            consumer.close()
    found = [(reject, record) for reject in rejects if (record := held[TopicPartition(reject.topic, reject.partition)].get(reject.offset))]
    return [replace(reject, key=key, raw=raw, size=len(raw or b"")) for reject, (key, raw) in found], len(rejects) - len(found)


def _read(consumer: Any, tp: TopicPartition, offsets: list[int]) -> dict[int, tuple[bytes | None, bytes | None]]:
    """Key and value of the records at these offsets, without those that are not there any more."""
    consumer.assign([tp])
    held = range(consumer.beginning_offsets([tp])[tp], consumer.end_offsets([tp])[tp])
    found = {}
    for offset in offsets:
        if offset not in held:
            continue
        consumer.seek(tp, offset)
        records = consumer.poll(READ_SECONDS * 1000, max_records=1).get(tp)
        if not records:
            raise OSError(f"no answer within {READ_SECONDS} s")
        if records[0].offset == offset:
            found[offset] = records[0].key, records[0].value
    return found


def send(client: dict[str, Any], rejects: list[Reject]) -> int:
    """Every record to its topic partition, acknowledged by all replicas; how many. Raises Failed, which says how many were sent before."""
    _check_partitions(client, rejects)
    sent = 0
    producer = None
    try:
        producer = KafkaProducer(**client, acks="all", max_block_ms=SEND_SECONDS * 1000, max_request_size=LARGEST_MESSAGE)
        for at in range(0, len(rejects), SENT_AT_ONCE):
            futures = [producer.send(r.topic, r.raw, key=r.key or None, partition=r.partition) for r in rejects[at : at + SENT_AT_ONCE]]
            producer.flush(SEND_SECONDS)
            for future in futures:
                future.get(timeout=SEND_SECONDS)
                sent += 1
    except (KafkaError, OSError, ValueError) as error:
        raise Failed(f"sent {sent:,} of {len(rejects):,} records, then Kafka refused: {error!r}. Doing it again is harmless.") from None
    finally:
        if producer is not None:
            producer.close(5)
    return sent


def _check_partitions(client: dict[str, Any], rejects: list[Reject]) -> None:
    admin = connect(client)
    try:
        counts = partition_counts(admin, sorted({reject.topic for reject in rejects}))
    except KafkaError as error:
        raise Failed(f"Kafka refused: {error}. Check the broker's address and the rights of the user.") from None
    finally:
        admin.close()
    for reject in rejects:
        if reject.partition >= counts[reject.topic]:
            raise Failed(
                f"{reject.topic} has {counts[reject.topic]} partitions, a reject came from partition {reject.partition}: is it the right broker "
                "(SHOPSTREAM_BROKER)?"
            )
