"""The two loops that take results out: a Kafka transaction a partition every interval, and one insert a warehouse table for what was committed.

`streaming.worker` runs them beside Faust; `Owner` has the partitions.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from aiokafka.structs import TopicPartition
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from pipeline.changelog import ChangelogError
from pipeline.pseudonyms import Pseudonyms
from pipeline.sinks.warehouse import SinkUnavailable, Warehouse
from pipeline.streaming.changelog import transact
from pipeline.streaming.ending import end_process
from pipeline.streaming.faults import reach
from pipeline.streaming.options import FlushOptions
from pipeline.streaming.owner import Owned, Owner
from pipeline.telemetry.metrics import FLUSH_SECONDS, INSERT_SECONDS, INSERTED_ROWS, SINK_ERRORS, SINK_RETRIES
from pipeline.telemetry.watched import Watch
from schemas.rows import Rows

log = logging.getLogger("shopstream.flushes")


class Flusher:
    """Partitions → changelog. What fails costs the partition its state in memory, never an event: it is taken over again from the changelog."""

    def __init__(self, owner: Owner, options: FlushOptions) -> None:
        self.owner = owner
        self.options = options
        self._ended = False
        self._cycle = asyncio.Lock()
        self._told_at = 0.0

    async def run(self) -> None:
        """For ever: a transaction a partition every interval, none while the group rebalances."""
        while True:
            await asyncio.sleep(self.options.interval_seconds)
            if not self.owner.held:
                await self._look_at_ends()
                await asyncio.shield(self.flush())  # the last flush, at an end that comes in the middle, has its turn after it
                await self._tell_group()

    def end_of_input(self) -> None:
        """No event will come any more: no topic holds a watermark back, and the last flush says what is final."""
        self._ended = True
        for owned in self.owner.owned.values():
            owned.partition.idle.update(self.owner.topics.sources)

    async def flush(self) -> None:
        """What every partition has not flushed yet. After `Owner.hold` nothing is left to flush until the next assignment.

        Ends the process when one can't be taken: aiokafka and Faust log what a rebalance raises, and go on.
        """
        async with self._cycle:
            try:
                await asyncio.gather(*(self._flush(owned) for owned in list(self.owner.owned.values())))
            except Exception as error:
                end_process(f"a flush failed half way: {error}", error)

    async def _flush(self, owned: Owned) -> None:
        number = owned.partition.number
        async with owned.lock:
            if self.owner.owned.get(number) is not owned:
                return
            flush = owned.partition.snapshot()
            if flush is None:
                return
            owned.account.snapshot()
            began = owned.began = time.monotonic()
            reach("before_commit")
            try:
                work = transact(owned.producer, flush.records, self.owner.topics.changelog)
                first = await asyncio.wait_for(work, self.owner.options.transaction_seconds)
            except BaseException as error:  # cancelled too: whether the changelog has the flush is not known then
                if self.owner.owned.get(number) is owned:
                    self.owner.lost(number, error)
                if not isinstance(error, Exception):
                    raise
                return
            finally:
                owned.began = None
            reach("after_commit")
            owned.partition.committed(flush)
            owned.account.committed()
            self.owner.meter.observe(FLUSH_SECONDS, time.monotonic() - began)
            if flush.snapshot and first is not None and first > 0:  # an offset that is not known is -1, which to Kafka means all there is
                self.owner.forget_before(number, first)

    async def _look_at_ends(self) -> None:
        """Offsets without records (transaction markers) and idle topics: what only the consumer can see."""
        owner = self.owner
        if owner.consumer is None:
            return
        tps = owner.source_partitions(owner.owned)
        now = time.monotonic()
        for tp, (position, end, begin) in (await owner.consumer.ends(tps)).items():
            owned = owner.owned.get(tp.partition)
            if owned is not None:
                owned.account.look(tp.topic, end)
            if owned is None or owner.held or end < 0 or position < end:
                continue
            applied = owned.partition.positions.get(tp.topic, -1)
            if begin == (owner.starts.get(tp) if applied < 0 else applied):  # everything fetched is applied
                owned.partition.advance(tp.topic, position)
            quiet = now - owned.last_run.setdefault(tp.topic, now)
            if self._ended or 0 < self.options.idle_seconds < quiet:
                owned.partition.idle.add(tp.topic)
            else:
                owned.partition.idle.discard(tp.topic)

    async def _tell_group(self) -> None:
        """The group's offsets, for lag displays only."""
        now = time.monotonic()
        if now - self._told_at < self.options.commit_seconds:
            return
        self._told_at = now
        positions = {TopicPartition(t, n): o for n, owned in self.owner.owned.items() for t, o in owned.partition.positions.items()}
        try:
            await asyncio.wait_for(self.owner.consumer.commit_positions(positions), 5)
        except Exception as error:
            log.debug("the group's offsets were not updated: %r", error)


class Feeder:
    """Committed flushes → warehouse, with patience while it is away; after a while consumption waits for it."""

    def __init__(self, owner: Owner, warehouse: Warehouse, options: FlushOptions, pseudonyms: Pseudonyms | None = None) -> None:
        self.owner = owner
        self.warehouse = warehouse
        self.options = options
        self.pseudonyms = pseudonyms
        self.watch = Watch(warehouse, owner.definitions, owner.meter)
        self.gave_up = False  # at the end: an insert may still hang in its thread
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sink")

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(self.options.interval_seconds / 2)
            inserted = await self.feed()
            await self.watch.look(self.in_thread, inserted)

    async def feed(self) -> bool:
        """One insert a table for all partitions that have something new; whether there was something."""
        waiting = [(owned, *rows) for owned in self.owner.owned.values() if (rows := owned.partition.sink_rows())]
        if not waiting:
            return False
        together = merged([one for _, _, one in waiting])
        if self.pseudonyms and "rejects" in together:
            together["rejects"] = self.pseudonyms.rejects(together["rejects"])
        started = time.monotonic()
        reach("before_insert")
        async for attempt in _patience(lambda state: self._away(started, state)):
            with attempt:
                await self._insert(together)
        reach("after_insert")
        self.owner.sink_ready.set()
        for owned, n, _ in waiting:
            owned.partition.sunk(n)
            owned.account.sunk(n)
        return True

    async def _insert(self, rows: Rows) -> None:
        began = time.monotonic()
        try:
            await self.in_thread(self.warehouse.insert, rows)
        except SinkUnavailable as error:
            self.owner.meter.count(SINK_ERRORS, "insert", error.kind)
            raise
        self.owner.meter.observe(INSERT_SECONDS, time.monotonic() - began)
        for table, columns in rows.items():
            self.owner.meter.count(INSERTED_ROWS, table, by=len(columns["version"]))

    async def nothing_known(self, number: int) -> None:
        """Raises ChangelogError when the warehouse holds rows of a partition whose changelog is empty: versions from 1 on would lose against them."""
        sql = 'SELECT max(version) FROM progress WHERE "partition" = %(number)s AND revision = %(revision)s'
        async for attempt in _patience(
            lambda state: log.warning("the warehouse can't be asked yet: %s", state.outcome and state.outcome.exception())
        ):
            with attempt:
                rows = await self.in_thread(self.warehouse.query, sql, {"number": number, "revision": self.owner.topics.revision})
        if rows and int(rows[0][0] or 0) > 0:
            raise ChangelogError(
                f"partition {number} has no changelog ({self.owner.topics.changelog} is empty there), but the warehouse holds its rows up to version "
                f"{rows[0][0]}: the topic was deleted, or another app id wrote them. Bring the changelog back, or let "
                "`shopstream rebuild --from earliest` compute all numbers anew."
            )

    async def close(self, seconds: float) -> None:
        """Bring the warehouse up to date within `seconds`; what it does not take goes out when the partitions are next taken over."""
        try:
            await asyncio.wait_for(self._finish(), seconds)
        except (TimeoutError, SinkUnavailable):
            self.gave_up = True
            log.warning("the warehouse is away: rows that it has not acknowledged are sent after the next start")
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _finish(self) -> None:
        await self.feed()
        await self.in_thread(int)  # after whatever the thread is still at

    async def in_thread(self, call: Any, *arguments: Any) -> Any:
        """A call to the warehouse, in the one thread that makes them."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    def _away(self, started: float, state: RetryCallState) -> None:
        self.owner.meter.count(SINK_RETRIES)
        away = time.monotonic() - started
        log.warning("the warehouse does not take rows (%.0f s): %s", away, state.outcome and state.outcome.exception())
        if away > self.options.sink_lag_seconds and self.owner.sink_ready.is_set():
            log.warning("consumption waits for the warehouse")
            self.owner.sink_ready.clear()


def _patience(tell: Callable[[RetryCallState], None]) -> AsyncRetrying:
    """As long as the warehouse is away."""
    return AsyncRetrying(retry=retry_if_exception_type(SinkUnavailable), wait=wait_exponential_jitter(0.2, 15), before_sleep=tell)


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
