"""What a retention keeps of each user, compiled: first occurrence, activity by period, sums; and what a batch does to it.

In: a batch's columns grouped by user. Out: changed cells. Called by `pipeline.tables.retention`.

What is remembered: return periods (one bit each) in [min(c, h), c + periods], or from h on while the cohort period c is not known; h is the
horizon's period. Earlier ones can neither follow a cohort nor be its period: a cohort moves only to periods >= h, and only backwards.
That is at most periods + 1 + (newest event − horizon) in periods, so `first_words` suffices while newest − horizon <= lateness.
A row that needs more (topics read at very different speeds) stops the kernel before it changes anything, and all rows get more words.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.columns import I32, I64, U64
from pipeline.tables.kernel import (
    ArenaArrays,
    CellArrays,
    arena_give,
    arena_take,
    block_class,
    block_words,
    cells_add,
    cells_room,
    jit,
    prefetch,
)

USERS, LAST, VALUE = 0, 1 << 16, 2 << 16
DONE, MORE_CELLS, MORE_ROWS, MORE_WORDS, MORE_ARENA = 0, 1, 2, 3, 4
AHEAD = 6  # users: their rows come from memory meanwhile
NEVER = np.iinfo(np.int64).max


class Spec(NamedTuple):
    """One retention as numbers; `breakdown` and `value` are columns or -1."""

    metric: int
    cohort: int
    returning: int
    breakdown: int
    value: int
    periods: int
    starts: I64


class Events(NamedTuple):
    """The columns of a batch that retentions read, and its grouping by user."""

    event_id: U64
    ts: I64
    bits: U64
    fields: I32
    numbers: I64
    user: I32
    order: I64
    starts: I64


FIRST, TIE, COHORT, BASE, BITS = 0, 1, 2, 3, 4


class State(NamedTuple):
    """One retention's users. A user without a matching event has no row: 4 bytes; a row is one or two cache lines.

    Words of a row: ts of the first cohort event, NEVER while there is none | its event_id | its period << 32, segment |
    period of bit 0 << 32, 1 + arena block of sums or 0 | activity: bit i is a return event in period (of bit 0) + i.
    A block of sums: class << 32, pairs | (period, sum) of each pair.
    """

    rows: I32  # [users] the user's row or -1
    words: I64  # [capacity, BITS + words of activity]
    used: I64  # [1] rows in use


@jit
def _bits(words: I64) -> int:
    return int((words.shape[1] - BITS) * 64)


@jit
def _holds(words: I64, row: int, at: int) -> bool:
    return bool((words[row, BITS + (at >> 6)] >> (at & 63)) & 1 != 0)


@jit
def _flip(words: I64, row: int, at: int) -> None:
    words[row, BITS + (at >> 6)] ^= np.int64(1) << (at & 63)


@jit
def _base(words: I64, row: int) -> int:
    return int(words[row, BASE] >> 32)


@jit
def _head(words: I64, row: int) -> int:
    """The row's block of sums or -1."""
    return int((words[row, BASE] & 0xFFFFFFFF) - 1)


@jit
def _set_base(words: I64, row: int, base: int, head: int) -> None:
    words[row, BASE] = base << 32 | (head + 1)


@jit
def _last(words: I64, row: int, cohort: int, periods: int) -> int:
    """The last n in 1..periods with activity, or 0."""
    base = _base(words, row)
    top = min(cohort + periods - base, _bits(words) - 1)
    for w in range(top >> 6, -1, -1):
        word = np.uint64(words[row, BITS + w])
        if w == top >> 6:
            word &= np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(63 - (top & 63))
        if word != 0:
            at = 0
            for step in (32, 16, 8, 4, 2, 1):
                if word >> np.uint64(step) != 0:
                    word >>= np.uint64(step)
                    at += step
            return max(0, int(base + w * 64 + at - cohort))
    return 0


@jit
def _count(spec: Spec, words: I64, row: int, sign: int, blocks: I64, cells: CellArrays) -> None:
    """Add (1) or take back (-1) everything the user stands for in their cohort."""
    cohort, segment, base = words[row, COHORT] >> 32, words[row, COHORT] & 0xFFFFFFFF, _base(words, row)
    k0, k1, k2 = spec.metric << 32, spec.starts[cohort], segment << 32
    cells_add(cells, k0 | USERS, k1, k2, sign)
    last = _last(words, row, cohort, spec.periods)
    for n in range(max(1, base - cohort), last + 1):
        if _holds(words, row, cohort + n - base):
            cells_add(cells, k0 | USERS | n, k1, k2, sign)
    cells_add(cells, k0 | LAST | last, k1, k2, sign)
    head = _head(words, row)
    if head >= 0:
        for i in range(blocks[head] & 0xFFFFFFFF):
            n, total = blocks[head + 1 + 2 * i] - cohort, blocks[head + 2 + 2 * i]
            if 0 <= n <= spec.periods and total != 0:
                cells_add(cells, k0 | VALUE | n, k1, k2, sign * total)


@jit
def _add_sum(blocks: I64, head: int, period: int, amount: int) -> None:
    pairs = blocks[head] & 0xFFFFFFFF
    for i in range(pairs):
        if blocks[head + 1 + 2 * i] == period:
            blocks[head + 2 + 2 * i] += amount
            return
    blocks[head + 1 + 2 * pairs] = period
    blocks[head + 2 + 2 * pairs] = amount
    blocks[head] += 1


@jit
def _sums_room(arena: ArenaArrays, words: I64, row: int, adds: int, low: int, high: int) -> bool:
    """Room for `adds` more pairs in the row's block, from a bigger one if need be, without pairs outside [low, high]; False when the arena is full."""
    blocks, head = arena.words, _head(words, row)
    kept, size_class = 0, 0
    if head >= 0:
        pairs, size_class = blocks[head] & 0xFFFFFFFF, blocks[head] >> 32
        if 1 + 2 * (pairs + adds) <= block_words(size_class):
            return True
        for i in range(pairs):
            if low <= blocks[head + 1 + 2 * i] <= high:
                blocks[head + 1 + 2 * kept] = blocks[head + 1 + 2 * i]
                blocks[head + 2 + 2 * kept] = blocks[head + 2 + 2 * i]
                kept += 1
        blocks[head] = size_class << 32 | kept
        if 1 + 2 * (kept + adds) <= block_words(size_class):
            return True
    new_class = block_class(1 + 2 * (kept + adds))
    at = arena_take(arena, new_class)
    if at < 0:
        return False
    for k in range(2 * kept):
        blocks[at + 1 + k] = blocks[head + 1 + k]
    blocks[at] = new_class << 32 | kept
    if head >= 0:
        arena_give(arena, head, size_class)
    _set_base(words, row, _base(words, row), at)
    return True


@jit
def _span(words: I64, row: int, low: int, high: int, first: int, last: int) -> tuple[int, int]:
    """The lowest and highest of the periods `first`, `last` and those of the row's bits that are in [low, high]."""
    base = _base(words, row)
    for at in range(_bits(words)):
        if low <= base + at <= high and _holds(words, row, at):
            first, last = min(first, base + at), max(last, base + at)
    return first, last


@jit
def _rebase(words: I64, row: int, base: int, low: int, high: int) -> None:
    """Move the row's bits so that bit 0 is period `base`, without those outside [low, high]; the rest must fit."""
    old, size = _base(words, row), _bits(words)
    for k in range(size):
        at = k if base > old else size - 1 - k  # a bit moves to where the bits have been moved already
        if _holds(words, row, at):
            _flip(words, row, at)
            if low <= old + at <= high:
                _flip(words, row, old + at - base)
    _set_base(words, row, base, _head(words, row))


@jit
def _matches(bits: U64, r: int, predicate: int) -> bool:
    return bool((bits[r, predicate >> 6] >> np.uint64(predicate & 63)) & np.uint64(1) != 0)


@jit
def apply_rows(
    spec: Spec, events: Events, horizon: int, g: int, state: State, arena: ArenaArrays, cells: CellArrays, periods: I64, sums: I64
) -> tuple[int, int, int]:
    """Apply users' groups from g on; `horizon` is a period. (status, g, amount): when not DONE, make room and go on from there."""
    starts, words, size = spec.starts, state.words, _bits(state.words)
    period, begin, end = 0, NEVER, NEVER  # the period found last holds [begin, end)
    while g < len(events.starts) - 1:
        first_row, last_row = events.starts[g], events.starts[g + 1]
        u = np.int64(events.user[events.order[first_row]])
        row = np.int64(state.rows[u])
        if g + AHEAD < len(events.starts) - 1:
            next_row = np.int64(state.rows[events.user[events.order[events.starts[g + AHEAD]]]])
            if next_row >= 0:
                prefetch(words, next_row * words.shape[1])
        first, tie = NEVER, np.uint64(0)
        if row >= 0:
            first, tie = int(words[row, FIRST]), np.uint64(words[row, TIE])
        known = first != NEVER

        # A group is sorted by time, so its return periods come in order: one entry each.
        best, m = -1, 0
        for position in range(first_row, last_row):
            r = int(events.order[position])
            ts = int(events.ts[r])
            if ts <= first and _matches(events.bits, r, spec.cohort) and (ts < first or events.event_id[r] < tie):
                best, first, tie = r, ts, events.event_id[r]
            if _matches(events.bits, r, spec.returning):
                if not begin <= ts < end:
                    period = int(np.searchsorted(starts, ts, side="right") - 1)
                    begin = int(starts[period])
                    end = int(starts[period + 1]) if period + 1 < len(starts) else NEVER
                if m == 0 or periods[m - 1] != period:
                    periods[m] = period
                    sums[m] = 0
                    m += 1
                if spec.value >= 0:
                    sums[m - 1] += events.numbers[r, spec.value]
        if m == 0 and best < 0:
            g += 1
            continue

        old_cohort, old_segment = 0, 0
        if known:
            old_cohort, old_segment = int(words[row, COHORT] >> 32), int(words[row, COHORT] & 0xFFFFFFFF)
        cohort, segment = old_cohort, old_segment
        if best >= 0:
            cohort = int(np.searchsorted(starts, first, side="right") - 1)
            segment = int(events.fields[best, spec.breakdown]) if spec.breakdown >= 0 else 0
        low, high, old_high = horizon, NEVER, NEVER
        if known or best >= 0:
            low, high = min(cohort, horizon), cohort + spec.periods
            old_high = old_cohort + spec.periods if known else high
        at = 0
        while at < m and periods[at] < low:
            at += 1
        while m > at and periods[m - 1] > high:
            m -= 1
        if at == m and best < 0:
            g += 1
            continue

        if not cells_room(cells, 4 * spec.periods + 8):
            return MORE_CELLS, g, 4 * spec.periods + 8
        if row < 0:
            row = state.used[0]
            if row == len(words):
                return MORE_ROWS, g, 1
            state.used[0] += 1
            state.rows[u] = row
            words[row] = 0
            words[row, FIRST] = NEVER
            _set_base(words, row, periods[at] if at < m else cohort, np.int64(-1))
        base = _base(words, row)
        if at < m and not (base <= periods[at] and periods[m - 1] < base + size):
            base, top = _span(words, row, low, high, periods[at], periods[m - 1])
            if top - base >= size:
                return MORE_WORDS, g, top - base + 1
        adds = np.int64(0)
        for i in range(at, m):
            adds += sums[i] != 0
        if adds and not _sums_room(arena, words, row, adds, low, old_high):
            return MORE_ARENA, g, 4 * adds + 64 + block_words(block_class(1 + 2 * adds))

        moves = best >= 0 and not (known and cohort == old_cohort and segment == old_segment)
        if moves and known:
            _count(spec, words, row, np.int64(-1), arena.words, cells)
        if best >= 0:
            words[row, FIRST] = first
            words[row, TIE] = np.int64(tie)
            words[row, COHORT] = cohort << 32 | segment
        if base != _base(words, row):
            _rebase(words, row, base, low, high)
        counts = known and not moves
        k0, k1, k2 = spec.metric << 32, starts[cohort], segment << 32
        before, after = -1, 0
        for i in range(at, m):
            n = periods[i] - cohort
            if not _holds(words, row, periods[i] - base):
                if counts and n > 0:
                    if before < 0:
                        before = _last(words, row, cohort, spec.periods)
                    after = n
                    cells_add(cells, k0 | USERS | n, k1, k2, np.int64(1))
                _flip(words, row, periods[i] - base)
            if sums[i] != 0:
                _add_sum(arena.words, _head(words, row), periods[i], sums[i])
                if counts and n >= 0:
                    cells_add(cells, k0 | VALUE | n, k1, k2, sums[i])
        if 0 <= before < after:
            cells_add(cells, k0 | LAST | before, k1, k2, np.int64(-1))
            cells_add(cells, k0 | LAST | after, k1, k2, np.int64(1))
        if moves:
            _count(spec, words, row, np.int64(1), arena.words, cells)
        g += 1
    return DONE, g, 0
