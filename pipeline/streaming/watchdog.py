"""Whether the worker makes progress: committed offsets held against the ends of the topics, asked of the broker by a client of its own.

A worker that is stuck ends itself, and whatever supervises it starts it again: a restart is exact. An outage of Kafka or of the warehouse, a rebalance,
a restore, a slow transaction and brakes are reasons to wait; none of them is being stuck, unless a rebalance or a restore does not move itself while Kafka
answers. `streaming.worker` runs it; its view of the ends feeds the lag metrics.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiokafka
from aiokafka.structs import TopicPartition

from pipeline.streaming.changelog import STOP_SECONDS
from pipeline.streaming.ending import end_process
from pipeline.streaming.owner import Owned, Owner
from pipeline.telemetry.metrics import PROBE_ERRORS
from pipeline.telemetry.server import State

log = logging.getLogger("shopstream.watchdog")

PROBE_SECONDS = 15.0
ANSWER_SECONDS = 10.0
BEAT_SECONDS = 1.0
TAKING_SECONDS = 120.0
"""A rebalance waits a minute for members that do not come back, a restore does not tell of the loading of one snapshot: more than that is being stuck."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One topic partition at one probe. `waits`: why it has not to move, '' when nothing holds it."""

    end: int
    position: int
    waits: str = ""


@dataclass(frozen=True, slots=True)
class Stall:
    """Behind at every probe since `since` (monotonic seconds) with the same committed position."""

    position: int
    end: int
    since: float


Stalls = dict[TopicPartition, Stall]


def stalls_after(before: Mapping[TopicPartition, Stall], seen: Mapping[TopicPartition, Seen], now: float) -> Stalls:
    """The stalls after a probe at `now` that saw `seen`, with `before` those after the probe before it; without them after one that failed."""
    after = {}
    for tp, at in seen.items():
        if at.waits or at.position >= at.end:
            continue
        known = before.get(tp)
        after[tp] = Stall(at.position, at.end, known.since if known is not None and known.position == at.position else now)
    return after


def probe_seconds(stuck_seconds: float) -> float:
    """How often to look so that being stuck for `stuck_seconds` (0: never) is seen soon after."""
    return min(PROBE_SECONDS, stuck_seconds / 4) if stuck_seconds else PROBE_SECONDS


def stuck(stalls: Mapping[TopicPartition, Stall], now: float, seconds: float) -> list[TopicPartition]:
    """Those that have stood still for `seconds` or longer."""
    return sorted(tp for tp, stall in stalls.items() if now - stall.since >= seconds)


@dataclass(slots=True)
class Watchdog:
    """Probes every `probe_seconds`. `seconds`: how long to stand still is being stuck; 0: never end the process."""

    owner: Owner
    seconds: float
    probe_seconds: float = PROBE_SECONDS
    end: Callable[[str], None] = end_process
    clock: Callable[[], float] = time.monotonic
    stalls: Stalls = field(default_factory=dict)
    _consumer: Any = None
    _probed: float | None = None
    _takes: dict[int, float] = field(default_factory=dict)  # when each partition was last taken over, as of the last probe
    _taking: object = None  # how far rebalance and restores were at the last probe, None when there is nothing to take over
    _taking_since: float = 0.0
    _condemned: bool = False

    async def run(self) -> None:
        """For ever: probe, judge."""
        try:
            while True:
                await asyncio.sleep(self.probe_seconds)
                await self.look()
        finally:
            await self._drop()

    async def look(self) -> None:
        """One probe and its verdict."""
        tps = self.owner.source_partitions(self.owner.owned or [0])  # asked in any case: whether Kafka answers
        try:
            ends = await self._ends(tps)
        except Exception as error:
            log.debug("the ends of the topics are not known: %r", error)
            self.owner.meter.count(PROBE_ERRORS)
            await self._drop()
            self.stalls, self._probed, self._taking, self._condemned = {}, None, None, False
            return
        self.judge(ends)

    def judge(self, ends: Mapping[TopicPartition, int]) -> None:
        """Hold the ends (last stable offsets, of the owned partitions) against what is committed. Two verdicts in a row end the process."""
        now = self.clock()
        if self._probed is not None and now - self._probed > 3 * (self.probe_seconds + ANSWER_SECONDS):
            self.stalls, self._taking = {}, None  # the process itself was stopped for a while: nobody looked
        self._probed = now
        seen = {tp: self._see(tp, end) for tp, end in ends.items()}
        self._takes = {number: recovery.started for number, recovery in self.owner.recoveries.items()}
        self.stalls = stalls_after(self.stalls, seen, now)
        taking = self._how_far_taken()
        if taking is None or taking != self._taking:
            self._taking, self._taking_since = taking, now
        found = self._verdict()
        if found and self._condemned:
            self.end(f"stuck: {found}; the worker ends so that it is started again")
        elif found:
            log.error("no progress: %s", found)
        self._condemned = bool(found)

    def _how_far_taken(self) -> object:
        """Equal to what it was before when neither the rebalance nor a restore has moved; None when nothing is to be taken over, or the warehouse is asked first."""
        owner = self.owner
        recoveries = {number: owner.recoveries[number] for number in owner.taking if number in owner.recoveries}
        if (not owner.held and not owner.taking) or any(recovery.asks for recovery in recoveries.values()):
            return None
        return owner.held, owner.rebalances, {number: (r.started, r.position, r.applied) for number, r in recoveries.items()}

    def _verdict(self) -> str:
        """What was stuck at the last probe, '' when nothing was: after it nobody knows, a broker that does not answer any more is no proof."""
        if not self.seconds or self._probed is None:
            return ""
        found = self._told(stuck(self.stalls, self._probed, self.seconds))
        standing = self._probed - self._taking_since
        if not found and self._taking is not None and standing >= max(self.seconds, TAKING_SECONDS):
            what = "the group has been rebalancing" if self.owner.held else "taking over partitions has not gone on"
            return f"{what} for {standing:.0f} s while Kafka answers"
        return found

    def _see(self, tp: TopicPartition, end: int) -> Seen:
        owned = self.owner.owned.get(tp.partition)
        if owned is None:
            return Seen(end, 0, "given up just now")
        owned.account.look(tp.topic, end)
        return Seen(end, owned.account.reached.get(tp.topic, self.owner.starts.get(tp, 0)), self._waits(tp, owned))

    def _waits(self, tp: TopicPartition, owned: Owned) -> str:
        if self.owner.held:
            return "the group rebalances"
        if self.owner.recoveries[tp.partition].started != self._takes.get(tp.partition):
            return "taken over just now"
        if tp.topic in owned.braked:
            return "braked"
        if any(one.began is not None and self.clock() - one.began > self.probe_seconds for one in self.owner.owned.values()):
            return "a transaction takes its time"  # it has a limit of its own, and the other partitions' next ones wait for it
        return "" if self.owner.sink_ready.is_set() else "the warehouse is away"

    def _told(self, tps: Iterable[TopicPartition]) -> str:
        return ", ".join(
            f"{tp.topic}[{tp.partition}] has been at offset {self.stalls[tp].position} of {self.stalls[tp].end} for "
            f"{self.stalled_seconds(tp):.0f} s"
            for tp in tps
        )

    def stalled_seconds(self, tp: TopicPartition) -> float:
        """How long a topic partition had stood still at the last probe though it had something to read."""
        return self._probed - self.stalls[tp].since if self._probed is not None and tp in self.stalls else 0.0

    def health(self) -> State:
        """Not good once something is stuck."""
        found = self._verdict()
        details = {
            "stalled": {f"{tp.topic}[{tp.partition}]": round(self.stalled_seconds(tp), 1) for tp in sorted(self.stalls)},
            "last_probe_seconds_ago": None if self._probed is None else round(self.clock() - self._probed, 1),
        }
        return State(not found, found or "committed offsets move, or there is a reason to wait", details)

    async def _ends(self, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        if self._consumer is None:
            consumer = aiokafka.AIOKafkaConsumer(**self.owner.client, isolation_level="read_committed", enable_auto_commit=False)
            self._consumer = consumer
            await asyncio.wait_for(consumer.start(), ANSWER_SECONDS)
        return await asyncio.wait_for(self._consumer.end_offsets(tps), ANSWER_SECONDS)

    async def _drop(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            try:
                await asyncio.wait_for(consumer.stop(), STOP_SECONDS)
            except Exception as error:
                log.debug("the probe's client did not stop: %r", error)


class LoopGuard:
    """A thread that ends the process when the event loop has not run for `seconds`; time in which the whole process was stopped does not count."""

    def __init__(self, seconds: float, end: Callable[[str], None] = end_process, beat_seconds: float = BEAT_SECONDS) -> None:
        self._seconds = seconds
        self._end = end
        self._beat_seconds = beat_seconds
        self._beats = 0
        self._over = threading.Event()

    async def run(self) -> None:
        """For ever: show that the loop runs. The thread lives as long."""
        thread = threading.Thread(target=self._watch, name="loop-guard", daemon=True)
        thread.start()
        try:
            while True:
                self._beats += 1
                await asyncio.sleep(self._beat_seconds)
        finally:
            self._over.set()

    def _watch(self) -> None:
        known, silent = -1, 0.0
        while not self._over.wait(self._beat_seconds):
            beats = self._beats
            known, silent = beats, silent + self._beat_seconds if beats == known else 0.0
            if silent >= self._seconds:
                self._end(f"stuck: the event loop has not run for {silent:.0f} s; the worker ends so that it is started again")
                return
