"""Warm copies of partitions that other workers own: each follows its changelog, so that taking one over needs no restore.

In: the changelog's committed records, as the owners write them. Out: `Standby` to `streaming.owner`, which fences the former owner, reads what came since
and goes on from there. One that is odd in any way is thrown away, and the partition is restored from its changelog: the changelog is what counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import aiokafka
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from pipeline.changelog import ChangelogError, Reader, Sealed
from pipeline.decode import Record
from pipeline.partition import Partition
from pipeline.telemetry.meter import Meter
from pipeline.telemetry.metrics import STANDBYS_DISCARDED
from pipeline.topic_names import Topics

log = logging.getLogger("shopstream.standby")

POLL_MS = 500
PAUSE_SECONDS = 10.0
START_SECONDS = 30.0
FETCH_BYTES = 2 << 20  # of each partition, beside what is being applied


class Standby:
    """A partition as of `offset` of its changelog. Nothing here waits, but applying what was read takes its time."""

    def __init__(self, partition: Partition) -> None:
        self.partition = partition
        self.offset = 0  # of the first record that was not read
        self._reader = Reader()

    def follow(self, records: Sequence[Record]) -> None:
        """Apply the next committed records. Raises ChangelogError when they do not follow; then the standby is of no use any more."""
        self._read((record.key, record.value) for record in records)
        self.offset = records[-1].offset + 1

    def take_over(self, rest: Iterable[tuple[bytes | None, bytes | None]]) -> Partition:
        """The partition, ready to go on as its owner after the rest of the changelog's records. Raises ChangelogError."""
        self._read(rest)
        self._reader.end()
        if not self.partition.flushed:
            raise ChangelogError("the changelog holds no whole snapshot")
        self.partition.resume()
        return self.partition

    def _read(self, records: Iterable[tuple[bytes | None, bytes | None]]) -> None:
        self._reader.read(records)
        self.partition.follow(self._reader.take())


def nearest(own: set[int], partitions: int, most: int) -> set[int]:
    """Up to `most` partitions that are not `own`, those next to them first; from 0 on for a worker that owns none.

    The group's range assignor gives each member a run of neighbouring partitions: when a member is gone, the bounds of the others' runs move.
    """
    others = (number for number in range(partitions) if number not in own)
    return set(sorted(others, key=lambda number: min((abs(number - mine) for mine in own), default=number))[:most])


class Standbys:
    """Those of one worker: at most `most`. `make` makes the empty partition (number, of how many)."""

    def __init__(self, client: dict[str, Any], topics: Topics, most: int, make: Callable[[int, int], Partition], meter: Meter) -> None:
        self.most = most
        self.following: dict[int, Standby] = {}
        self.lags: dict[int, int] = {}  # offsets between a standby and the end of its changelog, as last seen
        self._client = client
        self._topics = topics
        self._make = make
        self._meter = meter
        self._own: set[int] = set()
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="standby")

    def own(self, numbers: set[int]) -> None:
        """The group has assigned these to this worker: what it follows is chosen anew, and what it followed of them waits for `hand_over`."""
        self._own = set(numbers)
        self._changed.set()

    async def hand_over(self, number: int) -> Standby | None:
        """A standby of the partition, which is not followed any more; None when there is none."""
        async with self._turn:
            standby = self.following.pop(number, None)
        return standby if standby is not None and standby.offset else None

    def discarded(self, number: int, error: BaseException) -> None:
        """A standby was thrown away."""
        log.warning(
            "partition %d: the standby is thrown away (%s)",
            number,
            error,
            exc_info=None if isinstance(error, (ChangelogError, Sealed)) else error,
        )
        self._meter.count(STANDBYS_DISCARDED)

    async def run(self) -> None:
        """For ever, with patience while Kafka is away."""
        while True:
            try:
                await self._changed.wait()
                async with self._consuming() as consumer:
                    await self._follow(consumer)
            except (KafkaError, TimeoutError, OSError) as error:
                log.warning("standbys can't follow their changelogs, trying again: %r", error)
                self._changed.set()
                await asyncio.sleep(PAUSE_SECONDS)

    @asynccontextmanager
    async def _consuming(self) -> AsyncIterator[Any]:
        consumer = aiokafka.AIOKafkaConsumer(
            **self._client,
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",  # a snapshot lets the records before it be deleted
            max_partition_fetch_bytes=FETCH_BYTES,
        )
        try:
            await asyncio.wait_for(consumer.start(), START_SECONDS)
            yield consumer
        finally:
            await consumer.stop()

    async def _follow(self, consumer: Any) -> None:
        while True:
            if self._changed.is_set():
                self._changed.clear()
                await self._choose(consumer)
            if not consumer.assignment():
                await self._changed.wait()
                continue
            for tp, records in (await consumer.getmany(timeout_ms=POLL_MS)).items():
                await self._apply(tp.partition, records)
            await self._look(consumer)

    async def _choose(self, consumer: Any) -> None:
        """Follow the partitions nearest to our own, each from where its standby is."""
        changelog = self._topics.changelog
        first = TopicPartition(changelog, 0)
        consumer.assign([first])
        await consumer.beginning_offsets([first])  # now it knows the topic
        partitions = len(consumer.partitions_for_topic(changelog) or ())
        chosen = nearest(self._own, partitions, self.most)
        self.following = {number: standby for number, standby in self.following.items() if number in chosen | self._own}
        for number in chosen - set(self.following):
            self.following[number] = Standby(self._make(number, partitions))
        self.lags = {number: lag for number, lag in self.lags.items() if number in chosen}
        tps = {TopicPartition(changelog, number): self.following[number].offset for number in sorted(chosen)}
        if not tps:
            consumer.unsubscribe()
            return
        consumer.assign(list(tps))
        for tp, offset in tps.items():
            if offset:
                consumer.seek(tp, offset)
        log.info("standing by for partitions %s", ", ".join(map(str, sorted(chosen))))

    async def _apply(self, number: int, records: Sequence[Any]) -> None:
        async with self._turn:
            standby = self.following.get(number)
            if standby is None:
                return  # handed over
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, standby.follow, records)
            except Exception as error:  # whatever it is, the owner's partitions do not depend on it
                del self.following[number]
                self.discarded(number, error)
                asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._changed.set)

    async def _look(self, consumer: Any) -> None:
        for tp in consumer.assignment():
            end = consumer.last_stable_offset(tp)
            if end is not None and tp.partition in self.following:
                self.lags[tp.partition] = max(0, end - await consumer.position(tp))
