"""First occurrences: users in the window of their first matching event ever, and of those the ones who did it again soon.

In: accepted batches. Out: cells (metric + KPI << 32 | dimension << 8 | window, window start, string id << 32). Called by `pipeline.tables.board`.

KPIs with the same `match` share a memory of each user: the first event's ts, its event_id (equal times: the smaller hash is first), its
dimensions, and the second smallest ts, which may equal the first. A late event that changes one of them moves the user's counts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.columns import I32, I64, U64, Strings
from pipeline.definitions import Kpi, Match
from pipeline.plan import Plan
from pipeline.tables.kernel import CellArrays, Cells, cells_add, cells_room, grown, jit
from pipeline.tables.kpi_rows import kpi_rows, window_ends
from pipeline.tables.table import Arrays, Batch
from pipeline.tables.window_kernel import window_index, window_start
from pipeline.windows import boundary_table
from schemas.rows import Rows

DONE, MORE_CELLS, MORE_ROWS = 0, 1, 2
NEVER = np.iinfo(np.int64).max
ALWAYS = -1  # `within` of a KPI that needs no second event


class Spec(NamedTuple):
    """One match and what is counted of it."""

    predicate: int  # -1: every event
    seconds: bool  # whether the second ts matters
    columns: I64  # [dimensions kept] of `Columns.fields`
    lines: I64  # [lines, 4] cell key word 0, dimension kept or -1 for all users, window kind, within ms or ALWAYS
    kinds: I64  # [window kinds, 3] size in ms or 0, starts[from:to]
    starts: I64


class Events(NamedTuple):
    """The columns of a batch that first occurrences read, and its grouping by user."""

    event_id: U64
    ts: I64
    bits: U64
    fields: I32
    user: I32
    order: I64
    starts: I64


class State(NamedTuple):
    """One match's users. A user who never matched has no row: 4 bytes; a row has 24 and 4 a dimension."""

    rows: I32  # [users] the user's row or -1
    first: I64  # [capacity] ts of the first matching event
    tie: U64  # [capacity] its event_id
    second: I64  # [capacity] second smallest ts, NEVER without
    dimensions: I32  # [capacity, dimensions kept] string ids at the first event
    used: I64  # [1] rows in use


@jit
def _counts(within: int, first: int, second: int) -> bool:
    return first != NEVER and (within == ALWAYS or (second != NEVER and second - first <= within))


@jit
def _correct(
    spec: Spec, cells: CellArrays, first: int, second: int, dimensions: I32, events: Events, best: int, new_first: int, new_second: int
) -> None:
    """Move the user's counts; `best` is the row of a new first event or -1 when the dimensions stay."""
    kind, old_start, new_start = -1, 0, 0
    for i in range(len(spec.lines)):
        k0, dimension, line_kind, within = spec.lines[i, 0], spec.lines[i, 1], spec.lines[i, 2], spec.lines[i, 3]
        was, is_now = _counts(within, first, second), _counts(within, new_first, new_second)
        if not (was or is_now):
            continue
        if line_kind != kind:
            kind = line_kind
            size, starts = spec.kinds[kind, 0], spec.starts[spec.kinds[kind, 1] : spec.kinds[kind, 2]]
            new_start = window_start(size, starts, window_index(size, starts, new_first))
            old_start = new_start
            if first != NEVER and first != new_first:
                old_start = window_start(size, starts, window_index(size, starts, first))
        old_id, new_id = np.int64(0), np.int64(0)
        if dimension >= 0:
            old_id = np.int64(dimensions[dimension])
            new_id = old_id if best < 0 else np.int64(events.fields[best, spec.columns[dimension]])
        if was and is_now and old_start == new_start and old_id == new_id:
            continue
        if was:
            cells_add(cells, k0, old_start, old_id << 32, np.int64(-1))
        if is_now:
            cells_add(cells, k0, new_start, new_id << 32, np.int64(1))


@jit
def _apply(spec: Spec, events: Events, g: int, state: State, cells: CellArrays) -> tuple[int, int]:
    """Apply users' groups from g on. (status, g): when not DONE, the caller makes room and goes on from there."""
    word, bit = spec.predicate >> 6, np.uint64(spec.predicate & 63)
    while g < len(events.starts) - 1:
        begin, end = events.starts[g], events.starts[g + 1]
        u = np.int64(events.user[events.order[begin]])
        row = np.int64(state.rows[u])
        first, tie, second = NEVER, np.uint64(0), NEVER
        if row >= 0:
            first, tie, second = state.first[row], state.tie[row], state.second[row]
        old_first, old_second, best = first, second, np.int64(-1)
        for position in range(begin, end):
            r = events.order[position]
            ts = events.ts[r]
            if ts > first and (ts >= second or not spec.seconds):
                break  # a group is sorted by time: the rest changes nothing either
            if spec.predicate >= 0 and (events.bits[r, word] >> bit) & np.uint64(1) == 0:
                continue
            if ts < first or (ts == first and events.event_id[r] < tie):
                second, first, tie, best = first, ts, events.event_id[r], r
            elif ts < second:
                second = ts
        if best < 0 and second == old_second:
            g += 1
            continue

        if not cells_room(cells, 2 * len(spec.lines)):
            return MORE_CELLS, g
        if row < 0:
            row = state.used[0]
            if row == len(state.first):
                return MORE_ROWS, g
            state.used[0] += 1
            state.rows[u] = row
        _correct(spec, cells, old_first, old_second, state.dimensions[row], events, best, first, second)
        state.second[row] = second
        if best >= 0:
            state.first[row] = first
            state.tie[row] = tie
            for d in range(len(spec.columns)):
                state.dimensions[row, d] = events.fields[best, spec.columns[d]]
        g += 1
    return DONE, g


def _compile_spec(plan: Plan, match: Match | None, kpis: list[tuple[int, Kpi]]) -> Spec:
    """The KPIs (with their metric numbers) that share `match`, as arrays; lines of one window kind follow each other."""
    kept = list(dict.fromkeys(d for _, kpi in kpis for d in kpi.dimensions))
    windows = tuple(dict.fromkeys(w for _, kpi in kpis for w in kpi.windows))
    lines = [
        (metric << 32 | number << 8 | kpi.windows.index(window), kept.index(name) if name else -1, kind, _within(kpi))
        for kind, window in enumerate(windows)
        for metric, kpi in kpis
        if window in kpi.windows
        for number, name in enumerate(("", *kpi.dimensions))
    ]
    return Spec(
        -1 if match is None else plan.predicate(match),
        any(kpi.source == "repeat" for _, kpi in kpis),
        np.array([plan.field(d) for d in kept], np.int64),
        np.array(lines, np.int64).reshape(-1, 4),
        *boundary_table(windows, plan.definitions.time_zone),
    )


def _within(kpi: Kpi) -> int:
    return kpi.within_ms if kpi.source == "repeat" else ALWAYS


PER_ROW = ("first", "tie", "second", "dimensions")


class FirstTable:
    """All KPIs of one partition with source `first` or `repeat`."""

    def __init__(self, plan: Plan, metric: int) -> None:
        self.metric = metric
        self.kpis = tuple(kpi for kpi in plan.definitions.kpis if kpi.source in ("first", "repeat"))
        self.metrics = len(self.kpis)
        self.time_zone = plan.definitions.time_zone
        self.lateness_ms = plan.definitions.lateness_ms
        sharing: dict[Match | None, list[tuple[int, Kpi]]] = {}
        for i, kpi in enumerate(self.kpis):
            sharing.setdefault(kpi.match, []).append((metric + i, kpi))
        self.specs = [_compile_spec(plan, match, kpis) for match, kpis in sharing.items()]
        self.states = [
            State(
                np.full(1024, -1, np.int32), np.empty(1024, np.int64), np.empty(1024, np.uint64), np.empty(1024, np.int64),
                np.empty((1024, len(spec.columns)), np.int32), np.zeros(1, np.int64),
            )
            for spec in self.specs
        ]  # fmt: skip

    def apply(self, batch: Batch, cells: Cells) -> None:
        """Remember the batch's first and second events and correct the cells."""
        c = batch.columns
        events = Events(
            c.event_id, c.ts, np.ascontiguousarray(c.bits), np.ascontiguousarray(c.fields), batch.user, batch.order, batch.starts
        )
        for i, spec in enumerate(self.specs):
            state = self.states[i]
            if batch.users > len(state.rows):
                self.states[i] = state._replace(rows=grown(state.rows, max(2 * len(state.rows), batch.users), fill=-1))
            status, g = -1, 0
            while status != DONE:
                status, g = _apply(spec, events, g, self.states[i], cells.arrays)
                if status == MORE_CELLS:
                    cells.grow(2 * len(spec.lines))
                elif status == MORE_ROWS:
                    state = self.states[i]
                    self.states[i] = state._replace(**{name: grown(getattr(state, name), 2 * len(state.first)) for name in PER_ROW})

    def expire(self, horizon: int) -> None:
        """Nothing to forget: first and second are needed for as long as the user may come back."""

    def final_at(self, keys: I64) -> I64:
        """Per cell key: window end + `within_ms` of a repeat + lateness, ms."""
        within = np.array([max(_within(kpi), 0) for kpi in self.kpis], np.int64)[(keys[:, 0] >> 32) - self.metric]
        return window_ends(self.kpis, self.metric, self.time_zone, keys) + within + self.lateness_ms

    def rows(self, keys: I64, values: I64, versions: I64, strings: Strings, partition: int) -> Rows:
        """Cells [m] as rows of `kpi_cells`."""
        return kpi_rows(self.kpis, self.metric, keys, values, versions, strings, partition, self.final_at(keys))

    def dump(self) -> Arrays:
        out: Arrays = {}
        for i, state in enumerate(self.states):
            used = int(state.used[0])
            out[f"rows{i}"] = state.rows
            out |= {f"{name}{i}": getattr(state, name)[:used] for name in PER_ROW}
        return out

    def load(self, arrays: Arrays) -> None:
        for i in range(len(self.states)):
            used = len(arrays[f"first{i}"])
            per_row = {name: grown(arrays[f"{name}{i}"], max(1024, used)) for name in PER_ROW}
            self.states[i] = State(rows=arrays[f"rows{i}"].copy(), used=np.array([used], np.int64), **per_row)
