"""Each user's funnel state in the arena, compiled: base, events since, tip; and what a batch does to it.

In: a batch's columns grouped by user. Out: changed cells. Called by `pipeline.tables.funnel`.

A block: header (events | class << 32 | base and tip there << 40), and if so two words of counts; base attempts and results;
events in order; tip attempts and results. The base is the state after all events that were folded (before the horizon), the tip after
all events. A tip is kept only with more than `TIP_FROM` events: fewer are replayed faster than stored.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.columns import I32, I64, U8, U64
from pipeline.tables.funnel_kernel import (
    EXCLUSIONS,
    FIRST,
    HOLD,
    LAST,
    ONLY_EXCLUDES,
    ORDER,
    SEGMENT,
    STEPS,
    STRICT,
    STRIDE,
    TOPICS,
    Scratch,
    Spec,
    change,
    copy_results,
    event_before,
    run,
    settle,
)  # fmt: skip
from pipeline.tables.kernel import ArenaArrays, CellArrays, arena_give, arena_take, block_class, block_words, cells_room, jit, prefetch

TIP_FROM = 4
AHEAD = 4  # users: their blocks come from memory meanwhile, and the heads of twice as many
LINE = 8  # words of a cache line
DONE, MORE_CELLS, MORE_ARENA, MORE_SCRATCH, TOO_LONG = 0, 1, 2, 3, 4
LARGEST_CLASS = 39


class Rows(NamedTuple):
    """The columns of a batch that funnels read, and its grouping by user."""

    topic: U8
    event_id: U64
    ts: I64
    bits: U64
    fields: I32
    user: I32
    order: I64
    starts: I64


@jit
def _gather(spec: Spec, f: int, rows: Rows, first: int, last: int, out: I64) -> int:
    """The events of rows order[first:last] that matter to funnel f, sorted; how many."""
    number = spec.numbers[f]
    order, stride, segment, hold = number[ORDER], number[STRIDE], number[SEGMENT], number[HOLD]
    shared = segment >= 0 or hold >= 0
    n = 0
    for position in range(first, last):
        row = rows.order[position]
        any_bit = np.uint64(0)
        for w in range(rows.bits.shape[1]):
            any_bit |= rows.bits[row, w] & spec.union[f, w]
        follows = order == STRICT and number[TOPICS] >> np.int64(rows.topic[row]) & 1
        if any_bit == 0 and not follows:
            continue
        mask, excluded = 0, 0
        for s in range(number[STEPS]):
            p = spec.steps[f, s]
            if rows.bits[row, p >> 6] >> np.uint64(p & 63) & np.uint64(1):
                mask |= 1 << s
        for x in range(number[EXCLUSIONS]):
            p = spec.exclusions[f, x, 0]
            if rows.bits[row, p >> 6] >> np.uint64(p & 63) & np.uint64(1):
                excluded |= 1 << x
        both = 0
        if hold >= 0:
            both = np.int64(rows.fields[row, hold])
            if both == 0:
                mask, excluded = 0, 0
        if mask == 0 and excluded == 0 and not follows:
            continue
        if segment >= 0:
            both |= np.int64(rows.fields[row, segment]) << 32
        at = n * stride
        out[at] = rows.ts[row] << 16 | mask
        out[at + 1] = np.int64(rows.event_id[row])
        if shared:
            out[at + 2] = both
        if number[EXCLUSIONS]:
            out[at + stride - 1] = excluded if follows else excluded | ONLY_EXCLUDES
        while at > 0 and event_before(out, at, out, at - stride, order):
            for k in range(stride):
                out[at + k], out[at - stride + k] = out[at - stride + k], out[at + k]
            at -= stride
        n += 1
    return n


@jit
def _load(words: I64, at: int, attempts: I64, results: I64, na: int, nr: int) -> None:
    for a in range(na):
        for k in range(4):
            attempts[a, k] = words[at + k]
        attempts[a, 4] = 0
        at += 4
    for r in range(nr):
        for k in range(4):
            results[r, k] = words[at + k]
        at += 4


@jit
def _save(words: I64, at: int, attempts: I64, results: I64, na: int, nr: int) -> int:
    for a in range(na):
        for k in range(4):
            words[at + k] = attempts[a, k]
        at += 4
    for r in range(nr):
        for k in range(4):
            words[at + k] = results[r, k]
        at += 4
    return at


@jit
def _block(words: I64, head: int, stride: int) -> tuple[int, int, int, int, int, int, int, int]:
    """(events, class, base attempts, base results, tip attempts or -1, tip results, offset of base, offset of events)."""
    if head < 0:
        return 0, -1, 0, 0, -1, 0, 0, 0
    header = words[head]
    n, size_class = header & 0xFFFFFFFF, header >> 32 & 0xFF
    if header >> 40 == 0:
        return n, size_class, 0, 0, -1, 0, head + 1, head + 1
    ba, br = words[head + 1] >> 32, words[head + 1] & 0xFFFFFFFF
    ta, tr = words[head + 2] >> 32, words[head + 2] & 0xFFFFFFFF
    if header >> 41 & 1 == 0:
        ta = -1
    return n, size_class, ba, br, ta, tr, head + 3, head + 3 + 4 * (ba + br)


@jit
def _words(n: int, stride: int, ba: int, br: int, ta: int, tr: int) -> int:
    tip = n > TIP_FROM
    return 1 + (2 if ba + br > 0 or tip else 0) + 4 * (ba + br) + n * stride + (4 * (ta + tr) if tip else 0)


@jit
def _write(
    words: I64, head: int, size_class: int, stride: int, events: I64, n: int, s: Scratch, ta: int, tr: int, ba: int, br: int
) -> None:
    """A whole block from scratch: `events[:n]`, the base and, with enough events, the tip."""
    tip = n > TIP_FROM
    at = head + 1
    flags = 0
    if ba + br > 0 or tip:
        words[head + 1] = ba << 32 | br
        words[head + 2] = ta << 32 | tr
        flags = 3 if tip else 1
        at = _save(words, head + 3, s.base_attempts, s.base_results, ba, br)
    words[head] = n | size_class << 32 | flags << 40
    for k in range(n * stride):
        words[at + k] = events[k]
    if tip:
        _save(words, at + n * stride, s.attempts, s.results, ta, tr)


@jit
def _replace(
    arena: ArenaArrays, heads: I32, u: int, f: int, stride: int, events: I64, n: int, s: Scratch, ta: int, tr: int, ba: int, br: int
) -> int:
    """Write the block, into another one when it no longer fits or is far too big; a status. Changes nothing unless DONE."""
    head = np.int64(heads[u, f])
    old_class = arena.words[head] >> 32 & 0xFF if head >= 0 else -1
    if n == 0 and ba + br == 0:
        if head >= 0:
            arena_give(arena, head, old_class)
            heads[u, f] = -1
        return DONE
    new_class = block_class(_words(n, stride, ba, br, ta, tr))
    if new_class > LARGEST_CLASS:
        return TOO_LONG
    if head < 0 or new_class > old_class or new_class < old_class - 1:
        fresh = arena_take(arena, new_class)
        if fresh < 0:
            return MORE_ARENA
        if head >= 0:
            arena_give(arena, head, old_class)
        head, old_class = fresh, new_class
        heads[u, f] = np.int32(head)
    _write(arena.words, head, old_class, stride, events, n, s, ta, tr, ba, br)
    return DONE


@jit
def _fold(
    number: I64, exclusions: I64, starts: I64, events: I64, n: int, horizon: int, s: Scratch, ba: int, br: int
) -> tuple[int, int, int]:
    """Move events before the horizon into the base when they are a good part of all; (events left, base attempts, base results)."""
    stride = number[STRIDE]
    low, high = 0, n
    while low < high:
        middle = (low + high) >> 1
        if events[middle * stride] >> 16 < horizon:
            low = middle + 1
        else:
            high = middle
    if low == 0 or low * 4 < n:
        if ba + br > 0:  # the events that stay may be older than the horizon, and the base is the state before them
            first = horizon if low == 0 else events[0] >> 16
            ba, br = settle(number, starts, s.base_attempts, s.base_results, ba, br, first)
        return n, ba, br
    ba, br = run(number, exclusions, starts, events, np.int64(0), low, s.base_attempts, s.base_results, ba, br, s.group, s.matching)
    ba, br = settle(number, starts, s.base_attempts, s.base_results, ba, br, horizon)
    for k in range((n - low) * stride):
        events[k] = events[low * stride + k]
    return n - low, ba, br


@jit
def apply_rows(
    spec: Spec, rows: Rows, metric: int, horizon: int, g: int, f: int,
    heads: I32, arena: ArenaArrays, cells: CellArrays, s: Scratch,
) -> tuple[int, int, int, int]:  # fmt: skip
    """Apply users' groups from (g, f) on; (status, g, f, amount): when not DONE, the caller makes room and goes on from there."""
    capacity = len(s.attempts)
    funnels = len(spec.numbers)
    groups = len(rows.starts) - 1
    while g < groups:
        first, last = rows.starts[g], rows.starts[g + 1]
        if g + 2 * AHEAD < groups:
            prefetch(heads, np.int64(rows.user[rows.order[rows.starts[g + 2 * AHEAD]]]) * funnels)
        if g + AHEAD < groups:
            next_user = np.int64(rows.user[rows.order[rows.starts[g + AHEAD]]])
            for k in range(funnels):
                head = np.int64(heads[next_user, k])
                if head >= 0:
                    prefetch(arena.words, head)
                    prefetch(arena.words, head + LINE)
        u = np.int64(rows.user[rows.order[first]])
        while f < funnels:
            if (last - first) + 8 > capacity:
                return MORE_SCRATCH, g, f, last - first + 8
            n_new = _gather(spec, f, rows, first, last, s.fresh)
            if n_new == 0:
                f += 1
                continue
            number, exclusions = spec.numbers[f], spec.exclusions[f]
            starts = spec.starts[number[FIRST] : number[LAST]]
            stride = number[STRIDE]
            words = arena.words
            head = np.int64(heads[u, f])
            n_old, size_class, ba, br, ta, tr, base_at, events_at = _block(words, head, stride)
            room = n_old + n_new + ba + br + max(ta, 0) + tr + 8
            if room > capacity:
                return MORE_SCRATCH, g, f, room
            tip_at = events_at + n_old * stride
            in_order = n_old == 0 or s.fresh[0] >> 16 > words[tip_at - stride] >> 16
            if in_order and ta >= 0:
                na, nr = ta, tr
                _load(words, tip_at, s.attempts, s.results, na, nr)
            else:
                _load(words, base_at, s.attempts, s.results, ba, br)
                na, nr = run(number, exclusions, starts, words, events_at, n_old, s.attempts, s.results, ba, br, s.group, s.matching)
            n_before = nr
            copy_results(s.results, s.before, nr)
            if in_order:
                na, nr = run(number, exclusions, starts, s.fresh, np.int64(0), n_new, s.attempts, s.results, na, nr, s.group, s.matching)
            else:
                _load(words, base_at, s.attempts, s.results, ba, br)
                i, j = events_at, np.int64(0)
                for at in range(0, (n_old + n_new) * stride, stride):
                    if j == n_new * stride or (i < tip_at and not event_before(s.fresh, j, words, i, number[ORDER])):
                        for k in range(stride):
                            s.events[at + k] = words[i + k]
                        i += stride
                    else:
                        for k in range(stride):
                            s.events[at + k] = s.fresh[j + k]
                        j += stride
                na, nr = run(
                    number, exclusions, starts, s.events, np.int64(0), n_old + n_new, s.attempts, s.results, ba, br, s.group, s.matching
                )
            if not cells_room(cells, n_before + nr):
                return MORE_CELLS, g, f, n_before + nr
            n_after = nr
            copy_results(s.results, s.after, nr)
            n = n_old + n_new
            newest = s.fresh[(n_new - 1) * stride] >> 16 if in_order else s.events[(n - 1) * stride] >> 16
            na, nr = settle(number, starts, s.attempts, s.results, na, nr, newest)
            fits = ta >= 0 and _words(n, stride, ba, br, na, nr) <= block_words(size_class)
            if in_order and fits and words[events_at + (n_old >> 2) * stride] >> 16 >= horizon:
                for k in range(n_new * stride):
                    words[tip_at + k] = s.fresh[k]
                words[head] = n | size_class << 32 | 3 << 40
                words[head + 2] = na << 32 | nr
                _save(words, events_at + n * stride, s.attempts, s.results, na, nr)
            else:
                if in_order:
                    for k in range(n_old * stride):
                        s.events[k] = words[events_at + k]
                    for k in range(n_new * stride):
                        s.events[n_old * stride + k] = s.fresh[k]
                _load(words, base_at, s.base_attempts, s.base_results, ba, br)
                n, ba, br = _fold(number, exclusions, starts, s.events, n, horizon, s, ba, br)
                status = _replace(arena, heads, u, f, stride, s.events, n, s, na, nr, ba, br)
                if status != DONE:
                    return status, g, f, 2 * _words(n, stride, ba, br, na, nr)
            change(number, starts, metric + f, s.before, n_before, s.after, n_after, cells)
            f += 1
        f = 0
        g += 1
    return DONE, g, 0, 0


@jit
def sweep(spec: Spec, horizon: int, first: int, last: int, heads: I32, arena: ArenaArrays, s: Scratch) -> tuple[int, int, int]:
    """Fold what users first to last - 1 need no more; (status, user reached, amount)."""
    for u in range(first, last):
        for f in range(len(spec.numbers)):
            head = np.int64(heads[u, f])
            if head < 0:
                continue
            number = spec.numbers[f]
            stride = number[STRIDE]
            starts = spec.starts[number[FIRST] : number[LAST]]
            n, _, ba, br, ta, tr, base_at, events_at = _block(arena.words, head, stride)
            if n and arena.words[events_at + (n >> 2) * stride] >> 16 >= horizon:
                continue
            room = n + ba + br + max(ta, 0) + tr + 8
            if room > len(s.attempts):
                return MORE_SCRATCH, u, room
            _load(arena.words, base_at, s.base_attempts, s.base_results, ba, br)
            if ta >= 0:
                _load(arena.words, events_at + n * stride, s.attempts, s.results, ta, tr)
            for k in range(n * stride):
                s.events[k] = arena.words[events_at + k]
            n, ba, br = _fold(number, spec.exclusions[f], starts, s.events, n, horizon, s, ba, br)
            status = _replace(arena, heads, u, f, stride, s.events, n, s, max(ta, 0), tr, ba, br)
            if status != DONE:
                return status, u, 2 * _words(n, stride, ba, br, max(ta, 0), tr)
    return DONE, last, 0
