"""The partitions a worker owns: taken over in the background, held while the group rebalances, given up when another worker has them.

`streaming.tables` and the transport tell it of rebalances, the agents call `offer`. A partition whose transaction failed is dropped and taken over
again from the changelog; anything unexpected ends the process: a restart is exact, going on might not be.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from pipeline.changelog import ChangelogError, Sealed
from pipeline.definitions import Definitions
from pipeline.partition import BrakesOn, ContinuityError, Partition, Run
from pipeline.streaming.account import Account
from pipeline.streaming.changelog import (
    ANSWER_SECONDS,
    Recovery,
    delete_before,
    fence,
    grew,
    read_to_end,
    stop_producer,
)
from pipeline.streaming.ending import end_process
from pipeline.streaming.options import WorkerOptions
from pipeline.streaming.standby import Standbys
from pipeline.telemetry.meter import Meter
from pipeline.telemetry.metrics import FLUSH_ERRORS, RETAKEN

log = logging.getLogger("shopstream.owner")

REMEDY = "Check them with `shopstream topics`; `shopstream rebuild --from earliest` goes over to a changed number."
TAKE_OVERS_AT_ONCE = 2  # a restore holds its changelog in memory


class EventsDeleted(Exception):
    """Retention deleted events before they were read. Numbers would miss them, so the worker stops."""


@dataclass(slots=True)
class Owned:
    partition: Partition
    producer: Any
    account: Account
    joined: bool = False  # its runs come
    braked: set[str] = field(default_factory=set)
    last_run: dict[str, float] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    began: float | None = None  # its open transaction, monotonic seconds


class Owner:
    """All partitions of one worker."""

    def __init__(self, definitions: Definitions, options: WorkerOptions) -> None:
        self.definitions = definitions
        self.options = options
        self.client = options.client()
        self.topics = options.topics
        self.owned: dict[int, Owned] = {}
        self.wanted: set[int] = set()  # what the group has assigned to us
        self.held = True  # while the group rebalances, nothing is read or flushed
        self.epochs: dict[TopicPartition, int] = {}
        self.starts: dict[TopicPartition, int] = {}  # where reading began after the last seek
        self.recoveries: dict[int, Recovery] = {}
        self.rebalances = 0
        self.meter = Meter()
        self.standbys = Standbys(self.client, self.topics, options.standby_partitions, self._empty, self.meter)
        self.consumer: Any = None  # the transport's, once it has been made
        self.sink_ready = asyncio.Event()  # cleared while consumption waits for the warehouse
        self.sink_ready.set()
        self.outdated = asyncio.Event()  # another revision is in force: the worker has to go over to it
        self.emptied: Callable[[int], Coroutine[Any, Any, None]] | None = None  # asked before a partition without changelog begins anew
        self._takes: dict[int, asyncio.Task[None]] = {}
        self._aside: set[asyncio.Task[Any]] = set()
        self._out_of_range: set[tuple[TopicPartition, int]] = set()
        self._turns = asyncio.Semaphore(TAKE_OVERS_AT_ONCE)

    # --- rebalance: revoked → hold → (flush) → assigned → joined ----------------------------------------------------------

    def hold(self) -> None:
        """The group rebalances: from this instant no run is applied, until `assigned`."""
        self.held = True
        for tp in self.source_partitions(self.owned):
            self.epochs[tp] = self.epochs.get(tp, 0) + 1
        for owned in self.owned.values():
            owned.joined = False

    def assigned(self, tps: Iterable[TopicPartition]) -> None:
        """Give up what is not ours any more at once, take over what is new in the background. Raises RuntimeError when topics do not belong together."""
        by_topic = {topic: {tp.partition for tp in tps if tp.topic == topic} for topic in self.topics.sources}
        wanted = by_topic[self.topics.clickstream]
        if any(numbers != wanted for numbers in by_topic.values()):
            raise RuntimeError(f"partitions of the topics do not belong together: {by_topic}. {REMEDY}")
        self.rebalances += 1
        self.wanted = wanted
        self.held = False
        self.standbys.own(wanted)
        for number in set(self._takes) - wanted:
            self._takes.pop(number).cancel()
        for number in set(self.owned) - wanted:
            self._give_up(number)
        for number in sorted(wanted & set(self.owned)):
            self._spawn(self._check_partitions(self.owned[number]))
        for number in sorted(wanted - set(self.owned) - set(self._takes)):
            self._begin_taking(number)

    def join_all(self) -> None:
        """Read on with all that is owned; the rest joins once it has been taken over."""
        for number in self.owned:
            self._spawn(self._join(number))

    def lost(self, number: int, error: BaseException) -> None:
        """A transaction failed: what the changelog says is what counts. Drop the state; take over again if the group still says it is ours."""
        log.warning("partition %d: its transaction failed (%r), the state is dropped and read again", number, error)
        self.meter.count(FLUSH_ERRORS)
        self._give_up(number)
        if number in self.wanted and number not in self._takes:
            self.meter.count(RETAKEN)
            self._begin_taking(number, again=True)

    def _give_up(self, number: int) -> None:
        owned = self.owned.pop(number)
        if self.consumer is not None:
            self.consumer.pause_partitions(self.source_partitions([number]))
        self._spawn(stop_producer(owned.producer))
        log.info("partition %d: given up at %s", number, owned.partition.positions)

    @property
    def taking(self) -> set[int]:
        """Partitions assigned and not taken over yet."""
        return self.wanted - set(self.owned)

    # --- taking over -----------------------------------------------------------------------------------------------------

    def _begin_taking(self, number: int, again: bool = False) -> None:
        self._takes[number] = task = asyncio.create_task(self._take_patiently(number, again))
        task.add_done_callback(lambda done: self._taken(number, done))

    def _taken(self, number: int, done: asyncio.Task[None]) -> None:
        if self._takes.get(number) is done:
            del self._takes[number]
        self._check(done)

    async def _take_patiently(self, number: int, again: bool) -> None:
        try:
            async for attempt in self._patience(number):
                with attempt:
                    if again:  # another worker may be the owner by now: only a member of the group may fence
                        await self.consumer.prove_membership()
                    again = True
                    async with self._turns:
                        await self._take(number)
        except Sealed as error:
            log.info("partition %d: %s", number, error)
            self.outdated.set()
            return
        await self._join(number)

    def _patience(self, number: int, what: str = "not taken over yet") -> AsyncRetrying:
        """As long as Kafka is away or the group has not settled."""

        def tell(state: RetryCallState) -> None:
            log.warning("partition %d: %s, trying again: %r", number, what, state.outcome and state.outcome.exception())

        return AsyncRetrying(retry=retry_if_exception(is_transient), wait=wait_exponential_jitter(0.2, 10), before_sleep=tell)

    async def _take(self, number: int) -> None:
        self.recoveries[number] = recovery = Recovery()
        producer = await fence(
            self.client, f"{self.topics.app_id}-{number}", self.options.transaction_seconds
        )  # so the changelog's end is the end
        try:
            partitions = await self._count_partitions(producer)
            partition = await self._from_standby(number, partitions, recovery) or await self._from_changelog(number, partitions, recovery)
        except BaseException:
            self._spawn(stop_producer(producer))
            raise
        self.owned[number] = Owned(partition, producer, Account(partition, self.meter))
        recovery.seconds = time.monotonic() - recovery.started
        log.info("partition %d: taken over at %s, %s, %.2f s", number, partition.positions, recovery.source, recovery.seconds)

    async def _from_changelog(self, number: int, partitions: int, recovery: Recovery) -> Partition:
        partition = self._empty(number, partitions)
        records = await read_to_end(self.client, TopicPartition(self.topics.changelog, number), recovery)
        recovery.source = f"{len(records)} changelog records"
        if records:
            try:
                await asyncio.get_running_loop().run_in_executor(None, partition.restore, records, recovery.applying)
            except ChangelogError as error:
                raise ChangelogError(f"{self.topics.changelog}[{number}]: {error}") from None
        elif self.emptied is not None:
            await self._begin_anew(self.emptied, number, recovery)
        if not records and self.topics.revision:
            partition.begin_beside(self.options.moved)
        return partition

    async def _from_standby(self, number: int, partitions: int, recovery: Recovery) -> Partition | None:
        """None when there is no standby, or one that is not what the changelog says."""
        standby = await self.standbys.hand_over(number)
        if standby is None:
            return None
        try:
            if standby.partition.partitions != partitions:
                raise ChangelogError(f"it was made with {standby.partition.partitions} partitions, the topics have {partitions}")
            rest = await read_to_end(self.client, TopicPartition(self.topics.changelog, number), recovery, standby.offset)
            recovery.source = f"a standby and {len(rest)} changelog records"
            return await asyncio.get_running_loop().run_in_executor(None, standby.take_over, rest)
        except ChangelogError as error:
            self.standbys.discarded(number, error)
            return None

    def _empty(self, number: int, partitions: int) -> Partition:
        return Partition(number, partitions, self.definitions, self.topics, self.options.partition)

    async def _begin_anew(self, emptied: Callable[[int], Coroutine[Any, Any, None]], number: int, recovery: Recovery) -> None:
        recovery.asks = True
        try:
            await emptied(number)
        except ChangelogError:
            if await grew(self.client, TopicPartition(self.topics.changelog, number), recovery.end):
                raise TimeoutError(f"partition {number}: another worker has taken it over meanwhile") from None
            raise
        finally:
            recovery.asks = False

    async def _count_partitions(self, producer: Any) -> int:
        """Partitions of the source topics, asked of the broker: with a wrong count every user would seem to be in the wrong place."""
        counts = {topic: len(await asyncio.wait_for(producer.partitions_for(topic), ANSWER_SECONDS)) for topic in self.topics.sources}
        if len(set(counts.values())) != 1:
            raise RuntimeError(f"the source topics need the same number of partitions, but have {counts}. {REMEDY}")
        return counts[self.topics.clickstream]

    async def _check_partitions(self, owned: Owned) -> None:
        number = owned.partition.number
        async for attempt in self._patience(number, "the topics' partitions are not counted yet"):
            with attempt:
                if self.owned.get(number) is not owned:
                    return
                if not await asyncio.wait_for(owned.producer.client.force_metadata_update(), ANSWER_SECONDS):  # what it knows may be old
                    raise TimeoutError("no broker answers")
                count = await self._count_partitions(owned.producer)
        if count != owned.partition.partitions:
            raise ChangelogError(
                f"the topics have {count} partitions now, the state was made with {owned.partition.partitions}: users have moved between "
                "partitions. `shopstream rebuild --from earliest` computes all numbers anew."
            )

    # --- reading ---------------------------------------------------------------------------------------------------------

    async def _join(self, number: int) -> None:
        """Seek to the position and let the runs come."""
        async for attempt in self._patience(number):
            with attempt:
                owned = self.owned.get(number)
                if owned is None or self.held or self.consumer is None:
                    return  # the rebalance that holds us ends in another join
                positions, epochs = self._new_epoch(owned.partition)
                started, deleted = await self.consumer.read_from(positions, epochs)
        assert owned is not None
        self.starts.update(started)
        owned.joined = True
        self.consumer.pause_partitions(TopicPartition(topic, number) for topic in owned.braked)
        for tp, (position, first) in deleted.items():
            self._skip(owned.partition, tp, position, first)

    def _new_epoch(self, partition: Partition) -> tuple[dict[TopicPartition, int | None], dict[TopicPartition, int]]:
        """Where to read on (None: from the beginning), and the epoch of the runs read from there.

        From this instant runs of older epochs are dropped: the positions would be wrong if one were still applied before the seek.
        """
        tps = self.source_partitions([partition.number])
        for tp in tps:
            self.epochs[tp] = self.epochs.get(tp, 0) + 1
        return {tp: partition.positions.get(tp.topic) for tp in tps}, {tp: self.epochs[tp] for tp in tps}

    def _skip(self, partition: Partition, tp: TopicPartition, position: int, first: int) -> None:
        told = f"{tp.topic}[{tp.partition}]: the events at offsets {position} to {first - 1} were deleted by the topic's retention before they were read"
        if not self.options.accept_deleted:
            raise EventsDeleted(
                f"{told}. Raise retention.ms; to go on without these events set SHOPSTREAM_ACCEPT_DELETED_EVENTS=true for one start."
            )
        log.error("%s; going on without them, as SHOPSTREAM_ACCEPT_DELETED_EVENTS says", told)
        partition.skip(tp.topic, first)
        self._spawn(self._join(partition.number))

    def out_of_range(self, tp: TopicPartition, offset: int) -> None:
        """Kafka has no record at our offset. Deleted before we read it, or the topic is another one now."""
        if (tp, offset) in self._out_of_range:
            end_process(f"{tp.topic}[{tp.partition}] ends before offset {offset}, up to which it was read: it was deleted and created again, or a broker "
                        "lost its end. Bring it back, or let `shopstream rebuild --from earliest` compute all numbers anew from what is there.")  # fmt: skip
        self._out_of_range.add((tp, offset))
        self._spawn(self._join(tp.partition))

    def source_partitions(self, numbers: Iterable[int]) -> list[TopicPartition]:
        """The partitions of the source topics that belong to these numbers."""
        return [TopicPartition(topic, number) for number in numbers for topic in self.topics.sources]

    async def offer(self, run: Run) -> None:
        """Apply a run that is in place; drop one fetched before the last seek, which reads it again."""
        await self.sink_ready.wait()
        owned = self.owned.get(run.partition)
        if owned is None or run.topic in owned.braked or run.epoch != self.epochs.get(TopicPartition(run.topic, run.partition)):
            return
        self._check_first(owned.partition, run)
        began = time.perf_counter()
        try:
            owned.partition.offer(run)
            owned.account.applied(run, began)
        except BrakesOn as stop:
            owned.braked.add(run.topic)
            self.consumer.pause_partitions([TopicPartition(run.topic, run.partition)])
            log.error("consumption of %s[%d] stopped: %s", run.topic, run.partition, stop)
        owned.last_run[run.topic] = time.monotonic()

    def _check_first(self, partition: Partition, run: Run) -> None:
        """A topic's first run has no position to follow: it begins where reading did, unless a run before it was lost on the way here."""
        started = self.starts.get(TopicPartition(run.topic, run.partition))
        if run.topic not in partition.positions and run.begin != started:
            raise ContinuityError(f"{run.topic}[{run.partition}]: the first run begins at offset {run.begin}, reading began at {started}")

    # --- the rest --------------------------------------------------------------------------------------------------------

    def forget_before(self, number: int, offset: int) -> None:
        """A committed snapshot begins at `offset` of the changelog: what is before it can go."""
        self._spawn(delete_before(self.client, TopicPartition(self.topics.changelog, number), offset))

    async def close(self) -> None:
        """Stop the producers and what runs in the background."""
        self.held = True
        for task in self._takes.values():
            task.cancel()
        for number in list(self.owned):
            self._give_up(number)
        await asyncio.gather(*self._aside, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._aside.add(task)
        task.add_done_callback(self._aside.discard)
        task.add_done_callback(self._check)

    def _check(self, done: asyncio.Task[Any]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            end_process(f"the worker ends: {error}", error)


def is_transient(error: BaseException) -> bool:
    """Whether it is worth trying again: Kafka is away, or the group has not settled."""
    if isinstance(error, KafkaError):
        return "AuthorizationFailed" not in type(error).__name__
    return isinstance(error, (asyncio.TimeoutError, OSError))
