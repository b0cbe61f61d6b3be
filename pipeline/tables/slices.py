"""Hash tables of one span of event time each, in one pool of words: a whole span is dropped at once when it is over.

`pipeline.tables.seen` keeps event ids in them, `pipeline.tables.kpi` the users it has counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.columns import I64
from pipeline.tables.kernel import grown, jit

FIRST_SLOTS = 64
_MIX = np.uint64(0x9E3779B97F4A7C15)


class SliceArrays(NamedTuple):
    """Slice k is `slots[k]` slots of `stride[k]` words from `offset[k]` on; a slot's first word is its key, 0 in an empty one."""

    words: I64  # the pool
    number: I64  # [slices] ascending
    offset: I64  # [slices]
    slots: I64  # [slices] powers of two
    stride: I64  # [slices]
    used: I64  # [slices] slots in use


@jit
def home_slot(key: int, mask: int) -> int:
    h = np.uint64(key) * _MIX
    return np.int64((h ^ (h >> np.uint64(32))) & np.uint64(mask))


@jit
def slice_position(slices: SliceArrays, number: int) -> int:
    """Where slice `number` is in the directory, or -1."""
    k = np.searchsorted(slices.number, number)
    return k if k < len(slices.number) and slices.number[k] == number else -1


@jit
def slice_full(slices: SliceArrays, k: int, adds: int) -> bool:
    """Whether `adds` more entries would fill slice k beyond three quarters: return to Python, `Slices.grow(k)`, call again."""
    return (slices.used[k] + adds) * 4 > slices.slots[k] * 3


@jit
def _move(words: I64, old: int, old_slots: int, new: int, new_slots: int, stride: int) -> None:
    mask = new_slots - 1
    words[new : new + new_slots * stride] = 0
    for slot in range(old_slots):
        source = old + slot * stride
        if words[source] == 0:
            continue
        at = home_slot(words[source], mask)
        while words[new + at * stride] != 0:
            at = (at + 1) & mask
        for w in range(stride):
            words[new + at * stride + w] = words[source + w]


@jit
def _collect(words: I64, offset: int, slots: int, stride: int, out: I64, row: int) -> int:
    for slot in range(slots):
        at = offset + slot * stride
        if words[at] != 0:
            for w in range(stride):
                out[row, w] = words[at + w]
            row += 1
    return row


class Slices:
    """The pool and its directory. Blocks have power-of-two sizes; a freed one is taken again by the next slice of its size."""

    def __init__(self) -> None:
        empty = np.empty(0, np.int64)
        self.arrays = SliceArrays(np.empty(1 << 14, np.int64), empty, empty, empty, empty, empty)
        self._top = 0
        self._free: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return int(self.arrays.used.sum())

    @property
    def nbytes(self) -> int:
        """Pool and directory, bytes."""
        return self._top * 8 + 40 * len(self.arrays.number)

    def _take(self, words: int) -> int:
        free = self._free.get(words)
        if free:
            return free.pop()
        at = self._top
        self._top += words
        if self._top > len(self.arrays.words):
            self.arrays = self.arrays._replace(words=grown(self.arrays.words[:at], max(2 * len(self.arrays.words), self._top)))
        return at

    def add(self, number: int, stride: int, slots: int = FIRST_SLOTS) -> int:
        """A new empty slice, unless it exists; returns its position."""
        a = self.arrays
        k = int(np.searchsorted(a.number, number))
        if k < len(a.number) and a.number[k] == number:
            return k
        at = self._take(slots * stride)
        words = self.arrays.words
        words[at : at + slots * stride] = 0
        new = (number, at, slots, stride, 0)
        self.arrays = SliceArrays(
            words, *(np.concatenate((column[:k], (value,), column[k:])) for column, value in zip(a[1:], new, strict=True))
        )
        return k

    def add_many(self, numbers: I64, stride: int, slots: int = FIRST_SLOTS) -> None:
        """New empty slices, `numbers` ascending; those that exist stay as they are."""
        at = np.searchsorted(self.arrays.number, numbers)
        new = at == np.searchsorted(self.arrays.number, numbers, side="right")
        numbers, at = numbers[new], at[new]
        blocks = np.array([self._take(slots * stride) for _ in numbers], np.int64)
        a = self.arrays
        for block in blocks.tolist():
            a.words[block : block + slots * stride] = 0
        given: tuple[Any, ...] = (numbers, blocks, slots, stride, 0)
        self.arrays = SliceArrays(a.words, *(np.insert(column, at, value) for column, value in zip(a[1:], given, strict=True)))

    def grow(self, k: int) -> None:
        """Twice the slots for slice k."""
        stride, slots, old = int(self.arrays.stride[k]), int(self.arrays.slots[k]), int(self.arrays.offset[k])
        new = self._take(2 * slots * stride)
        _move(self.arrays.words, old, slots, new, 2 * slots, stride)
        self.arrays.offset[k], self.arrays.slots[k] = new, 2 * slots
        self._free.setdefault(slots * stride, []).append(old)

    def keep(self, kept: npt.NDArray[np.bool_]) -> None:
        """Drop the slices whose mask [slices] is false."""
        if kept.all():
            return
        for k in np.flatnonzero(~kept):
            self._free.setdefault(int(self.arrays.slots[k] * self.arrays.stride[k]), []).append(int(self.arrays.offset[k]))
        self.arrays = SliceArrays(self.arrays.words, *(column[kept] for column in self.arrays[1:]))

    def entries(self, k: int) -> I64:
        """Slice k's entries [used, stride], in no order."""
        a = self.arrays
        out = np.empty((int(a.used[k]), int(a.stride[k])), np.int64)
        _collect(a.words, int(a.offset[k]), int(a.slots[k]), int(a.stride[k]), out, 0)
        return out

    def dump(self) -> dict[str, I64]:
        a = self.arrays
        parts = [self.entries(k).ravel() for k in range(len(a.number))]
        return {"number": a.number, "stride": a.stride, "used": a.used, "entries": np.concatenate([np.empty(0, np.int64), *parts])}

    def load(self, arrays: dict[str, I64]) -> None:
        self.__init__()  # type: ignore[misc]
        at, directory = 0, [arrays[name].tolist() for name in ("number", "stride", "used")]
        sizes = [max(FIRST_SLOTS, 1 << (used * 2 - 1).bit_length() if used else 0) for used in directory[2]]
        pool = sum(slots * stride for slots, stride in zip(sizes, directory[1], strict=True))
        self.arrays = self.arrays._replace(words=np.empty(max(len(self.arrays.words), pool), np.int64))  # at once: growing copies all of it
        for number, stride, used, slots in zip(*directory, sizes, strict=True):
            k = self.add(number, stride, slots)
            self.arrays.used[k] = used
            _fill(self.arrays.words, int(self.arrays.offset[k]), slots, stride, arrays["entries"][at : at + used * stride])
            at += used * stride


@jit
def _fill(words: I64, offset: int, slots: int, stride: int, entries: I64) -> None:
    mask = slots - 1
    for row in range(len(entries) // stride):
        at = home_slot(entries[row * stride], mask)
        while words[offset + at * stride] != 0:
            at = (at + 1) & mask
        for w in range(stride):
            words[offset + at * stride + w] = entries[row * stride + w]
