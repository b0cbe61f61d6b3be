"""Sessions: runs of a user's events with gaps of at most session_gap_ms, and the KPIs over them.

Late events extend sessions, join two, or give one an earlier first event; what a changed session had contributed is retracted and added again.
Window and dimensions of a session are those of its first event (of equal times the one with the smaller event id hash).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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
    cells_room,
    grown,
    histogram_bucket,
    jit,
)
from pipeline.tables.kpi_rows import kpi_rows, window_ends
from pipeline.tables.kpi_spec import Spec, compile_spec, contribute
from pipeline.tables.table import Arrays, Batch
from schemas.rows import Rows

SESSIONS, BOUNCES, PAGES, DWELL, QUANTILE = range(5)
AGGREGATES = {"count": SESSIONS, "bounces": BOUNCES, "pages": PAGES, "dwell": DWELL, "dwell_quantile": QUANTILE}
START, END, PAGE, TIE, HEAD = 0, 1, 2, 3, 4  # words of a session, its dimensions' string ids follow
LONGEST_MS = 86_400_000
"""A session's window counts as final a day and the lateness after its end: only a session that lasts longer than a day changes it later."""
NEVER = 1 << 62


@jit
def _count(cells: CellArrays, spec: Spec, upper: I64, session: I64, sign: int) -> None:
    for k in range(len(spec.kpis)):
        aggregate = spec.kpis[k, 1]
        amount, bucket = np.int64(1), np.int64(-1)
        if aggregate == BOUNCES:
            amount = np.int64(session[PAGE] <= 1)
        elif aggregate == PAGES:
            amount = session[PAGE]
        elif aggregate == DWELL:
            amount = session[END] - session[START]
        elif aggregate == QUANTILE:
            bucket = np.int64(histogram_bucket(upper, session[END] - session[START]))
        if amount:
            contribute(cells, spec, k, session[START], session[HEAD:], bucket, sign * amount)


@jit
def _add_event(sessions: I64, m: int, gap: int, ts: int, page: int, tie: int, dimensions: I64) -> int:
    """Put an event into the sorted sessions [m]; how many there are then."""
    j = m - 1
    while j >= 0 and sessions[j, START] - gap > ts:
        j -= 1
    if j < 0 or sessions[j, END] + gap < ts:
        for i in range(m, j + 1, -1):
            sessions[i] = sessions[i - 1]
        one = sessions[j + 1]
        one[START], one[END], one[PAGE], one[TIE] = ts, ts, page, tie
        one[HEAD:] = dimensions
        return m + 1
    one = sessions[j]
    one[PAGE] += page
    one[END] = max(one[END], ts)
    if ts < one[START] or (ts == one[START] and np.uint64(tie) < np.uint64(one[TIE])):
        one[START], one[TIE] = ts, tie
        one[HEAD:] = dimensions
    if j > 0 and one[START] - gap <= sessions[j - 1, END]:
        left = sessions[j - 1]
        left[END] = max(left[END], one[END])
        left[PAGE] += one[PAGE]
        for i in range(j, m - 1):
            sessions[i] = sessions[i + 1]
        return m - 1
    return m


@jit
def _apply(
    cells: CellArrays, arena: ArenaArrays, where: I64, size: I32, count: I32, scratch: I64, group: int, order: I64, starts: I64,
    user: I32, ts: I64, event_id: U64, bits: U64, fields: I32, columns: I64, page_word: int, page_bit: int, gap: int, horizon: int,
    spec: Spec, most: int, upper: I64,
) -> int:  # fmt: skip
    """Apply user groups from `group`; the group reached, early when cells, arena or scratch are too small for it."""
    width = scratch.shape[1]
    dimensions = np.zeros(width - HEAD, np.int64)
    for g in range(group, len(starts) - 1):
        who = user[order[starts[g]]]
        old = count[who]
        events = starts[g + 1] - starts[g]
        if old + events + 1 > len(scratch) or not cells_room(cells, 2 * most * (2 * old + events)):
            return g
        at = where[who]
        m = 0
        for s in range(old):
            words = arena.words[at + s * width : at + (s + 1) * width]
            if words[END] + gap >= horizon:
                scratch[m] = words
                m += 1
        for e in range(starts[g], starts[g + 1]):
            row = order[e]
            for d in range(len(columns)):
                dimensions[d] = fields[row, columns[d]]
            page = np.int64((bits[row, page_word] >> np.uint64(page_bit)) & np.uint64(1))
            m = _add_event(scratch, m, gap, ts[row], page, np.int64(event_id[row]), dimensions)
        new_at, new_size = at, size[who]
        fits = block_class(m * width)
        if at < 0 or fits > new_size or fits + 4 < new_size:
            new_size = np.int32(fits)
            new_at = arena_take(arena, fits)
            if new_at < 0:
                return g
        i, s = 0, 0  # both sorted by start: what is in one only is retracted or added
        while s < old or i < m:
            before = arena.words[at + s * width : at + (s + 1) * width] if s < old else scratch[0]
            if s < old and before[END] + gap < horizon:
                s += 1
            elif s < old and i < m and (before == scratch[i]).all():
                s += 1
                i += 1
            elif i == m or (s < old and before[START] <= scratch[i, START]):
                _count(cells, spec, upper, before, -1)
                s += 1
            else:
                _count(cells, spec, upper, scratch[i], 1)
                i += 1
        if new_at != at:
            if at >= 0:
                arena_give(arena, at, size[who])
            where[who], size[who] = new_at, new_size
        for s in range(m):
            arena.words[new_at + s * width : new_at + (s + 1) * width] = scratch[s]
        count[who] = m
    return len(starts) - 1


@jit
def _sweep(arena: ArenaArrays, where: I64, size: I32, count: I32, width: int, gap: int, horizon: int) -> tuple[int, int]:
    """Free users without a live session; returns (earliest start of a live session, most sessions of one user)."""
    earliest, most = np.int64(NEVER), 0
    for who in range(len(where)):
        alive = False
        for s in range(count[who]):
            at = where[who] + s * width
            if arena.words[at + END] + gap >= horizon:
                alive = True
                earliest = min(earliest, arena.words[at + START])
        if alive:
            most = max(most, count[who])
        elif where[who] >= 0:
            arena_give(arena, where[who], size[who])
            where[who], size[who], count[who] = -1, 0, 0
    return earliest, most


class SessionTable:
    """All KPIs with source `sessions`."""

    def __init__(self, plan: Plan, metric: int) -> None:
        self._definitions = plan.definitions
        self.kpis = [kpi for kpi in plan.definitions.kpis if kpi.source == "sessions"]
        self.metric, self.metrics = metric, len(self.kpis)
        self._spec, self._columns, self._most = compile_spec(self.kpis, plan, metric, AGGREGATES)
        self._page = plan.predicate(plan.definitions.page) if self.kpis else 0
        self._width = HEAD + len(self._columns)
        self._arena = Arena()
        self._where: I64 = np.full(1024, -1, np.int64)
        self._size: I32 = np.zeros(1024, np.int32)
        self._count: I32 = np.zeros(1024, np.int32)
        self._scratch: I64 = np.zeros((1024, self._width), np.int64)
        self._horizon = 0
        self._swept = 0

    def apply(self, batch: Batch, cells: Cells) -> None:
        if batch.users > len(self._where):
            rows = max(2 * len(self._where), batch.users)
            self._where, self._size, self._count = grown(self._where, rows, -1), grown(self._size, rows, 0), grown(self._count, rows, 0)
        c, group, groups = batch.columns, 0, len(batch.starts) - 1
        while True:
            group = _apply(
                cells.arrays, self._arena.arrays, self._where, self._size, self._count, self._scratch, group, batch.order, batch.starts,
                batch.user, c.ts, c.event_id, c.bits, c.fields, self._columns, self._page >> 6, self._page & 63,
                self._definitions.session_gap_ms, self._horizon, self._spec, self._most, HISTOGRAM_UPPER,
            )  # fmt: skip
            if group == groups:
                return
            self._grow(batch, cells, group)

    def _grow(self, batch: Batch, cells: Cells, group: int) -> None:
        old = int(self._count[batch.user[batch.order[batch.starts[group]]]])
        events = int(batch.starts[group + 1] - batch.starts[group])
        if old + events + 1 > len(self._scratch):
            self._scratch = np.zeros((2 * (old + events + 1), self._width), np.int64)
        elif not cells_room(cells.arrays, 2 * self._most * (2 * old + events)):
            cells.grow(2 * self._most * (2 * old + events))
        else:
            self._arena.grow(2 * (old + events) * self._width + 16)

    def expire(self, horizon: int) -> None:
        self._horizon = horizon
        if horizon - self._swept >= 3_600_000:
            self._swept = horizon
            self._sweep()

    def _sweep(self) -> int:
        earliest, _ = _sweep(
            self._arena.arrays, self._where, self._size, self._count, self._width, self._definitions.session_gap_ms, self._horizon
        )
        return int(earliest)

    def _final(self, keys: I64) -> I64:
        return window_ends(keys, self._definitions) + LONGEST_MS + self._definitions.lateness_ms

    def final_at(self, keys: I64) -> I64:
        """As the rows say, but never while a session that began in the window may still change."""
        return np.where(window_ends(keys, self._definitions) > self._sweep(), NEVER, self._final(keys))

    def rows(self, keys: I64, values: I64, versions: I64, strings: Strings, partition: int) -> Rows:
        return kpi_rows(self.kpis, self.metric, keys, values, versions, self._final(keys), strings, partition)

    def dump(self) -> Arrays:
        return {"where": self._where, "size": self._size, "count": self._count, "horizon": _number(self._horizon)} | self._arena.dump()

    def load(self, arrays: Arrays) -> None:
        self._where, self._size, self._count = arrays["where"], arrays["size"], arrays["count"]
        self._horizon = int(arrays["horizon"][0])
        self._arena.load({"words": arrays["words"], "free": arrays["free"]})


def _number(value: int) -> npt.NDArray[np.int64]:
    return np.array([value], np.int64)
