"""Duplicates by event id within a window of event time.

In: hashes of event ids and their ts, in the order read. Out: which of them were accepted before. Called by `pipeline.partition` before the tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.columns import I64, U64
from pipeline.tables.kernel import jit, prefetch
from pipeline.tables.slices import SliceArrays, Slices, home_slot, slice_full, slice_position
from pipeline.tables.table import Arrays

DONE, NO_SLICE, FULL = 0, 1, 2
AHEAD = 8  # events: their slots come from memory meanwhile
SLICES_OF_LATENESS = 12  # so at most 1/12 more than needed is remembered


@jit
def _find(slices: SliceArrays, k: int, key: int, ts: int, window: int) -> int:
    """-1 when `key` is in slice k within `window` of `ts`, else the empty slot where it would go."""
    offset, mask = slices.offset[k], slices.slots[k] - 1
    at = home_slot(key, mask)
    while True:
        word = offset + 2 * at
        if slices.words[word] == 0:
            return word
        if slices.words[word] == key and abs(slices.words[word + 1] - ts) <= window:
            return -1
        at = (at + 1) & mask


@jit
def _judge(slices: SliceArrays, slice_ms: int, window: int, keys: I64, ts: I64, i: int, out: npt.NDArray[np.bool_]) -> tuple[int, int, int]:
    """Judge events from i on, remembering the new ones. (status, i, slice): when not DONE, the caller makes room and goes on from there.

    With window -1 nothing is a duplicate.
    """
    number, k, before, after = np.int64(-1), np.int64(-1), np.int64(-1), np.int64(-1)
    while i < len(ts):
        t = ts[i]
        if t // slice_ms != number:
            number = t // slice_ms
            k, before, after = slice_position(slices, number), slice_position(slices, number - 1), slice_position(slices, number + 1)
        if k < 0:
            return NO_SLICE, i, number
        if i + AHEAD < len(ts):
            prefetch(slices.words, slices.offset[k] + 2 * home_slot(keys[i + AHEAD], slices.slots[k] - 1))
        if slice_full(slices, k, 1):
            return FULL, i, k
        at = _find(slices, k, keys[i], t, window)
        if at >= 0 and before >= 0 and t - window < number * slice_ms and _find(slices, before, keys[i], t, window) < 0:
            at = -1
        if at >= 0 and after >= 0 and t + window >= (number + 1) * slice_ms and _find(slices, after, keys[i], t, window) < 0:
            at = -1
        out[i] = at < 0
        if at >= 0:
            slices.words[at] = keys[i]
            slices.words[at + 1] = t
            slices.used[k] += 1
        i += 1
    return DONE, i, 0


class Seen:
    """Accepted event ids, 16 bytes each and as much of free slots, until no copy of them can be accepted any more.

    An exact copy has the same ts, so it is recognised for as long as it would not be too late anyway.
    """

    def __init__(self, deduplication_ms: int, lateness_ms: int) -> None:
        self.window_ms = deduplication_ms
        self.slice_ms = max(
            deduplication_ms, lateness_ms // SLICES_OF_LATENESS, 60_000
        )  # neighbours suffice: none is shorter than the window
        self.slices = Slices()

    def __len__(self) -> int:
        return len(self.slices)

    def duplicates(self, event_id: U64, ts: I64) -> npt.NDArray[np.bool_]:
        """Mask [n]: the same id was accepted before, in an earlier call or further up, with a ts at most the window away. The others are remembered."""
        return self._judge(event_id, ts, self.window_ms)

    def remember(self, event_id: U64, ts: I64) -> None:
        """Events [n] that were accepted, as a restore has them."""
        self._judge(event_id, ts, -1)

    def _judge(self, event_id: U64, ts: I64, window: int) -> npt.NDArray[np.bool_]:
        out = np.zeros(len(ts), np.bool_)
        keys, stamps = np.ascontiguousarray(event_id).view(np.int64), np.ascontiguousarray(ts)
        status, i = -1, 0
        while status != DONE:
            status, i, which = _judge(self.slices.arrays, self.slice_ms, window, keys, stamps, i, out)
            if status == NO_SLICE:
                self.slices.add(which, 2)
            elif status == FULL:
                self.slices.grow(which)
        return out

    def expire(self, horizon: int) -> None:
        """Forget whole slices before horizon − window: no event with ts < horizon comes any more."""
        self.slices.keep((self.slices.arrays.number + 1) * self.slice_ms > horizon - self.window_ms)

    def dump(self) -> Arrays:
        """Ids and stamps of all that is remembered."""
        entries = [self.slices.entries(k) for k in range(len(self.slices.arrays.number))]
        both: npt.NDArray[Any] = np.concatenate([np.empty((0, 2), np.int64), *entries])
        return {"event_id": both[:, 0].copy().view(np.uint64), "ts": both[:, 1].copy()}

    def load(self, arrays: Arrays) -> None:
        self.slices = Slices()
        self.remember(arrays["event_id"], arrays["ts"])
