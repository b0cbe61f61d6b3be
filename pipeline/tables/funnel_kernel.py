"""The funnel's state machine, compiled: attempts of one user in one funnel, advanced by groups of events with equal time.

In: events, attempts and results as rows of words. Out: the attempts that live on and the best result of each entry window.
`pipeline.tables.funnel_store` calls it; the rules are in `pipeline.tables.funnel`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.columns import I64, U64
from pipeline.tables.funnel_ties import deepest_of_group, load_group
from pipeline.tables.kernel import HISTOGRAM_UPPER, CellArrays, cells_add, histogram_bucket, jit
from pipeline.tables.window_kernel import window_index, window_start

ORDERED, STRICT, ANY = 0, 1, 2
ONLY_EXCLUDES = 1 << 40
"""Set in the exclusion mask of an event that is not of a strict funnel's topics: it is no event in between."""

# Columns of Spec.numbers
STEPS, CONVERSION, ORDER, OPTIONAL, SEGMENT, HOLD, SIZE, FIRST, LAST, TOPICS, EXCLUSIONS, STRIDE = range(12)


class Spec(NamedTuple):
    """All funnels of a table; F of them."""

    numbers: I64  # [F, 12]
    steps: I64  # [F, 16] predicate of each step
    exclusions: I64  # [F, most exclusions, 3] predicate, after, before
    union: U64  # [F, words] predicates that matter
    starts: I64  # window starts; funnel f's are starts[FIRST:LAST]


class Scratch(NamedTuple):
    """Memory of one call. An attempt: start, segment << 32 | hold, event hash, window << 16 | level or mask (-1 dead), touched.
    A result: window << 32 | segment, start, event hash, duration << 8 | level. An event: ts << 16 | step mask, hash,
    segment << 32 | hold, exclusion mask; the last two only where the funnel needs them (STRIDE words)."""

    attempts: I64  # [capacity, 5] tip
    results: I64  # [capacity, 4]
    base_attempts: I64
    base_results: I64
    before: I64  # [capacity, 4] results before the batch
    after: I64  # [capacity, 4] results after it
    group: I64  # [capacity, 7] mask, hold, segment, hash, first of its class, matched step, path's step
    events: I64  # [capacity * 4] old and new ones merged
    fresh: I64  # [capacity * 4] the batch's own
    matching: I64  # [48] step's event, queue of steps


@jit
def popcount(mask: int) -> int:
    n = 0
    while mask:
        mask &= mask - 1
        n += 1
    return n


@jit
def lowest_step(mask: int, order: int) -> int:
    """Rank of an event among those of its time: lowest step matched, unmatched last; all alike where steps have no order."""
    if order == ANY:
        return 0
    if mask == 0:
        return 64
    n = 0
    while mask & 1 == 0:
        mask >>= 1
        n += 1
    return n


@jit
def event_before(a: I64, i: int, b: I64, j: int, order: int) -> bool:
    """The total order of events: (ts, lowest step, hash)."""
    ta, tb = a[i] >> 16, b[j] >> 16
    if ta != tb:
        return ta < tb
    la, lb = lowest_step(a[i] & 0xFFFF, order), lowest_step(b[j] & 0xFFFF, order)
    if la != lb:
        return la < lb
    return np.uint64(a[i + 1]) < np.uint64(b[j + 1])


@jit
def _offer(results: I64, n: int, window: int, level: int, ts: int, start: int, event: int, segment: int) -> int:
    """Keep the better of a window's result and this one. A new window is never earlier than the others. Returns the number of results."""
    at = n - 1
    while at >= 0 and results[at, 0] >> 32 > window:
        at -= 1
    duration = ts - start
    if at >= 0 and results[at, 0] >> 32 == window:
        known_level, known_duration = results[at, 3] & 0xFF, results[at, 3] >> 8
        if level != known_level:
            better = level > known_level
        elif duration != known_duration:
            better = duration < known_duration
        elif start != results[at, 1]:
            better = start > results[at, 1]
        else:
            better = np.uint64(event) < np.uint64(results[at, 2])
        if not better:
            return n
    else:
        at = n
        n += 1
    results[at, 0] = window << 32 | segment
    results[at, 1] = start
    results[at, 2] = event
    results[at, 3] = duration << 8 | level
    return n


@jit
def _begin(attempts: I64, n: int, start: int, segment: int, hold: int, event: int, state: int) -> None:
    attempts[n, 0] = start
    attempts[n, 1] = segment << 32 | hold
    attempts[n, 2] = event
    attempts[n, 3] = state
    attempts[n, 4] = 1


@jit
def _deepest(level: int, mask: int, optional: int, steps: int) -> int:
    """The level to which one event with this step mask lifts an attempt."""
    best = level
    for step in range(level, steps):
        if mask >> step & 1:
            best = step + 1
        if optional >> step & 1 == 0:
            break
    return best


@jit
def _bury(attempts: I64, n: int) -> int:
    kept = 0
    for a in range(n):
        if attempts[a, 3] >= 0:
            if kept != a:
                for k in range(5):
                    attempts[kept, k] = attempts[a, k]
            kept += 1
    return kept


@jit
def _prune(attempts: I64, n: int) -> int:
    """Of attempts in one window, with one state and hold value, only the latest start can still give the best result."""
    if n <= 1:
        if n == 1:
            attempts[0, 4] = 0
            return _bury(attempts, n)
        return n
    for a in range(n):
        if attempts[a, 4] == 0 or attempts[a, 3] < 0:
            continue
        for b in range(n):
            if b != a and attempts[b, 3] == attempts[a, 3] and (attempts[b, 1] ^ attempts[a, 1]) & 0xFFFFFFFF == 0:
                if attempts[a, 0] != attempts[b, 0]:
                    loses = attempts[a, 0] < attempts[b, 0]
                else:
                    loses = np.uint64(attempts[b, 2]) < np.uint64(attempts[a, 2])
                if loses:
                    attempts[a, 3] = -1
                    break
                attempts[b, 3] = -1
        attempts[a, 4] = 0
    return _bury(attempts, n)


@jit
def _exclude(attempts: I64, n: int, number: I64, exclusions: I64, mask: int, hold: int) -> int:
    for x in range(number[EXCLUSIONS]):
        if mask >> x & 1 == 0:
            continue
        for a in range(n):
            state = attempts[a, 3]
            if state < 0 or (number[HOLD] >= 0 and attempts[a, 1] & 0xFFFFFFFF != hold):
                continue
            level = popcount(state & 0xFFFF) if number[ORDER] == ANY else state & 0xFFFF
            if exclusions[x, 1] <= level < exclusions[x, 2]:
                attempts[a, 3] = -1
    return _bury(attempts, n)


@jit
def run(
    number: I64, exclusions: I64, starts: I64, events: I64, at: int, n: int,
    attempts: I64, results: I64, na: int, nr: int, group: I64, matching: I64,
) -> tuple[int, int]:  # fmt: skip
    """Advance attempts and results in place over `n` sorted events; returns how many there are. Results are never dropped here."""
    steps, conversion, order, optional, stride = number[STEPS], number[CONVERSION], number[ORDER], number[OPTIONAL], number[STRIDE]
    shared = number[SEGMENT] >= 0 or number[HOLD] >= 0
    excluding = number[EXCLUSIONS] > 0
    low, high, window = 0, 0, 0
    i = 0
    while i < n:
        ts = events[at + i * stride] >> 16
        j = i + 1
        while j < n and events[at + j * stride] >> 16 == ts:
            j += 1
        if not low <= ts < high:
            window = window_index(number[SIZE], starts, ts)
            low, high = window_start(number[SIZE], starts, window), window_start(number[SIZE], starts, window + 1)
        for a in range(na):
            if attempts[a, 0] + conversion < ts:
                attempts[a, 3] = -1
        na = _bury(attempts, na)
        if excluding and na:
            for e in range(i, j):
                here = at + e * stride
                if events[here + stride - 1]:
                    na = _exclude(
                        attempts, na, number, exclusions, events[here + stride - 1], events[here + 2] & 0xFFFFFFFF if shared else 0
                    )
        if order == ORDERED and j - i > 1:
            ng = load_group(events, at + i * stride, j - i, stride, steps, shared, group)
            living = na
            for a in range(living):
                level = attempts[a, 3] & 0xFFFF
                target = deepest_of_group(group, ng, level, attempts[a, 1] & 0xFFFFFFFF, np.int64(-1), optional, steps, matching)
                if target > level:
                    nr = _offer(results, nr, attempts[a, 3] >> 16, target, ts, attempts[a, 0], attempts[a, 2], attempts[a, 1] >> 32)
                    attempts[a, 3] = attempts[a, 3] + target - level if target < steps else -1
                    attempts[a, 4] = 1
            for e in range(ng):
                if group[e, 0] & 1 and group[e, 4]:
                    target = deepest_of_group(group, ng, np.int64(1), group[e, 1], e, optional, steps, matching)
                    nr = _offer(results, nr, window, target, ts, ts, group[e, 3], group[e, 2])
                    if target < steps:
                        _begin(attempts, na, ts, group[e, 2], group[e, 1], group[e, 3], window << 16 | target)
                        na += 1
            na = _prune(attempts, na)
            i = j
            continue
        for e in range(i, j):
            here = at + e * stride
            mask = events[here] & 0xFFFF
            both = events[here + 2] if shared else 0
            hold = both & 0xFFFFFFFF
            if mask == 0 and (order != STRICT or (excluding and events[here + stride - 1] & ONLY_EXCLUDES)):
                continue
            for a in range(na):
                state = attempts[a, 3]
                same = attempts[a, 1] & 0xFFFFFFFF == hold
                if order == ANY:
                    fresh = mask & ~state
                    if not same or fresh == 0:
                        continue
                    reached = state | (fresh & -fresh)
                    target = popcount(reached & 0xFFFF)
                else:
                    level = state & 0xFFFF
                    target = _deepest(level, mask, optional, steps) if same else level
                    if target == level:
                        if order == STRICT:
                            attempts[a, 3] = -1
                        continue
                    reached = state + target - level
                nr = _offer(results, nr, state >> 16, target, ts, attempts[a, 0], attempts[a, 2], attempts[a, 1] >> 32)
                attempts[a, 3] = reached if target < steps else -1
                attempts[a, 4] = 1
            if mask & 1 or (order == ANY and mask):
                nr = _offer(results, nr, window, np.int64(1), ts, ts, events[here + 1], both >> 32)
                _begin(attempts, na, ts, both >> 32, hold, events[here + 1], window << 16 | (mask & -mask))
                na += 1
            na = _prune(attempts, na)
        i = j
    return na, nr


@jit
def copy_results(source: I64, target: I64, n: int) -> None:
    for r in range(n):
        for k in range(4):
            target[r, k] = source[r, k]


@jit
def settle(number: I64, starts: I64, attempts: I64, results: I64, na: int, nr: int, ts: int) -> tuple[int, int]:
    """Drop what no event at `ts` or later can change: attempts past their conversion window, results of ended windows without attempts."""
    for a in range(na):
        if attempts[a, 0] + number[CONVERSION] < ts:
            attempts[a, 3] = -1
    na = _bury(attempts, na)
    kept = 0
    for r in range(nr):
        window = results[r, 0] >> 32
        keep = window_start(number[SIZE], starts, window + 1) > ts
        if not keep:
            for a in range(na):
                if attempts[a, 3] >> 16 == window:
                    keep = True
                    break
        if keep:
            for k in range(4):
                results[kept, k] = results[r, k]
            kept += 1
    return na, kept


@jit
def change(number: I64, starts: I64, metric: int, old: I64, n_old: int, new: I64, n_new: int, cells: CellArrays) -> None:
    """Retract and add where a window's level, segment or bucket differs; other cells stay untouched, as they may be forgotten by now."""
    i, j = 0, 0
    while i < n_old or j < n_new:
        wi = old[i, 0] >> 32 if i < n_old else 1 << 40
        wj = new[j, 0] >> 32 if j < n_new else 1 << 40
        window = min(wi, wj)
        gone, came = wi == window, wj == window
        if gone and came and old[i, 0] == new[j, 0] and old[i, 3] == new[j, 3]:
            i += 1
            j += 1
            continue
        start = window_start(number[SIZE], starts, window)
        k_old, k_new = -1, -1
        s_old, s_new = 0, 0
        if gone:
            k_old = metric << 32 | (old[i, 3] & 0xFF) << 16 | histogram_bucket(HISTOGRAM_UPPER, old[i, 3] >> 8)
            s_old = (old[i, 0] & 0xFFFFFFFF) << 32
            i += 1
        if came:
            k_new = metric << 32 | (new[j, 3] & 0xFF) << 16 | histogram_bucket(HISTOGRAM_UPPER, new[j, 3] >> 8)
            s_new = (new[j, 0] & 0xFFFFFFFF) << 32
            j += 1
        if k_old == k_new and s_old == s_new:
            continue
        if k_old >= 0:
            cells_add(cells, k_old, start, s_old, np.int64(-1))
        if k_new >= 0:
            cells_add(cells, k_new, start, s_new, np.int64(1))
