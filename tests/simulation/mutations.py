"""The protocol broken on purpose, one invariant at a time: every one must be caught, or the simulation proves nothing.

Each is a `Worker` with one method overridden as someone might write it who does not know the rule; `MUTATIONS` names the rule that it breaks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import numpy as np

from pipeline.changelog import ChangelogError, NamedArrays, Part
from pipeline.partition import Flush, OutRecord, Partition, Run, TopicState
from pipeline.partition.replica import Delta
from pipeline.sinks.warehouse import SinkUnavailable
from pipeline.streaming.standby import Standby
from schemas.rows import Rows
from tests.simulation.case import TOPICS
from tests.simulation.log import Fenced, Log, Producer
from tests.simulation.schedule import Breakage
from tests.simulation.warehouse import KEYS
from tests.simulation.worker import NoReply, Owned, Records, Request, Steps, Worker

_BESIDE: WeakKeyDictionary[Log, dict[str, Any]] = WeakKeyDictionary()


class PositionApart(Worker):
    """The position is committed to the group after the flush, not within it."""

    def transact(self, producer: Producer, flush: Flush) -> Steps:
        number = changelog_of(producer)[1]
        states = msgspec.json.encode(self.owned[number].partition.states)
        first = yield from super().transact(producer, flush)
        yield Request(f"commit positions {number}", lambda _: beside(self.log).setdefault("group", {}).update({number: states}))
        return first

    def restore(self, partition: Partition, records: Records) -> None:
        super().restore(partition, records)
        stored = beside(self.log).get("group", {}).get(partition.number)
        partition.states = msgspec.json.decode(stored, type=dict[str, TopicState]) if stored else {}


class PositionAfterAwait(Worker):
    """The changed rows are taken, then something is awaited, then the position is taken."""

    def snapshot(self, partition: Partition) -> Steps:
        taken, partition._pending = partition._pending, type(partition._pending)()
        yield Request("something awaited", lambda _: None, SinkUnavailable)
        since, partition._pending = partition._pending, taken
        flush = partition.snapshot()
        partition._pending = since
        return flush

    def flush(self, number: int) -> Steps:
        try:
            yield from super().flush(number)
        except SinkUnavailable:
            self.lost(number)


class SinkBeforeCommit(Worker):
    """Rows go to the warehouse as soon as they are taken, before their transaction is committed."""

    def snapshot(self, partition: Partition) -> Steps:
        flush = yield from super().snapshot(partition)
        if flush is not None:
            partition.committed(flush)
            partition._captured = partition._sendable
        return flush


class CommitTakenForGranted(Worker):
    """A commit without a reply counts as done."""

    def transact(self, producer: Producer, flush: Flush) -> Steps:
        try:
            return (yield from super().transact(producer, flush))
        except NoReply:
            return None


class FenceAfterReading(Worker):
    """The changelog is read first, then the former owner is fenced."""

    def fence_and_read(self, number: int) -> Steps:
        while True:
            try:
                records = yield from self.read_changelog(number)
                return (yield from self.fence(number)), records, None
            except NoReply:
                pass


class HeldStateTrusted(Worker):
    """State given up earlier is used again with a new producer, whoever had the partition meanwhile."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.attic: dict[int, Owned] = {}

    def assigned(self, wanted: set[int]) -> None:
        self.attic |= {number: owned for number, owned in self.owned.items() if number not in wanted}
        super().assigned(wanted)

    def take(self, number: int) -> Steps:
        kept = self.attic.pop(number, None)
        if kept is None or ("flush", number) in self.tasks:
            yield from super().take(number)
            return
        while True:
            try:
                self.owned[number] = Owned(kept.partition, (yield from self.fence(number)))
                break
            except NoReply:
                pass
        self.join(number)


class NotReadToTheEnd(Worker):
    """Reading ends one record before the end of the changelog."""

    def changelog_end(self, number: int) -> int:
        return super().changelog_end(number) - 2  # the record and its marker


class StandbyAsItIs(Worker):
    """A standby takes over without what came since it last read."""

    def from_standby(self, standby: Standby, rest: Records) -> Partition | None:
        return super().from_standby(standby, [])


class StandbyUncommitted(Worker):
    """A standby follows what was aborted, too."""

    def follow(self, number: int, most: int) -> bool:
        read = self.log.read
        self.log.read = partial(read, committed=False)  # type: ignore[method-assign]
        try:
            return super().follow(number, most)
        finally:
            self.log.read = read  # type: ignore[method-assign]


class ReadUncommitted(Worker):
    """The changelog is read with what was aborted."""

    def read_changelog(self, number: int, offset: int | None = None) -> Steps:
        yield Request("read changelog", lambda _: None)
        found, _ = self.log.read(TOPICS.changelog, number, offset or 0, committed=False)
        return [(record.key, record.value) for record in found]


class SeekOneFurther(Worker):
    """Reading goes on one record after the position."""

    def positions(self, partition: Partition) -> dict[str, int]:
        return {topic: offset + 1 for topic, offset in super().positions(partition).items()}


class SeekUnchecked(SeekOneFurther):
    """The same, and the continuity of runs is not checked either."""

    def offer(self, number: int, topic: str) -> bool:
        runs = self.runs[topic, number]
        if runs:
            runs[0] = runs[0]._replace(begin=-1)
        return super().offer(number, topic)


class StaleRunsOffered(Worker):
    """Runs that were fetched before a seek are applied."""

    def current(self, run: Run) -> bool:
        return True


class RejectsApart(Worker):
    """Dead letters and re-keyed records go out outside of the transaction, before it."""

    def transact(self, producer: Producer, flush: Flush) -> Steps:
        apart = [r for r in flush.records if r.topic != TOPICS.changelog]
        yield Request("send apart", lambda _: [self._send(r) for r in apart])
        state = [r for r in flush.records if r.topic == TOPICS.changelog]
        return (yield from super().transact(producer, Flush(flush.n, state, flush.snapshot)))

    def _send(self, r: OutRecord) -> None:
        self.log.append(r.topic, r.partition, r.key, r.value, r.headers)


class NoTransaction(Worker):
    """A flush is sent record by record."""

    def transact(self, producer: Producer, flush: Flush) -> Steps:
        offsets = []
        for r in flush.records:
            sent = yield Request("send", lambda _, r=r: self._send(producer, r))
            if r.topic == TOPICS.changelog:
                offsets.append(sent)
        return min(offsets, default=None)

    def _send(self, producer: Producer, r: OutRecord) -> int:
        if self.log.coordinators[producer.transactional_id].epoch != producer.epoch:
            raise Fenced(producer.transactional_id)
        return self.log.append(r.topic, r.partition, r.key, r.value, r.headers)


class DeletedBeforeCommit(Worker):
    """The changelog before a snapshot is deleted while the snapshot's transaction is open."""

    def transact(self, producer: Producer, flush: Flush) -> Steps:
        if flush.snapshot:
            end = len(self.log.at(*changelog_of(producer)).entries)
            self.log.delete_before(*changelog_of(producer), end)
        return (yield from super().transact(producer, flush))


class DeletedTooFar(Worker):
    """The changelog is deleted up to its end instead of up to the snapshot."""

    def delete_before(self, number: int, offset: int) -> Steps:
        yield from super().delete_before(number, 1 << 40)


class GoesOnAfterDeletion(Worker):
    """A restore expects the rest of a snapshot though the former owner deleted it meanwhile.

    Chance finds it in one schedule of some thousand, so it has a test of its own.
    """

    def restore(self, partition: Partition, records: Records) -> None:
        expected = 0
        for _, value in records:
            part = msgspec.msgpack.decode(value or b"", type=Part)
            if part.index != expected:
                raise ChangelogError(f"part {part.index} of {part.count} does not follow")
            expected = (part.index + 1) % part.count
        super().restore(partition, records)


class SunkWithoutReply(Worker):
    """An insert that nobody acknowledged counts as done."""

    def insert(self, parts: list[Rows]) -> Steps:
        steps = super().insert(parts)
        with contextlib.suppress(SinkUnavailable):
            yield next(steps)


class OnlyNewRows(Worker):
    """After a restart rows that the warehouse never acknowledged are not sent again."""

    def restore(self, partition: Partition, records: Records) -> None:
        super().restore(partition, records)
        partition.sunk(partition.flushed)


class SentOnce(Worker):
    """Rows are confirmed up to the newest flush, not up to the flush that was sent."""

    def feed(self) -> Steps:
        owned = list(self.owned.values())
        yield from super().feed()
        for one in owned:
            one.partition.sunk(one.partition.flushed)


class VersionFromProcess(Worker):
    """Versions count the inserts of the process, so they begin again with it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.versions = count(1)

    def insert(self, parts: list[Rows]) -> Steps:
        yield from super().insert([versioned(rows, next(self.versions)) for rows in parts])


class VersionFromClock(Worker):
    """Versions are the time of the insert, so what a zombie inserts late is the newest."""

    def insert(self, parts: list[Rows]) -> Steps:
        def act(tables: int) -> None:
            for rows in parts:
                now = tick(self.log)
                self.warehouse.insert(versioned(rows, now), tables or len(KEYS))

        while True:
            try:
                yield Request("insert", act, SinkUnavailable)
                return
            except SinkUnavailable:
                pass


class Increments(Worker):
    """Rows are added to what the warehouse has instead of replacing it."""

    def insert(self, parts: list[Rows]) -> Steps:
        def act(tables: int) -> None:
            for rows in parts:
                if "kpi_cells" in rows:
                    columns = dict(rows["kpi_cells"])
                    known = beside(self.log).setdefault("sent", {})
                    keys = list(zip(*(list(columns[name]) for name in KEYS["kpi_cells"]), strict=True))
                    values = [int(v) for v in columns["value"]]
                    stored = self.warehouse.newest["kpi_cells"]
                    columns["value"] = [
                        (stored[k][1][0] if k in stored else 0) + v - known.get((id(self), k), 0) for k, v in zip(keys, values, strict=True)
                    ]
                    known.update({(id(self), k): v for k, v in zip(keys, values, strict=True)})
                    now = tick(self.log)
                    rows = {**rows, "kpi_cells": columns | {"version": [now] * len(values)}}
                self.warehouse.insert(rows, tables or len(KEYS))

        while True:
            try:
                yield Request("insert", act, SinkUnavailable)
                return
            except SinkUnavailable:
                pass


class _ReplaySkipping(Partition):
    def _replay(self, deltas: Sequence[Delta]) -> None:
        apply = self.board.apply
        if deltas[0].n % 2:
            self.board.apply = lambda columns, user=None: None  # type: ignore[method-assign, assignment, misc, return-value]
        super()._replay(deltas)
        self.board.apply = apply  # type: ignore[method-assign]


class _DuplicatesForgotten(Partition):
    def _replay(self, deltas: Sequence[Delta]) -> None:
        remember = self.board.seen.remember
        self.board.seen.remember = lambda event_id, ts: None  # type: ignore[method-assign]
        super()._replay(deltas)
        self.board.seen.remember = remember  # type: ignore[method-assign]


class _OneWatermark(Partition):
    def _judge_lateness(self, ts: Any, watermark: int, mixed: bool) -> Any:
        return super()._judge_lateness(ts, max([watermark, *(state.watermark for state in self.states.values())]), mixed)


class _RejectsForgotten(Partition):
    def _load(self, n: int, position: Any, arrays: NamedArrays) -> None:
        super()._load(n, position, arrays)
        self._rejects = []


class _FlushNumbersForgotten(Partition):
    def restore(self, records: Any) -> None:
        super().restore(records)
        self.flushed = max(0, self.flushed - 1)


class _OtherPartition(Worker):
    kind: type[Partition] = Partition

    def new_partition(self, number: int) -> Partition:
        partition = self.kind(number, self.case.partitions, self.case.definitions, TOPICS, self.case.options)
        if self.case.evict:
            partition._evict_at = 0
        return partition


class ReplaySkipsDelta(_OtherPartition):
    """A restore leaves out a delta."""

    kind = _ReplaySkipping


class DuplicatesForgotten(_OtherPartition):
    """A restore does not remember the event ids of deltas."""

    kind = _DuplicatesForgotten


class OneWatermark(_OtherPartition):
    """Lateness is judged by one watermark for all topics."""

    kind = _OneWatermark


class RejectsForgotten(_OtherPartition):
    """A restore forgets rejects that the warehouse has not acknowledged."""

    kind = _RejectsForgotten


class FlushNumberRepeated(_OtherPartition):
    """A flush after a restore has the number of the last one before it."""

    kind = _FlushNumbersForgotten


def beside(log: Log) -> dict[str, Any]:
    """What a broken protocol keeps outside of the log."""
    return _BESIDE.setdefault(log, {})


def tick(log: Log) -> int:
    """A clock that all workers share."""
    beside(log)["clock"] = beside(log).get("clock", 0) + 1
    return int(beside(log)["clock"])


def changelog_of(producer: Producer) -> tuple[str, int]:
    return TOPICS.changelog, int(producer.transactional_id.rpartition("-")[2])


def versioned(rows: Rows, version: int) -> Rows:
    return {table: {**columns, "version": np.full(len(columns["version"]), version)} for table, columns in rows.items()}


MUTATIONS: dict[str, Breakage] = {
    "the former owner is not fenced": Breakage(fences=False),
    **{
        (worker.__doc__ or "").rstrip("."): Breakage(worker)
        for worker in (
            PositionApart, PositionAfterAwait, SinkBeforeCommit, CommitTakenForGranted, FenceAfterReading, HeldStateTrusted, NotReadToTheEnd,
            StandbyAsItIs, StandbyUncommitted, ReadUncommitted, SeekOneFurther, SeekUnchecked, StaleRunsOffered, RejectsApart, NoTransaction, DeletedBeforeCommit, DeletedTooFar,
            SunkWithoutReply, OnlyNewRows, SentOnce, VersionFromProcess, VersionFromClock, Increments, ReplaySkipsDelta, DuplicatesForgotten,
            OneWatermark, RejectsForgotten, FlushNumberRepeated,
        )
    },
}  # fmt: skip
"""What is broken, and how."""
