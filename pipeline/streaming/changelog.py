"""The doors to one partition's changelog: the fenced producer that writes it, reading it to its end, deleting what a snapshot made unnecessary.

`streaming.owner` opens the doors; what the records say is `pipeline.changelog`'s business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import aiokafka
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.errors import InvalidTransactionTimeout
from aiokafka.structs import TopicPartition

from pipeline.changelog import REMEDY, ChangelogError
from pipeline.partition import OutRecord
from pipeline.streaming.faults import reach
from pipeline.topic_names import LARGEST_MESSAGE

log = logging.getLogger("shopstream.changelog")

TRANSACTION_SECONDS = 60.0
ANSWER_SECONDS = 60
REQUEST_SECONDS = 10
"""Of one request of a transaction, which is then sent again on a new connection. aiokafka's 40 s twice, on the two connections that are dead when a router
has forgotten them, would be more than a transaction has."""
STOP_SECONDS = 5
STALL_SECONDS = 60
POLL_MS = 50  # markers at the end are passed without a word: whether there is more to read is seen at the next poll


class TransactionRefused(Exception):
    """The broker takes no transactions from us as we are configured; the message says what to set."""


Records = list[tuple[bytes | None, bytes | None]]


READING = 0.1
"""Share of a restore's time that goes into reading; the rest goes into loading and replaying what was read."""


@dataclass(slots=True)
class Recovery:
    """How far the restore of a partition is; offsets of its changelog."""

    begin: int = 0
    end: int = 0
    position: int = 0
    applied: float = 0.0  # share of what was read, 0 to 1
    started: float = field(default_factory=time.monotonic)
    seconds: float | None = None  # once it is done
    source: str = ""  # what the state was made from, in words
    asks: bool = False  # the warehouse has to say whether the partition may begin anew

    @property
    def ratio(self) -> float:
        """Share done, 0 to 1."""
        if self.seconds is not None:
            return 1.0
        if not self.end:
            return 0.0  # the changelog's end is not known yet
        read = 1.0 if self.position >= self.end else (self.position - self.begin) / (self.end - self.begin)
        return READING * read + (1 - READING) * self.applied

    @property
    def elapsed(self) -> float:
        """Seconds that it took, so far while it goes on."""
        return time.monotonic() - self.started if self.seconds is None else self.seconds

    @property
    def remaining(self) -> float | None:
        """Seconds that it will take still, by what is done; None when that can't be said yet or it is over."""
        done = self.ratio
        return self.elapsed * (1 - done) / done if self.seconds is None and done else None

    def applying(self, share: float) -> None:
        """So much of what was read has been applied."""
        self.applied = share


async def fence(client: dict[str, Any], transactional_id: str, transaction_seconds: float = TRANSACTION_SECONDS) -> Any:
    """A started transactional producer: from now on the former owner can't commit, and its open transaction is settled.

    Kafka aborts what is open for longer than `transaction_seconds`. Raises TransactionRefused when that is more than it allows.
    """
    producer = aiokafka.AIOKafkaProducer(
        **client,
        transactional_id=transactional_id,
        transaction_timeout_ms=round(transaction_seconds * 1000),
        request_timeout_ms=REQUEST_SECONDS * 1000,
        max_request_size=LARGEST_MESSAGE,
        max_batch_size=1 << 20,
        acks="all",
    )
    try:
        await asyncio.wait_for(producer.start(), ANSWER_SECONDS)
    except InvalidTransactionTimeout:
        await stop_producer(producer)
        raise TransactionRefused(
            f"the broker allows no transaction of {transaction_seconds:g} s: lower SHOPSTREAM_TRANSACTION_SECONDS, or raise its "
            "transaction.max.timeout.ms"
        ) from None
    except BaseException:
        await stop_producer(producer)
        raise
    return producer


async def stop_producer(producer: Any) -> None:
    """End a producer whatever state it is in: one that waits for a dead transaction is cut off."""
    with contextlib.suppress(Exception):
        await asyncio.wait_for(producer.stop(), STOP_SECONDS)
        return
    with contextlib.suppress(Exception):
        await asyncio.wait_for(producer.client.close(), STOP_SECONDS)


async def transact(producer: Any, records: Iterable[OutRecord], changelog: str) -> int | None:
    """All records in one transaction; the offset of the first one in `changelog`, None when none goes there."""
    await producer.begin_transaction()
    sent = []
    for r in records:
        future = await producer.send(r.topic, r.value, r.key, r.partition, headers=r.headers)
        future.add_done_callback(_noted)
        sent.append((r.topic, future))
    acknowledged = await asyncio.gather(*(future for _, future in sent))
    reach("in_transaction")
    await producer.commit_transaction()
    return min((found.offset for (topic, _), found in zip(sent, acknowledged, strict=True) if topic == changelog), default=None)


def _noted(future: asyncio.Future[Any]) -> None:
    """When the first of a transaction's sends fails, nobody waits for the others."""
    if not future.cancelled():
        future.exception()


async def read_to_end(client: dict[str, Any], tp: TopicPartition, recovery: Recovery, offset: int | None = None) -> Records:
    """Committed records (key, value) of a changelog partition, from `offset` or else all; by position, as markers have offsets too.

    Raises ChangelogError when all of them were deleted, or what comes after `offset` is not there any more.
    """
    consumer = aiokafka.AIOKafkaConsumer(
        **client,
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # a snapshot committed meanwhile lets the records before it be deleted
        max_partition_fetch_bytes=16 << 20,
    )
    try:
        await consumer.start()
        consumer.assign([tp])
        recovery.end = (await consumer.end_offsets([tp]))[tp]
        first = (await consumer.beginning_offsets([tp]))[tp]
        if offset is not None and not first <= offset <= recovery.end:
            raise ChangelogError(f"{tp.topic}[{tp.partition}] holds offsets {first} to {recovery.end}, it was read up to {offset}")
        recovery.begin = recovery.position = first if offset is None else offset
        consumer.seek(tp, recovery.begin)
        records: Records = []
        moved = time.monotonic()
        while recovery.position < recovery.end:
            for found in (await consumer.getmany(tp, timeout_ms=POLL_MS)).values():
                records.extend((record.key, record.value) for record in found if record.offset < recovery.end)
            before, recovery.position = recovery.position, await consumer.position(tp)
            if recovery.position > before:
                moved = time.monotonic()
            elif time.monotonic() - moved > STALL_SECONDS:
                raise TimeoutError(f"{tp.topic}[{tp.partition}]: nothing read for {STALL_SECONDS} s, at {before} of {recovery.end}")
    finally:
        await consumer.stop()
    reach("restore")
    if offset is None and recovery.end > 0 and not records and recovery.begin > 0:
        raise ChangelogError(f"{tp.topic}[{tp.partition}] held {recovery.end} records and all were deleted. {REMEDY}")
    return records


async def grew(client: dict[str, Any], tp: TopicPartition, end: int) -> bool:
    """Whether someone has written to the changelog since it was read to `end`: then another worker is the owner now."""
    consumer = aiokafka.AIOKafkaConsumer(**client, enable_auto_commit=False)
    try:
        await consumer.start()
        return bool((await consumer.end_offsets([tp]))[tp] > end)
    finally:
        await consumer.stop()


async def delete_before(client: dict[str, Any], tp: TopicPartition, offset: int) -> None:
    """Delete a changelog's records before a committed snapshot. A courtesy to the disk and to the next restore: a failure is only told."""
    admin = AIOKafkaAdminClient(**client)
    try:
        await asyncio.wait_for(admin.start(), ANSWER_SECONDS)
        await asyncio.wait_for(admin.delete_records({tp: RecordsToDelete(before_offset=offset)}), ANSWER_SECONDS)
    except Exception as error:
        log.warning("%s[%d]: the records before offset %d were not deleted: %r", tp.topic, tp.partition, offset, error)
    finally:
        with contextlib.suppress(Exception):
            await admin.close()
