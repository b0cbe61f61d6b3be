"""Orders by their life: created, paid, cancelled, refunded, each order once.

In: accepted batches. Out: cells (see `pipeline.tables.kpi_rows`). Called by `pipeline.tables.board`.

An order is known by the hash of its order_id. What decides the window and the dimensions is the earliest event of a kind (equal times: the
smaller event id); a late one moves the order's counts. An order is followed for 180 days after its first event: an event of the same
order_id beyond that begins a new order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipeline.columns import I32, I64, U64, Strings
from pipeline.definitions import ORDER_HORIZON_MS
from pipeline.plan import ORDER_EVENTS, Plan
from pipeline.tables.kernel import CellArrays, Cells, cells_room, grown, jit
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
from pipeline.windows import DAY_MS
from schemas.rows import Rows

DONE, MORE_CELLS, MORE_ROWS = 0, 1, 2
NEVER = np.iinfo(np.int64).max
CREATED, PAID, CANCELLED, REFUNDED = range(4)  # as ORDER_EVENTS
KINDS = 4
DECIDES = {
    "created": (CREATED, CREATED),
    "cancelled": (CANCELLED, CANCELLED),
    "paid_of_created": (CREATED, PAID),
    "paid": (PAID, PAID),
    "refunded_of_paid": (PAID, REFUNDED),
}
"""Aggregate to the kind whose first event gives window and dimensions, and the kind that the order must have, too."""


class Spec(NamedTuple):
    """The KPIs compiled."""

    predicates: I64  # [KINDS]
    decides: I64  # [kpis, 2]
    lines: Lines
    kinds: Kinds
    horizon: int


class State(NamedTuple):
    """Orders by hash, open addressing to dense rows."""

    slots: I32  # [power of two] row or -1
    keys: U64  # [capacity]
    began: I64  # [capacity] ts of the order's earliest event
    first: I64  # [capacity, KINDS] ts of the earliest event of a kind, or NEVER
    tie: U64  # [capacity, KINDS] its event_id
    dimensions: I32  # [capacity, KINDS, dimensions kept] its string ids
    used: I64  # [1]


@jit
def _slot(state: State, key: np.uint64) -> int:
    """Where the order is, or would be."""
    mask = np.uint64(len(state.slots) - 1)
    at = key & mask
    while state.slots[at] >= 0 and state.keys[state.slots[at]] != key:
        at = (at + np.uint64(1)) & mask
    return np.int64(at)


@jit
def _index(state: State) -> None:
    for row in range(state.used[0]):
        state.slots[_slot(state, state.keys[row])] = row


@jit
def _count(spec: Spec, state: State, row: int, kind: int, sign: int, pending: I64, cells: CellArrays) -> None:
    """Add or retract what the order gives to the KPIs that look at `kind`."""
    for kpi in range(len(spec.decides)):
        decides, needs = spec.decides[kpi, 0], spec.decides[kpi, 1]
        if (kind != decides and kind != needs) or state.first[row, decides] == NEVER or state.first[row, needs] == NEVER:
            continue
        for line in range(spec.lines.of_kpi[kpi], spec.lines.of_kpi[kpi + 1]):
            dimension = spec.lines.table[line, 1]
            value = np.int64(state.dimensions[row, decides, dimension]) if dimension >= 0 else np.int64(0)
            start = window_of(spec.kinds.shape, spec.kinds.starts, spec.kinds.last, spec.lines.table[line, 2], state.first[row, decides])
            taken = pending_put(pending, spec.lines.table[line, 0], start, value << 32, sign)
            if taken >= 0:
                settle(pending, taken, cells)
                pending_put(pending, spec.lines.table[line, 0], start, value << 32, sign)


@jit
def _kind(spec: Spec, events: Events, i: int) -> int:
    for kind in range(KINDS):
        p = spec.predicates[kind]
        if (events.bits[i, p >> 6] >> np.uint64(p & 63)) & np.uint64(1) != 0:
            return kind
    return -1


@jit
def _apply(spec: Spec, events: Events, i: int, state: State, pending: I64, cells: CellArrays) -> tuple[int, int]:
    """Apply events from i on. (status, i): when not DONE, the caller makes room and goes on from there."""
    while i < len(events.ts):
        key = events.order_key[i]
        kind = -1
        if key != np.uint64(0):
            kind = _kind(spec, events, i)
        if kind < 0:
            i += 1
            continue
        if not cells_room(cells, 2 * len(spec.lines.table)):
            return MORE_CELLS, i
        ts = events.ts[i]
        at = _slot(state, key)
        row = np.int64(state.slots[at])
        if row < 0:
            if state.used[0] == len(state.keys):
                return MORE_ROWS, i
            row = state.used[0]
            state.used[0] += 1
            state.slots[at] = row
            state.keys[row] = key
            state.began[row] = NEVER
        if state.began[row] == NEVER or ts - state.began[row] > spec.horizon:
            state.began[row] = ts
            for k in range(KINDS):
                state.first[row, k] = NEVER
                state.tie[row, k] = 0
                state.dimensions[row, k, :] = 0
        state.began[row] = min(state.began[row], ts)
        first = state.first[row, kind]
        if ts < first or (ts == first and events.event_id[i] < state.tie[row, kind]):
            _count(spec, state, row, kind, np.int64(-1), pending, cells)
            state.first[row, kind] = ts
            state.tie[row, kind] = events.event_id[i]
            for d in range(len(spec.lines.columns)):
                state.dimensions[row, kind, d] = events.fields[i, spec.lines.columns[d]]
            _count(spec, state, row, kind, np.int64(1), pending, cells)
        i += 1
    return DONE, i


PER_ROW = ("keys", "began", "first", "tie", "dimensions")


class OrderTable:
    """All KPIs of one partition with source `orders`: 80 bytes an order, 16 a dimension."""

    def __init__(self, plan: Plan, metric: int) -> None:
        self.metric = metric
        self.kpis = tuple(kpi for kpi in plan.definitions.kpis if kpi.source == "orders")
        self.metrics = len(self.kpis)
        self.time_zone = plan.definitions.time_zone
        self.lateness_ms = plan.definitions.lateness_ms
        lines, kinds, _ = compile_lines(plan, self.kpis, metric)
        self.spec = Spec(
            np.array([plan.predicate(match) for match in ORDER_EVENTS] if self.kpis else [0] * KINDS, np.int64),
            np.array([DECIDES[kpi.aggregate] for kpi in self.kpis], np.int64).reshape(-1, 2), lines, kinds, ORDER_HORIZON_MS,
        )  # fmt: skip
        d = len(lines.columns)
        empty: Arrays = {
            "keys": np.empty(0, np.uint64), "began": np.empty(0, np.int64), "first": np.empty((0, KINDS), np.int64),
            "tie": np.empty((0, KINDS), np.uint64), "dimensions": np.empty((0, KINDS, d), np.int32),
        }  # fmt: skip
        self.state = self._state(empty, 1024)
        self._purged = 0
        self.pending = new_pending()

    @staticmethod
    def _state(rows: Arrays, capacity: int) -> State:
        per_row: dict[str, Any] = {name: grown(rows[name], capacity) for name in PER_ROW}
        slots = np.full(1 << (2 * capacity - 1).bit_length(), -1, np.int32)
        state = State(slots=slots, used=np.array([len(rows["keys"])], np.int64), **per_row)
        _index(state)
        return state

    def apply(self, batch: Batch, cells: Cells) -> None:
        """Note what happened to orders and correct the cells."""
        if not batch.columns.order.any():
            return
        events = events_of(batch)
        status, i = -1, 0
        while status != DONE:
            status, i = _apply(self.spec, events, i, self.state, self.pending, cells.arrays)
            if status == MORE_CELLS:
                cells.grow(2 * len(self.spec.lines.table))
            elif status == MORE_ROWS:
                self.state = self._state(self.dump(), 2 * len(self.state.keys))
        flush_pending(self.pending, cells)

    def expire(self, horizon: int) -> None:
        """Forget orders that began more than 180 days before the horizon, a day's worth at a time."""
        if horizon - self._purged < DAY_MS:
            return
        self._purged = horizon
        rows = self.dump()
        kept = rows["began"] + ORDER_HORIZON_MS >= horizon
        if not kept.all():
            self.state = self._state({name: array[kept] for name, array in rows.items()}, max(1024, 2 * int(kept.sum())))

    def final_at(self, keys: I64) -> I64:
        """Per cell key: window end + lateness, ms, and 180 days more where a later event of the order decides."""
        follows = np.array([0 if decides == needs else ORDER_HORIZON_MS for decides, needs in self.spec.decides.tolist()], np.int64)
        ends = window_ends(self.kpis, self.metric, self.time_zone, keys)
        return ends + self.lateness_ms + follows[(keys[:, 0] >> 32) - self.metric]

    def rows(self, keys: I64, values: I64, versions: I64, strings: Strings, partition: int) -> Rows:
        """Cells [m] as rows of `kpi_cells`."""
        return kpi_rows(self.kpis, self.metric, keys, values, versions, strings, partition, self.final_at(keys))

    def dump(self) -> Arrays:
        used = int(self.state.used[0])
        return {name: getattr(self.state, name)[:used] for name in PER_ROW}

    def load(self, arrays: Arrays) -> None:
        self.state = self._state(arrays, max(1024, 2 * len(arrays["keys"])))
