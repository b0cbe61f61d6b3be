"""The partitions a worker owns: takes them over from the changelog, flushes each in a transaction, feeds the sink.

`streaming.tables` calls `rebalance`, the agents call `offer`. Anything unexpected ends the process: a restart is exact, going on might not be.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import aiokafka
import numpy as np
from aiokafka.structs import TopicPartition
from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential_jitter

from pipeline.definitions import Definitions
from pipeline.partition import LARGEST_MESSAGE, BrakesOn, Flush, Options, Partition, Run, Topics
from pipeline.sinks.warehouse import SinkUnavailable, Warehouse
from schemas.rows import Rows

log = logging.getLogger("shopstream.owner")

RESTORE_SECONDS = 600
TRANSACTION_SECONDS = 60


@dataclass(frozen=True, slots=True)
class FlushOptions:
    """How often to flush; how long the sink may lag before consumption waits for it; when a caught-up topic holds no watermark back (0: never)."""

    interval_seconds: float = 0.5
    sink_lag_seconds: float = 60.0
    idle_seconds: float = 60.0
    commit_seconds: float = 5.0


@dataclass(slots=True)
class Owned:
    partition: Partition
    producer: Any
    braked: set[str] = field(default_factory=set)
    last_run: dict[str, float] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Owner:
    """All partitions of one worker."""

    def __init__(
        self, client: dict[str, Any], definitions: Definitions, topics: Topics, options: Options, flush: FlushOptions, warehouse: Warehouse
    ) -> None:
        self.client = client  # aiokafka's bootstrap_servers and security arguments
        self.definitions = definitions
        self.topics = topics
        self.options = options
        self.flush_options = flush
        self.warehouse = warehouse
        self.owned: dict[int, Owned] = {}
        self.epochs: dict[TopicPartition, int] = {}
        self.starts: dict[TopicPartition, int] = {}  # where reading began after the last seek
        self.thread: Any = None  # the transport's consumer thread, set once the app has started
        self._sink = ThreadPoolExecutor(1, thread_name_prefix="sink")
        self._sink_caught_up = asyncio.Event()
        self._sink_caught_up.set()
        self._cycle = asyncio.Lock()
        self._committed_at = 0.0

    # --- rebalance -------------------------------------------------------------------------------------------------------

    async def rebalance(self, assigned: Iterable[TopicPartition]) -> None:
        """Drop what is not ours any more, take over what is new. Afterwards `positions` says where to read on."""
        by_topic = {topic: {tp.partition for tp in assigned if tp.topic == topic} for topic in self.topics.sources}
        wanted = by_topic[self.topics.clickstream]
        if any(numbers != wanted for numbers in by_topic.values()):
            raise RuntimeError(f"partitions of the topics do not belong together: {by_topic}. Check them with `shopstream topics`.")
        for number in set(self.owned) - wanted:
            await self._drop(number)
        await asyncio.gather(*(self._take(number) for number in sorted(wanted - set(self.owned))))

    async def _drop(self, number: int) -> None:
        owned = self.owned.pop(number)
        async with owned.lock:
            await asyncio.wait_for(owned.producer.stop(), TRANSACTION_SECONDS)
        log.info("partition %d: given up at %s", number, owned.partition.positions)

    async def _take(self, number: int) -> None:
        started = time.monotonic()
        producer = aiokafka.AIOKafkaProducer(
            **self.client,
            transactional_id=f"{self.topics.app_id}-{number}",
            transaction_timeout_ms=TRANSACTION_SECONDS * 1000,
            max_request_size=LARGEST_MESSAGE,
            max_batch_size=1 << 20,
            acks="all",
        )
        await asyncio.wait_for(producer.start(), TRANSACTION_SECONDS)  # fences the former owner, so the changelog's end is the end
        partitions = await self._count_partitions(producer)
        partition = Partition(number, partitions, self.definitions, self.topics, self.options)
        records = await asyncio.wait_for(self._read_changelog(number), RESTORE_SECONDS)
        partition.restore(records)
        self.owned[number] = Owned(partition, producer)
        log.info(
            "partition %d: taken over at %s, %d changelog records, %.2f s",
            number,
            partition.positions,
            len(records),
            time.monotonic() - started,
        )

    async def _count_partitions(self, producer: Any) -> int:
        """Partitions of the source topics, asked of the broker: with a wrong count every user would seem to be in the wrong place."""
        counts = {topic: len(await asyncio.wait_for(producer.partitions_for(topic), TRANSACTION_SECONDS)) for topic in self.topics.sources}
        if len(set(counts.values())) != 1:
            raise RuntimeError(
                f"the source topics need the same number of partitions, but have {counts}. Check them with `shopstream topics`."
            )
        return counts[self.topics.clickstream]

    async def _read_changelog(self, number: int) -> list[tuple[bytes | None, bytes | None]]:
        tp = TopicPartition(self.topics.changelog, number)
        consumer = aiokafka.AIOKafkaConsumer(
            **self.client,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=16 << 20,
        )
        await consumer.start()
        try:
            consumer.assign([tp])
            end = (await consumer.end_offsets([tp]))[tp]
            await consumer.seek_to_beginning(tp)
            records: list[tuple[bytes | None, bytes | None]] = []
            while await consumer.position(tp) < end:
                for found in (await consumer.getmany(tp, timeout_ms=1000)).values():
                    records.extend((record.key, record.value) for record in found)
            return records
        finally:
            await consumer.stop()

    def new_epoch(self, tps: Iterable[TopicPartition]) -> tuple[dict[TopicPartition, int | None], dict[TopicPartition, int]]:
        """Where to read on (None: from the beginning), and the epoch of the runs read from there.

        From this instant runs of older epochs are dropped: the positions would be wrong if one were still applied before the seek.
        """
        ours = [tp for tp in tps if tp.partition in self.owned]
        for tp in ours:
            self.epochs[tp] = self.epochs.get(tp, 0) + 1
        positions = {tp: self.owned[tp.partition].partition.positions.get(tp.topic) for tp in ours}
        return positions, {tp: self.epochs[tp] for tp in ours}

    # --- intake ----------------------------------------------------------------------------------------------------------

    async def offer(self, run: Run) -> None:
        """Apply a run that is in place; drop one fetched before the last seek, which reads it again."""
        await self._sink_caught_up.wait()
        owned = self.owned.get(run.partition)
        if owned is None or run.topic in owned.braked or run.epoch != self.epochs.get(TopicPartition(run.topic, run.partition)):
            return
        try:
            owned.partition.offer(run)
        except BrakesOn as stop:
            owned.braked.add(run.topic)
            log.error("consumption of %s[%d] stopped: %s", run.topic, run.partition, stop)
        owned.last_run[run.topic] = time.monotonic()

    # --- flush -----------------------------------------------------------------------------------------------------------

    async def run_flushes(self) -> None:
        """For ever: a transaction a partition every interval."""
        while True:
            await asyncio.sleep(self.flush_options.interval_seconds)
            await self.flush()

    async def flush(self) -> None:
        async with self._cycle:
            await self._look_at_ends()
            await asyncio.gather(*(self._flush(owned) for owned in list(self.owned.values())))
            if time.monotonic() - self._committed_at > self.flush_options.commit_seconds:
                self._committed_at = time.monotonic()
                await self._tell_group()

    async def _flush(self, owned: Owned) -> None:
        async with owned.lock:
            if self.owned.get(owned.partition.number) is not owned:
                return
            flush = owned.partition.snapshot()
            if flush is None:
                return
            await asyncio.wait_for(self._transaction(owned.producer, flush), TRANSACTION_SECONDS)
            owned.partition.committed(flush)

    async def _transaction(self, producer: Any, flush: Flush) -> None:
        await producer.begin_transaction()
        sent = [await producer.send(r.topic, r.value, r.key, r.partition, headers=r.headers) for r in flush.records]
        await asyncio.gather(*sent)
        await producer.commit_transaction()

    async def _look_at_ends(self) -> None:
        """Offsets without records (transaction markers) and idle topics: what only the consumer can see."""
        if self.thread is None:
            return
        tps = [TopicPartition(topic, number) for number in self.owned for topic in self.topics.sources]
        now = time.monotonic()
        for tp, (position, end) in (await self.thread.ends(tps)).items():
            owned = self.owned.get(tp.partition)
            if owned is None or end < 0 or position < end:
                continue
            applied = owned.partition.positions.get(tp.topic, -1)
            everything_applied = self.thread.begins.get(tp) == (self.starts.get(tp) if applied < 0 else applied)
            if everything_applied:
                owned.partition.advance(tp.topic, position)
            quiet = now - owned.last_run.setdefault(tp.topic, now)
            if 0 < self.flush_options.idle_seconds < quiet:
                owned.partition.idle.add(tp.topic)
            else:
                owned.partition.idle.discard(tp.topic)

    async def _tell_group(self) -> None:
        positions = {TopicPartition(t, n): o for n, owned in self.owned.items() for t, o in owned.partition.positions.items()}
        try:
            await asyncio.wait_for(self.thread.commit_positions(positions), 5)
        except Exception as error:  # for displays only
            log.debug("the group's offsets were not updated: %s", error)

    # --- sink ------------------------------------------------------------------------------------------------------------

    async def run_sink(self) -> None:
        """For ever: what was committed goes to the warehouse, with patience while it is away."""
        while True:
            await asyncio.sleep(self.flush_options.interval_seconds / 2)
            await self.sink()

    async def sink(self) -> None:
        """One insert a table for all partitions that have something new."""
        waiting = [(owned.partition, *rows) for owned in self.owned.values() if (rows := owned.partition.sink_rows())]
        if not waiting:
            return
        together = merged([one for _, _, one in waiting])
        started = time.monotonic()
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(SinkUnavailable),
            wait=wait_exponential_jitter(0.2, 15),
            before_sleep=lambda state: self._sink_away(started, state),
        ):
            with attempt:
                await asyncio.get_running_loop().run_in_executor(self._sink, self.warehouse.insert, together)
        self._sink_caught_up.set()
        for partition, n, _ in waiting:
            partition.sunk(n)

    def _sink_away(self, started: float, state: Any) -> None:
        away = time.monotonic() - started
        log.warning("the warehouse does not take rows (%.0f s): %s", away, state.outcome.exception())
        if away > self.flush_options.sink_lag_seconds and self._sink_caught_up.is_set():
            log.warning("consumption waits for the warehouse")
            self._sink_caught_up.clear()

    async def close(self) -> None:
        """A last flush, the sink brought up to date, producers stopped."""
        await self.flush()
        await self.sink()
        for number in list(self.owned):
            await self._drop(number)
        self._sink.shutdown()


def merged(parts: list[Rows]) -> Rows:
    """Rows of several partitions as one insert a table."""
    tables: Rows = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        chosen = [part[name] for part in parts if name in part]
        tables[name] = {
            c: np.concatenate([np.asarray(p[c]) for p in chosen]) if _numeric(chosen[0][c]) else [v for p in chosen for v in p[c]]
            for c in chosen[0]
        }
    return tables


def _numeric(column: Any) -> bool:
    return isinstance(column, np.ndarray) and column.dtype.kind in "iuf"


def end_process(message: str, error: BaseException | None = None) -> None:
    """A bug or a lost ownership: say so and end at once. Nothing is lost, a restart is exact; an orderly end could hang on what is broken."""
    log.critical(message, exc_info=error)
    logging.shutdown()
    os._exit(1)
