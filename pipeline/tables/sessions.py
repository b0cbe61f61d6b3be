"""Sessions: maximal runs of a user's events in which none is more than the session gap after the one before it.

In: accepted batches. Out: cells (see `pipeline.tables.kpi_rows`). Called by `pipeline.tables.board`.

A session counts in the window of its first event, with that event's dimensions (equal times: the smaller event id is first). A late event
may extend a session, move its start, or join two: what the old ones gave is retracted. Only sessions that may still change are kept.
"""

from __future__ import annotations

import numpy as np

from pipeline.columns import I64, Strings
from pipeline.definitions import LONGEST_SESSION_MS
from pipeline.plan import Plan
from pipeline.tables.kernel import HISTOGRAM_UPPER, Arena, Cells, grown
from pipeline.tables.kpi_rows import compile_lines, events_of, flush_pending, kpi_rows, new_pending, window_ends
from pipeline.tables.sessions_kernel import (
    DIMENSIONS,
    DONE,
    MORE_CELLS,
    MORE_SCRATCH,
    MORE_WORDS,
    UNDECIDED,
    Spec,
    apply_rows,
    live_starts,
    sweep,
)
from pipeline.tables.table import Arrays, Batch
from pipeline.windows import MINUTE_MS
from schemas.rows import Rows

AGGREGATES = ("count", "bounces", "pages", "dwell", "dwell_quantile")  # numbered as in `sessions_kernel`
SWEEPS_OF_LATENESS = 8


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
            status, g, room = apply_rows(
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
            sweep(self.spec, self.places, self.arena.arrays, self.horizon)

    def _bounds(self, keys: I64) -> tuple[I64, I64]:
        ends = window_ends(self.kpis, self.metric, self.time_zone, keys)
        return ends, ends + LONGEST_SESSION_MS + self.lateness_ms

    def final_at(self, keys: I64) -> I64:
        """Per cell key: window end + a day + lateness, ms; 2^62 while a session that starts in the window may still change."""
        ends, final = self._bounds(keys)
        nothing = np.empty(0, np.int64)
        first, last = live_starts(self.spec, self.places, self.arena.arrays, self.horizon, 0, nothing)
        if last < first:
            return final
        marks = np.zeros(last - first + 1, np.int64)
        live_starts(self.spec, self.places, self.arena.arrays, self.horizon, first, marks)
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
