"""Deduplication: which events carry an id that was accepted before, close in time. `pipeline.partition` asks for every batch.

Ids are kept until no copy can be accepted any more (an older event is too late), so an exact copy is recognised at any distance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.columns import I64, U64
from pipeline.tables.kernel import jit

Slice = tuple[U64, I64]
SLICES_PER_LATENESS = 12


@jit
def _seen_near(ids: U64, times: I64, event_id: np.uint64, ts: int, window: int) -> bool:
    mask = np.uint64(len(ids) - 1)
    at = event_id & mask
    while ids[at] != 0:
        if ids[at] == event_id and abs(times[at] - ts) <= window:
            return True
        at = (at + np.uint64(1)) & mask
    return False


@jit
def _remember(ids: U64, times: I64, event_id: np.uint64, ts: int) -> None:
    mask = np.uint64(len(ids) - 1)
    at = event_id & mask
    while ids[at] != 0:
        at = (at + np.uint64(1)) & mask
    ids[at] = event_id
    times[at] = ts


@jit
def _judge(before: Slice, own: Slice, after: Slice, event_id: U64, ts: I64, rows: I64, window: int, out: npt.NDArray[np.bool_]) -> int:
    """Mark the duplicates among the rows of one slice and remember the others; how many were remembered."""
    added = 0
    for row in rows:
        one, at = event_id[row], ts[row]
        known = _seen_near(own[0], own[1], one, at, window)
        known = known or _seen_near(before[0], before[1], one, at, window) or _seen_near(after[0], after[1], one, at, window)
        out[row] = known
        if not known:
            _remember(own[0], own[1], one, at)
            added += 1
    return added


@jit
def _refill(ids: U64, times: I64, old_ids: U64, old_times: I64) -> None:
    for i in range(len(old_ids)):
        if old_ids[i] != 0:
            _remember(ids, times, old_ids[i], old_times[i])


class Seen:
    """Event ids (64-bit hashes) and their times, in slices of event time that are dropped whole. 32 bytes an id at most."""

    def __init__(self, window_ms: int, lateness_ms: int) -> None:
        self.window_ms = window_ms
        self.slice_ms = max(window_ms, lateness_ms // SLICES_PER_LATENESS, 1)
        self._slices: dict[int, Slice] = {}
        self._used: dict[int, int] = {}
        self._none: Slice = (np.zeros(1, np.uint64), np.zeros(1, np.int64))

    def duplicates(self, event_id: U64, ts: I64) -> npt.NDArray[np.bool_]:
        """Which events [n] repeat an id accepted before (or earlier in this batch) at most the window away; the others are remembered."""
        out = np.zeros(len(ts), np.bool_)
        if len(ts):
            numbers = ts // self.slice_ms
            order = np.argsort(numbers, kind="stable")
            for rows in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
                self._judge_slice(int(numbers[rows[0]]), event_id, ts, rows, out)
        return out

    def _judge_slice(self, number: int, event_id: U64, ts: I64, rows: npt.NDArray[np.int64], out: npt.NDArray[np.bool_]) -> None:
        self._room(number, len(rows))
        before, after = self._slices.get(number - 1, self._none), self._slices.get(number + 1, self._none)
        self._used[number] += _judge(before, self._slices[number], after, event_id, ts, rows, self.window_ms, out)

    def _room(self, number: int, more: int) -> None:
        used = self._used.setdefault(number, 0)
        old = self._slices.get(number)
        if old is None or (used + more) * 2 > len(old[0]):
            size = 1 << max(6, ((used + more) * 2 - 1).bit_length() + (old is not None))
            new = (np.zeros(size, np.uint64), np.zeros(size, np.int64))
            if old is not None:
                _refill(new[0], new[1], old[0], old[1])
            self._slices[number] = new

    def remember(self, event_id: U64, ts: I64) -> None:
        """Accepted events of a restored delta."""
        self.duplicates(event_id, ts)

    def expire(self, horizon: int) -> None:
        """No event with ts < horizon will be asked for: forget what is further back than the window."""
        for number in [n for n in self._slices if (n + 1) * self.slice_ms <= horizon - self.window_ms]:
            del self._slices[number], self._used[number]

    def dump(self) -> dict[str, npt.NDArray[Any]]:
        filled = [(ids[ids != 0], times[ids != 0]) for ids, times in self._slices.values()]
        if not filled:
            return {"ids": np.zeros(0, np.uint64), "times": np.zeros(0, np.int64)}
        return {"ids": np.concatenate([f[0] for f in filled]), "times": np.concatenate([f[1] for f in filled])}

    def load(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """The state that `dump` gave; the window may have changed since."""
        self._slices, self._used = {}, {}
        numbers = arrays["times"] // self.slice_ms
        for number in np.unique(numbers):
            chosen = numbers == number
            self._room(int(number), int(chosen.sum()))
            _refill(*self._slices[int(number)], arrays["ids"][chosen], arrays["times"][chosen])
            self._used[int(number)] = int(chosen.sum())
