"""Sessions: maximal runs of a user's events in which none is more than the session gap after the one before it.

In: accepted batches. Out: cells (see `pipeline.tables.kpi_rows`). Called by `pipeline.tables.board`.

A session counts in the window of its first event, with that event's dimensions (equal times: the smaller event id is first). A late event
may extend a session, move its start, or join two: what the old ones gave is retracted. Only sessions that may still change are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.columns import I32, I64, U64, Strings
from pipeline.plan import Plan
from pipeline.tables.kernel import (
    HISTOGRAM_UPPER,
    Arena,
    ArenaArrays,
    CellArrays,
    Cells,
    arena_give,
    arena_take,
    block_class,
    block_words,
    grown,
    histogram_bucket,
    jit,
    prefetch,
)
from pipeline.tables.kpi_rows import (
    Events,
    Kinds,
    Lines,
    compile_lines,
    events_of,
    flush_pending,
    kpi_rows,
    new_pending,
    pending_put,
    settle,
    window_ends,
    window_of,
)
from pipeline.tables.table import Arrays, Batch
from pipeline.windows import DAY_MS, MINUTE_MS
from schemas.rows import Rows

DONE, MORE_CELLS, MORE_WORDS, MORE_SCRATCH = 0, 1, 2, 3
AGGREGATES = ("count", "bounces", "pages", "dwell", "dwell_quantile")
COUNT, BOUNCES, PAGES, DWELL, QUANTILE = range(5)
START, END, N_PAGES, TIE, DIMENSIONS = range(5)  # words of a session; then two string ids a word
UNDECIDED = 1 << 62
LONGEST_REPORTED_MS = DAY_MS  # a row's `final_at` allows for sessions up to a day long
SWEEPS_OF_LATENESS = 8
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
def _apply(
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
def _sweep(spec: Spec, places: I64, arena: ArenaArrays, horizon: int) -> None:
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
def _live_starts(spec: Spec, places: I64, arena: ArenaArrays, horizon: int, low: int, minutes: I64) -> tuple[int, int]:
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


class SessionTable:
    """All KPIs of one partition with source `sessions`. 8 bytes a user; a session that may still change has 32 and 4 a dimension.

    A dwell time has no bound, so a cell's `final_at` is undecided (2^62) while a session that starts in its window may still change. The
    `final_at` of a row, which is written once, is window end + a day + lateness: right for sessions of up to a day.
    """

    def __init__(self, plan: Plan, metric: int) -> None:
        definitions = plan.definitions
        self.metric = metric
        self.kpis = tuple(kpi for kpi in definitions.kpis if kpi.source == "sessions")
        self.metrics = len(self.kpis)
        self.time_zone = definitions.time_zone
        self.lateness_ms = definitions.lateness_ms
        lines, kinds, _ = compile_lines(plan, self.kpis, metric)
        self.spec = Spec(
            np.array([AGGREGATES.index(kpi.aggregate) for kpi in self.kpis], np.int64), lines, kinds, plan.predicate(definitions.page),
            definitions.session_gap_ms, DIMENSIONS + (len(lines.columns) + 1) // 2, HISTOGRAM_UPPER, np.zeros((len(kinds.shape), 2), np.int64),
        )  # fmt: skip
        self.places: I64 = np.full(1024, -1, np.int64)  # arena offset << 24 | sessions, or -1
        self.arena = Arena()
        self.horizon = 0
        self._swept = 0
        self.scratch = self._new_scratch(64)
        self.pending = new_pending()

    def _new_scratch(self, sessions: int) -> I64:
        return np.zeros((sessions, 2 * self.spec.words + 3), np.int64)

    def apply(self, batch: Batch, cells: Cells) -> None:
        """Extend, join and begin sessions and correct the cells."""
        events = events_of(batch)
        if batch.users > len(self.places):
            self.places = grown(self.places, max(2 * len(self.places), batch.users), fill=-1)
        status, g = -1, 0
        while status != DONE:
            status, g, room = _apply(
                self.spec, events, g, self.places, self.arena.arrays, self.scratch, self.pending, cells.arrays, self.horizon
            )
            if status == MORE_CELLS:
                cells.grow(room)
            elif status == MORE_WORDS:
                self.arena.grow(room)
            elif status == MORE_SCRATCH:
                self.scratch = self._new_scratch(2 * room)
        flush_pending(self.pending, cells)

    def expire(self, horizon: int) -> None:
        """Forget sessions that ended more than the gap before the horizon; memory is swept now and then."""
        self.horizon = max(self.horizon, horizon)
        if self.horizon - self._swept > max(self.spec.gap, self.lateness_ms // SWEEPS_OF_LATENESS):
            self._swept = self.horizon
            _sweep(self.spec, self.places, self.arena.arrays, self.horizon)

    def _bounds(self, keys: I64) -> tuple[I64, I64]:
        ends = window_ends(self.kpis, self.metric, self.time_zone, keys)
        return ends, ends + LONGEST_REPORTED_MS + self.lateness_ms

    def final_at(self, keys: I64) -> I64:
        """Per cell key: window end + a day + lateness, ms; 2^62 while a session that starts in the window may still change."""
        ends, final = self._bounds(keys)
        nothing = np.empty(0, np.int64)
        first, last = _live_starts(self.spec, self.places, self.arena.arrays, self.horizon, 0, nothing)
        if last < first:
            return final
        marks = np.zeros(last - first + 1, np.int64)
        _live_starts(self.spec, self.places, self.arena.arrays, self.horizon, first, marks)
        before = np.concatenate(([0], np.cumsum(marks)))  # windows begin and end at whole minutes
        since, until = (np.clip(edge // MINUTE_MS - first, 0, len(marks)) for edge in (keys[:, 1], ends))
        return np.where(before[until] > before[since], UNDECIDED, final)

    def rows(self, keys: I64, values: I64, versions: I64, strings: Strings, partition: int) -> Rows:
        """Cells [m] as rows of `kpi_cells`."""
        return kpi_rows(self.kpis, self.metric, keys, values, versions, strings, partition, self._bounds(keys)[1])

    def dump(self) -> Arrays:
        return self.arena.dump() | {"places": self.places, "horizon": np.array([self.horizon, self._swept], np.int64)}

    def load(self, arrays: Arrays) -> None:
        self.arena.load(arrays)
        self.places = arrays["places"].copy()
        self.horizon, self._swept = (int(v) for v in arrays["horizon"])
