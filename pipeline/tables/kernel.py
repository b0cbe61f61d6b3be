"""Compiled primitives that the tables share: the user index, the cells, the arena.

A kernel never allocates. State is named tuples of numpy arrays owned by small Python classes; a kernel that meets a full
array returns the row it stopped at, its caller grows the array and calls again from there. A kernel is deterministic
and reads no clock.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from pipeline.cache import kernel_cache
from pipeline.columns import I32, I64, U8, U64

if not numba.config.CACHE_DIR:  # NUMBA_CACHE_DIR wins
    numba.config.CACHE_DIR = str(kernel_cache())

# `_nrt=False`: numba then counts no references to arrays, two atomic operations an array a call, and refuses a kernel that allocates.
jit = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy", _nrt=False)

_P1 = np.uint64(0x9E3779B185EBCA87)  # xxHash's primes: odd, and their bits well mixed
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)


@intrinsic
def prefetch(_context: Any, array: Any, index: Any) -> Any:
    """Bring the cache line of an array's element (counted flat) near; an index out of bounds does nothing. Random rows of large state cost most of a kernel's time."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
        builder.call(function, [address, word(0), word(3), word(1)])  # to read, near, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def grown(array: npt.NDArray[Any], rows: int, fill: int | None = None) -> npt.NDArray[Any]:
    """A copy of `array` with `rows` rows; the new ones are `fill`, or not initialised."""
    bigger = np.empty((rows, *array.shape[1:]), array.dtype)
    bigger[: len(array)] = array
    if fill is not None:
        bigger[len(array) :] = fill
    return bigger


# --- histogram -------------------------------------------------------------------------------------------------------

BUCKETS_PER_DOUBLING = 8
HISTOGRAM_UPPER: I64 = np.unique(np.floor(2.0 ** (np.arange(0, 41 * BUCKETS_PER_DOUBLING) / BUCKETS_PER_DOUBLING)).astype(np.int64))
"""Upper bounds (inclusive, ms) of a duration's buckets; bucket 0 is (−inf, 1]. 2^(1/8): a bucket is at most 9.05% wide. Integers, so SQL can repeat them."""


@jit
def histogram_bucket(upper: I64, ms: int) -> int:
    """The first bucket whose upper bound is not below `ms`; the last for anything larger."""
    low, high = 0, len(upper) - 1
    while low < high:
        middle = (low + high) >> 1
        if upper[middle] < ms:
            low = middle + 1
        else:
            high = middle
    return low


# --- cells: every aggregate of a partition --------------------------------------------------------------------------


class CellArrays(NamedTuple):
    """Open addressing from a three-word key to a value; rows are dense, in order of creation."""

    slots: I32  # [power of two] row or -1
    keys: I64  # [capacity, 3] (metric << 32 | variant, window start ms, string id a << 32 | string id b)
    values: I64  # [capacity] absolute value: a count, or a sum in 1/MONEY_SCALE
    versions: I64  # [capacity] the flush that last changed it
    dirty: U8  # [capacity] 1 when changed since the last flush
    changed: I32  # [capacity] rows that are dirty, meta[1] of them
    meta: I64  # [2] rows in use, rows dirty


@jit
def _key_slot(k0: int, k1: int, k2: int, mask: int) -> int:
    h = np.uint64(k0) * _P1
    h = (h ^ (h >> np.uint64(29)) ^ np.uint64(k1)) * _P2
    h = (h ^ (h >> np.uint64(32)) ^ np.uint64(k2)) * _P3
    return np.int64((h ^ (h >> np.uint64(31))) & np.uint64(mask))


@jit
def cells_room(cells: CellArrays, adds: int) -> bool:
    """Whether `adds` more new cells fit. Ask before each event or user; when not, return to Python, which grows."""
    return cells.meta[0] + adds <= len(cells.values)


@jit
def cells_add(cells: CellArrays, k0: int, k1: int, k2: int, delta: int) -> None:
    """Add `delta` to a cell, creating it at 0. The caller has made sure of room."""
    mask = len(cells.slots) - 1
    at = _key_slot(k0, k1, k2, mask)
    row = cells.slots[at]
    while row >= 0 and not (cells.keys[row, 0] == k0 and cells.keys[row, 1] == k1 and cells.keys[row, 2] == k2):
        at = (at + 1) & mask
        row = cells.slots[at]
    if row < 0:
        row = np.int32(cells.meta[0])
        cells.meta[0] += 1
        cells.slots[at] = row
        cells.keys[row, 0] = k0
        cells.keys[row, 1] = k1
        cells.keys[row, 2] = k2
        cells.values[row] = 0
        cells.versions[row] = 0
        cells.dirty[row] = 0
    cells.values[row] += delta
    if cells.dirty[row] == 0:
        cells.dirty[row] = 1
        cells.changed[cells.meta[1]] = row
        cells.meta[1] += 1


@jit
def _cells_index(slots: I32, keys: I64, rows: int) -> None:
    mask = len(slots) - 1
    for row in range(rows):
        at = _key_slot(keys[row, 0], keys[row, 1], keys[row, 2], mask)
        while slots[at] >= 0:
            at = (at + 1) & mask
        slots[at] = row


class Cells:
    """All aggregates of one partition: metric, window and dimension values to an absolute value and the flush that last changed it."""

    def __init__(self, capacity: int = 4096) -> None:
        self.arrays = self._allocate(capacity, 0)

    @staticmethod
    def _allocate(capacity: int, rows: int) -> CellArrays:
        size = 1 << max(4, (capacity * 2 - 1).bit_length())
        return CellArrays(
            np.full(size, -1, np.int32), np.zeros((capacity, 3), np.int64), np.zeros(capacity, np.int64), np.zeros(capacity, np.int64),
            np.zeros(capacity, np.uint8), np.zeros(capacity, np.int32), np.array([rows, 0], np.int64),
        )  # fmt: skip

    def __len__(self) -> int:
        return int(self.arrays.meta[0])

    def grow(self, adds: int) -> None:
        """Room for at least `adds` more cells."""
        self._rebuild(np.arange(len(self)), max(2 * len(self.arrays.values), len(self) + adds))

    def keep(self, rows: npt.NDArray[np.bool_]) -> None:
        """Forget the cells whose mask [rows in use] is false; they must be final and acknowledged by the sink."""
        self._rebuild(np.flatnonzero(rows), max(4096, int(rows.sum()) * 2))

    def _rebuild(self, rows: npt.NDArray[np.intp], capacity: int) -> None:
        old, new = self.arrays, self._allocate(capacity, len(rows))
        n = len(rows)
        new.keys[:n], new.values[:n], new.versions[:n], new.dirty[:n] = (
            old.keys[rows],
            old.values[rows],
            old.versions[rows],
            old.dirty[rows],
        )
        dirty = np.flatnonzero(new.dirty[:n])
        new.changed[: len(dirty)] = dirty
        new.meta[1] = len(dirty)
        _cells_index(new.slots, new.keys, n)
        self.arrays = new

    def stamp(self, version: int) -> None:
        """End a flush: every dirty cell gets `version` and is clean again."""
        rows = self.arrays.changed[: self.arrays.meta[1]]
        self.arrays.versions[rows] = version
        self.arrays.dirty[rows] = 0
        self.arrays.meta[1] = 0

    def above(self, version: int) -> npt.NDArray[np.intp]:
        """Rows of the cells last changed by a flush after `version`: what the sink has not confirmed."""
        return np.flatnonzero(self.arrays.versions[: len(self)] > version)

    def dump(self) -> dict[str, npt.NDArray[Any]]:
        n = len(self)
        return {"keys": self.arrays.keys[:n], "values": self.arrays.values[:n], "versions": self.arrays.versions[:n]}

    def load(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """The state that `dump` gave (taken right after `stamp`: nothing dirty)."""
        n = len(arrays["values"])
        new = self._allocate(max(4096, n * 2), n)
        new.keys[:n], new.values[:n], new.versions[:n] = arrays["keys"], arrays["values"], arrays["versions"]
        _cells_index(new.slots, new.keys, n)
        self.arrays = new


# --- users: 128-bit hash to a dense index ------------------------------------------------------------------------------


@jit
def _find_users(slots: I32, keys: U64, used: int, hashes: U64, start: int, out: I32) -> tuple[int, int]:
    """Fill `out[i]`; new users get the next index. Returns (rows done, users in use); stops early when full."""
    mask = np.uint64(len(slots) - 1)
    for i in range(start, len(hashes)):
        high, low = hashes[i, 0], hashes[i, 1]
        if i + 8 < len(hashes):
            prefetch(slots, np.int64(hashes[i + 8, 0] & mask))
        at = high & mask
        row = slots[at]
        while row >= 0 and not (keys[row, 0] == high and keys[row, 1] == low):
            at = (at + np.uint64(1)) & mask
            row = slots[at]
        if row < 0:
            if used == len(keys):
                return i, used
            row = np.int32(used)
            slots[at] = row
            keys[row, 0] = high
            keys[row, 1] = low
            used += 1
        out[i] = row
    return len(hashes), used


@jit
def _index_users(slots: I32, keys: U64, used: int) -> None:
    mask = np.uint64(len(slots) - 1)
    for row in range(used):
        at = keys[row, 0] & mask
        while slots[at] >= 0:
            at = (at + np.uint64(1)) & mask
        slots[at] = row


class UserIndex:
    """Dense numbers for users, in order of first sight. 16 bytes a user and 8 to 16 of slots."""

    def __init__(self, keys: U64 | None = None) -> None:
        self.used = 0 if keys is None else len(keys)
        self._resize(max(1024, self.used * 2), np.empty((0, 2), np.uint64) if keys is None else keys)

    def _resize(self, capacity: int, keys: U64) -> None:
        self.keys: U64 = grown(keys[: self.used], capacity)
        self.slots: I32 = np.full(1 << (capacity * 2 - 1).bit_length(), -1, np.int32)
        _index_users(self.slots, self.keys, self.used)

    def __len__(self) -> int:
        return self.used

    def resolve(self, hashes: U64) -> I32:
        """Indices [n] of the users with these hashes [n, 2]; unseen ones are added."""
        out = np.empty(len(hashes), np.int32)
        done = 0
        while True:
            done, self.used = _find_users(self.slots, self.keys, self.used, hashes, done, out)
            if done == len(hashes):
                return out
            self._resize(len(self.keys) * 2, self.keys)

    def dump(self) -> U64:
        return self.keys[: self.used]


# --- arena: variable-length rows of int64 words ------------------------------------------------------------------------

SIZE_CLASSES = 40
"""Blocks of 4 · 2^(c/2)-like sizes: 4, 6, 8, 12, 16, 24, …; class 39 is 3.1 million words."""


@jit
def block_words(size_class: int) -> int:
    base = 4 << (size_class >> 1)
    return base if size_class & 1 == 0 else base + (base >> 1)


@jit
def block_class(words: int) -> int:
    size_class = np.int64(0)
    while block_words(size_class) < words:
        size_class += 1
    return size_class


class ArenaArrays(NamedTuple):
    """`words` holds blocks; a freed block's first word links to the next free one of its class."""

    words: I64  # [capacity]
    free: I64  # [SIZE_CLASSES] first free block's offset or -1
    meta: I64  # [1] words in use (bump pointer)


@jit
def arena_take(arena: ArenaArrays, size_class: int) -> int:
    """A block's offset, or -1 when the arena is full: return to Python, `Arena.grow`, call again."""
    at = arena.free[size_class]
    if at >= 0:
        arena.free[size_class] = arena.words[at]
        return at
    at = arena.meta[0]
    n = block_words(size_class)
    if at + n > len(arena.words):
        return -1
    arena.meta[0] = at + n
    return at


@jit
def arena_give(arena: ArenaArrays, at: int, size_class: int) -> None:
    arena.words[at] = arena.free[size_class]
    arena.free[size_class] = at


class Arena:
    """Memory for rows that grow: size classes with free lists, so that a row moved to a bigger block leaves no hole for long."""

    def __init__(self, words: int = 1 << 16) -> None:
        self.arrays = ArenaArrays(np.empty(words, np.int64), np.full(SIZE_CLASSES, -1, np.int64), np.zeros(1, np.int64))

    def grow(self, words: int) -> None:
        """Room for at least `words` more."""
        size = max(2 * len(self.arrays.words), int(self.arrays.meta[0]) + words)
        self.arrays = self.arrays._replace(words=grown(self.arrays.words, size))

    def dump(self) -> dict[str, npt.NDArray[Any]]:
        return {"words": self.arrays.words[: int(self.arrays.meta[0])], "free": self.arrays.free}

    def load(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        words = arrays["words"]
        self.arrays = ArenaArrays(grown(words, max(1 << 16, len(words) * 2)), arrays["free"].copy(), np.array([len(words)], np.int64))
