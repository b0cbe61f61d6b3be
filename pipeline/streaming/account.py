"""What is known of one partition for its metrics: totals as of the last commit, what the warehouse has acknowledged, since when a run waits for it.

In: one call a run, flush or insert from the owner, the flusher and the feeder. Out: plain fields that `streaming.readings` reads at a scrape.
"""

from __future__ import annotations

import time
from collections import deque

from pipeline.partition import NO_WATERMARK, Partition, Run, TopicState
from pipeline.telemetry.meter import Meter
from pipeline.telemetry.metrics import APPLY_SECONDS, LATENCY_SECONDS, RUN_RECORDS


class Account:
    """Of a partition as it was just taken over."""

    def __init__(self, partition: Partition, meter: Meter) -> None:
        self._partition = partition
        self._meter = meter
        self.states: dict[str, TopicState] = {}
        self.reached: dict[str, int] = {}
        self.flush = 0  # number of the last committed one
        self.sunk_event = NO_WATERMARK  # newest event (ms) that the warehouse has acknowledged
        self.ends: dict[str, int] = {}  # newest last stable offset known, by topic
        self._began = time.time()
        self._read_until: dict[str, float] = {}  # Unix time from which what is left to read is younger, by topic
        self.runs: deque[tuple[int, int]] = deque()  # (flush that takes it, broker timestamp of its first record), not yet acknowledged
        self._events: deque[tuple[int, int]] = deque()  # (flush, newest event), not yet acknowledged
        self.snapshot()
        self.committed()
        self.sunk(partition.sunk_flush)

    def applied(self, run: Run, began: float) -> None:
        """A run has been applied, which began at `began` (time.perf_counter)."""
        self.runs.append((self._partition.flushed + 1, run.records[0].timestamp))
        self._read_until[run.topic] = run.records[-1].timestamp / 1000
        self._meter.observe(RUN_RECORDS, len(run.records))
        self._meter.observe(APPLY_SECONDS, time.perf_counter() - began)

    def look(self, topic: str, end: int) -> None:
        """The topic's last stable offset is at least `end`; -1: not known."""
        self.ends[topic] = end = max(end, self.ends.get(topic, 0))
        if self.reached.get(topic, 0) >= end:
            self._read_until[topic] = time.time()

    def lag_seconds(self, topic: str, now: float) -> float:
        """Largest age that the oldest record behind the position can have; since the take-over when nothing was read yet."""
        return max(0.0, now - self._read_until.get(topic, self._began))

    def snapshot(self) -> None:
        """The partition's snapshot was taken just now; states are replaced by new ones, never changed."""
        self._taken = (self._partition.flushed, dict(self._partition.states), self._partition.reached)

    def committed(self) -> None:
        """What `snapshot` saw is committed."""
        self.flush, self.states, self.reached = self._taken
        newest = max((state.watermark for state in self.states.values()), default=NO_WATERMARK)
        self._events.append((self.flush, newest))

    def sunk(self, n: int) -> None:
        """The warehouse has acknowledged everything up to flush `n`."""
        while self._events and self._events[0][0] <= n:
            self.sunk_event = self._events.popleft()[1]
        now = time.time()
        while self.runs and self.runs[0][0] <= n:
            self._meter.observe(LATENCY_SECONDS, max(0.0, now - self.runs.popleft()[1] / 1000))
