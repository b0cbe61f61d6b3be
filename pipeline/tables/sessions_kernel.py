"""A user's sessions, compiled: extended, joined and begun by a batch, and what that changes in the cells.

In: a batch's columns grouped by user. Out: changed cells. Called by `pipeline.tables.sessions`, which says what a session is.
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
    histogram_bucket,
    jit,
    prefetch,
)
from pipeline.tables.kpi_rows import Events, Kinds, Lines, pending_put, settle, window_of
from pipeline.windows import MINUTE_MS

DONE, MORE_CELLS, MORE_WORDS, MORE_SCRATCH = 0, 1, 2, 3
COUNT, BOUNCES, PAGES, DWELL, QUANTILE = range(5)
START, END, N_PAGES, TIE, DIMENSIONS = range(5)  # words of a session; then two string ids a word
UNDECIDED = 1 << 62
AHEAD = 6  # users: their sessions come from memory meanwhile, and the places of twice as many


class Spec(NamedTuple):
    """The KPIs compiled."""

    aggregate: I64  # [kpis]
    lines: Lines
    kinds: Kinds
    page: int  # predicate of a page, -1 for every event
    gap: int  # ms
    words: int  # of a session
    upper: I64  # HISTOGRAM_UPPER
    edges: I64  # [kinds, 2] scratch: window starts of an old and a new session


# Scratch holds one user's sessions while their events are applied. Row j, of 2 * words + 3 words: the session as it was, the session as it
# will be (from `words` on), and then the row whose old session became row j's new one or -1, whether row j's old session was joined to
# another, whether row j's new session differs.


@jit
def _load(stored: I64, at: int, count: int, words: int, gap: int, horizon: int, scratch: I64) -> int:
    """A user's sessions that may still change, by start; how many."""
    m = 0
    for s in range(count):
        base = at + s * words
        if stored[base + END] + gap >= horizon:
            for w in range(words):
                scratch[m, w] = stored[base + w]
                scratch[m, words + w] = stored[base + w]
            scratch[m, 2 * words] = m
            scratch[m, 2 * words + 1] = 0
            scratch[m, 2 * words + 2] = 0
            m += 1
    return m


@jit
def _shift(scratch: I64, words: int, source: int, target: int) -> None:
    for w in range(words):
        scratch[target, words + w] = scratch[source, words + w]
    scratch[target, 2 * words] = scratch[source, 2 * words]
    scratch[target, 2 * words + 2] = scratch[source, 2 * words + 2]


@jit
def _begin_at(scratch: I64, words: int, j: int, ts: int, tie: np.uint64, fields: I32, columns: I64, r: int) -> None:
    """Event r is session j's first."""
    scratch[j, words + START] = ts
    scratch[j, words + TIE] = np.int64(tie)
    for d in range(DIMENSIONS, words):
        scratch[j, words + d] = 0
    for d in range(len(columns)):
        scratch[j, words + DIMENSIONS + (d >> 1)] |= np.int64(fields[r, columns[d]]) << ((d & 1) * 32)
    scratch[j, 2 * words + 2] = 1


@jit
def _sessions(
    page_predicate: int, gap: int, words: int, columns: I64, event_id: U64, stamps: I64, bits: U64, fields: I32,
    order: I64, begin: int, end: int, n: int, scratch: I64,
) -> int:  # fmt: skip
    """Apply one user's events in `order[begin:end]` to the `n` sessions in scratch; how many there are then."""
    j = 0
    origin, gone, touched = 2 * words, 2 * words + 1, 2 * words + 2
    for position in range(begin, end):
        r = order[position]
        ts = stamps[r]
        page = np.int64(1)
        if page_predicate >= 0:
            page = np.int64((bits[r, page_predicate >> 6] >> np.uint64(page_predicate & 63)) & np.uint64(1))
        while j < n and scratch[j, words + END] + gap < ts:
            j += 1  # events come by time: no later one reaches that session either
        if j == n or ts < scratch[j, words + START] - gap:
            for k in range(n, j, -1):
                _shift(scratch, words, k - 1, k)
            n += 1
            _begin_at(scratch, words, j, ts, event_id[r], fields, columns, r)
            scratch[j, words + END] = ts
            scratch[j, words + N_PAGES] = page
            scratch[j, origin] = -1
            continue
        first = scratch[j, words + START]
        if ts < first or (ts == first and event_id[r] < np.uint64(scratch[j, words + TIE])):
            _begin_at(scratch, words, j, ts, event_id[r], fields, columns, r)
        if page > 0:
            scratch[j, words + N_PAGES] += page
            scratch[j, touched] = 1
        if ts > scratch[j, words + END]:
            scratch[j, words + END] = ts
            scratch[j, touched] = 1
        if j + 1 < n and scratch[j + 1, words + START] - scratch[j, words + END] <= gap:
            scratch[j, words + N_PAGES] += scratch[j + 1, words + N_PAGES]
            scratch[j, words + END] = scratch[j + 1, words + END]
            scratch[j, touched] = 1
            if scratch[j, origin] < 0:
                scratch[j, origin] = scratch[j + 1, origin]
            elif scratch[j + 1, origin] >= 0:
                scratch[scratch[j + 1, origin], gone] = 1
            for k in range(j + 1, n - 1):
                _shift(scratch, words, k + 1, k)
            n -= 1
    return n


@jit
def _value(aggregate: int, pages: int, dwell: int) -> int:
    value = np.int64(1)
    if aggregate == BOUNCES:
        value = np.int64(pages == 1)
    elif aggregate == PAGES:
        value = pages
    elif aggregate == DWELL:
        value = dwell
    return value


@jit
def _correct(
    aggregates: I64, table: I64, of_kpi: I64, shape: I64, starts: I64, last: I64, upper: I64, words: int,
    scratch: I64, edges: I64, o: int, s: int, pending: I64, cells: CellArrays,
) -> None:  # fmt: skip
    """Move what old session o gave (none when -1) to what new session s gives (none when -1)."""
    old_pages, old_dwell, new_pages, new_dwell = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
    if o >= 0:
        old_pages, old_dwell = scratch[o, N_PAGES], scratch[o, END] - scratch[o, START]
        for kind in range(len(shape)):
            edges[kind, 0] = window_of(shape, starts, last, kind, scratch[o, START])
    if s >= 0:
        new_pages, new_dwell = scratch[s, words + N_PAGES], scratch[s, words + END] - scratch[s, words + START]
        for kind in range(len(shape)):
            edges[kind, 1] = window_of(shape, starts, last, kind, scratch[s, words + START])
    moved = o < 0 or s < 0
    if not moved:
        moved = scratch[o, START] != scratch[s, words + START] or scratch[o, TIE] != scratch[s, words + TIE]
    for kpi in range(len(aggregates)):
        aggregate = aggregates[kpi]
        was, is_now = np.int64(0), np.int64(0)
        old_bucket, new_bucket = np.int64(0), np.int64(0)
        if o >= 0:
            was = _value(aggregate, old_pages, old_dwell)
            if aggregate == QUANTILE:
                old_bucket = np.int64(histogram_bucket(upper, old_dwell) + 1) << 16
        if s >= 0:
            is_now = _value(aggregate, new_pages, new_dwell)
            if aggregate == QUANTILE:
                new_bucket = np.int64(histogram_bucket(upper, new_dwell) + 1) << 16
        if not moved and old_bucket == new_bucket and was == is_now:
            continue
        for line in range(of_kpi[kpi], of_kpi[kpi + 1]):
            k0, dimension, kind = table[line, 0], table[line, 1], table[line, 2]
            old_value, new_value = np.int64(0), np.int64(0)
            if dimension >= 0:
                word, shift = DIMENSIONS + (dimension >> 1), (dimension & 1) * 32
                if o >= 0:
                    old_value = (scratch[o, word] >> shift & 0xFFFFFFFF) << 32
                if s >= 0:
                    new_value = (scratch[s, words + word] >> shift & 0xFFFFFFFF) << 32
            added = is_now
            if o >= 0 and s >= 0 and edges[kind, 0] == edges[kind, 1] and old_value == new_value and old_bucket == new_bucket:
                added = is_now - was
            elif was != 0:
                taken = pending_put(pending, k0 | old_bucket, edges[kind, 0], old_value, -was)
                if taken >= 0:
                    settle(pending, taken, cells)
                    pending_put(pending, k0 | old_bucket, edges[kind, 0], old_value, -was)
            if added != 0:
                taken = pending_put(pending, k0 | new_bucket, edges[kind, 1], new_value, added)
                if taken >= 0:
                    settle(pending, taken, cells)
                    pending_put(pending, k0 | new_bucket, edges[kind, 1], new_value, added)


@jit
def _store(words: int, u: int, n: int, places: I64, arena: ArenaArrays, stored: I64, scratch: I64) -> None:
    place = places[u]
    at, size_class = np.int64(-1), -1
    if place >= 0:
        at, size_class = place >> 24, block_class((place & 0xFFFFFF) * words)
    wanted = block_class(n * words)
    if size_class != wanted:
        if at >= 0:
            arena_give(arena, at, size_class)
        at = np.int64(arena_take(arena, wanted))
    for s in range(n):
        for w in range(words):
            stored[at + s * words + w] = scratch[s, words + w]
    places[u] = at << 24 | n


@jit
def apply_rows(
    spec: Spec, events: Events, g: int, places: I64, arena: ArenaArrays, scratch: I64, pending: I64, cells: CellArrays, horizon: int
) -> tuple[int, int, int]:
    """Apply users' groups from g on. (status, g, how much): when not DONE, the caller makes room and goes on from there."""
    aggregates, page, gap, words, upper, edges = spec.aggregate, spec.page, spec.gap, spec.words, spec.upper, spec.edges
    table, columns, of_kpi = spec.lines.table, spec.lines.columns, spec.lines.of_kpi
    shape, starts, last = spec.kinds.shape, spec.kinds.starts, spec.kinds.last
    event_id, stamps, bits, fields = events.event_id, events.ts, events.bits, events.fields
    users, order, group = events.user, events.order, events.starts
    stored, arena_meta, cells_meta, capacity = arena.words, arena.meta, cells.meta, len(cells.values)
    gone, touched = 2 * words + 1, 2 * words + 2
    groups = len(group) - 1
    while g < groups:
        begin, end = group[g], group[g + 1]
        if g + 2 * AHEAD < groups:
            prefetch(places, np.int64(users[order[group[g + 2 * AHEAD]]]))
        if g + AHEAD < groups:
            place = places[users[order[group[g + AHEAD]]]]
            if place >= 0:
                prefetch(stored, place >> 24)
        u = np.int64(users[order[begin]])
        at, count = np.int64(0), np.int64(0)
        if places[u] >= 0:
            at, count = places[u] >> 24, places[u] & 0xFFFFFF
        most = end - begin + count
        if most > len(scratch):
            return MORE_SCRATCH, g, most
        need = block_words(block_class(most * words))
        if arena_meta[0] + need > len(stored):
            return MORE_WORDS, g, need
        m = _load(stored, at, count, words, gap, horizon, scratch)
        n = _sessions(page, gap, words, columns, event_id, stamps, bits, fields, order, begin, end, m, scratch)
        changes = np.int64(0)
        for s in range(n):
            changes += scratch[s, touched]
        for s in range(m):
            changes += scratch[s, gone]
        room = 2 * changes * len(table)
        if cells_meta[0] + room > capacity:
            return MORE_CELLS, g, room
        for position in range(n + m):
            o, s = np.int64(-1), np.int64(-1)
            if position < n:
                if scratch[position, touched] == 0:
                    continue
                o, s = scratch[position, 2 * words], np.int64(position)
            else:
                o = np.int64(position - n)
                if scratch[o, gone] == 0:
                    continue
            _correct(aggregates, table, of_kpi, shape, starts, last, upper, words, scratch, edges, o, s, pending, cells)
        _store(words, u, n, places, arena, stored, scratch)
        g += 1
    return DONE, g, 0


@jit
def sweep(spec: Spec, places: I64, arena: ArenaArrays, horizon: int) -> None:
    """Free the blocks of users none of whose sessions may still change."""
    for u in range(len(places)):
        place = places[u]
        if place < 0:
            continue
        count, at = place & 0xFFFFFF, place >> 24
        if arena.words[at + (count - 1) * spec.words + END] + spec.gap < horizon:
            arena_give(arena, at, block_class(count * spec.words))
            places[u] = -1


@jit
def live_starts(spec: Spec, places: I64, arena: ArenaArrays, horizon: int, low: int, minutes: I64) -> tuple[int, int]:
    """Mark in `minutes` (from minute `low` on, unless empty) those in which a session starts that may still change; (first, last) minute."""
    first, last = np.int64(UNDECIDED), np.int64(-1)
    for u in range(len(places)):
        if places[u] < 0:
            continue
        count, at = places[u] & 0xFFFFFF, places[u] >> 24
        for s in range(count):
            base = at + s * spec.words
            if arena.words[base + END] + spec.gap < horizon:
                continue
            minute = arena.words[base + START] // MINUTE_MS
            first, last = min(first, minute), max(last, minute)
            if len(minutes) > 0:
                minutes[minute - low] = 1
    return first, last
