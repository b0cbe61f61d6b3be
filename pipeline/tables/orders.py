"""Orders: what became of each, joined by order id, and the KPIs over them.

An order's created, paid, cancelled and refunded times are the earliest of their events; a KPI counts it in the window of the deciding one, with the
dimensions of that event. An order is forgotten 180 days after its last event; an event that comes later begins a new one.
"""

from __future__ import annotations

import numpy as np

from pipeline.columns import I32, I64, U64, Strings
from pipeline.plan import ORDER_EVENTS, Plan
from pipeline.tables.kernel import CellArrays, Cells, UserIndex, cells_room, grown, jit
from pipeline.tables.kpi_rows import kpi_rows, window_ends
from pipeline.tables.kpi_spec import Spec, compile_spec, contribute
from pipeline.tables.table import Arrays, Batch
from schemas.rows import Rows

AGGREGATES = {"created": 0, "paid": 1, "cancelled": 2, "paid_of_created": 3, "refunded_of_paid": 4}
CREATED, PAID, CANCELLED, REFUNDED = range(4)
ORDER_HORIZON_MS = 180 * 86_400_000
DAY_MS = 86_400_000


@jit
def _count(cells: CellArrays, spec: Spec, times: I64, dimensions: I64, sign: int) -> None:
    for k in range(len(spec.kpis)):
        aggregate = spec.kpis[k, 1]
        kind = aggregate if aggregate <= CANCELLED else CREATED if aggregate == 3 else PAID
        if times[kind] == 0 or (aggregate == 3 and times[PAID] == 0) or (aggregate == 4 and times[REFUNDED] == 0):
            continue
        contribute(cells, spec, k, times[kind], dimensions[kind], -1, sign)


@jit
def _apply(
    cells: CellArrays, start: int, order: I32, rows: I64, times: I64, ties: U64, dimensions: I64, spec: Spec, most: int, columns: I64,
    predicates: I64, ts: I64, event_id: U64, bits: U64, fields: I32,
) -> int:  # fmt: skip
    """Apply the chosen rows from `start`; how far it came, early when cells might not fit."""
    for i in range(start, len(rows)):
        if not cells_room(cells, 2 * most):
            return i
        row, one = rows[i], order[i]
        for kind in range(4):
            if (bits[row, predicates[kind] >> 6] >> np.uint64(predicates[kind] & 63)) & np.uint64(1) == 0:
                continue
            known = times[one, kind]
            if known != 0 and (ts[row] > known or (ts[row] == known and event_id[row] >= ties[one, kind])):
                continue
            _count(cells, spec, times[one], dimensions[one], -1)
            times[one, kind] = ts[row]
            ties[one, kind] = event_id[row]
            for d in range(len(columns)):
                dimensions[one, kind, d] = fields[row, columns[d]]
            _count(cells, spec, times[one], dimensions[one], 1)
    return len(rows)


class OrderTable:
    """All KPIs with source `orders`. 130 bytes an order and 32 a dimension."""

    def __init__(self, plan: Plan, metric: int) -> None:
        self._definitions = plan.definitions
        self.kpis = [kpi for kpi in plan.definitions.kpis if kpi.source == "orders"]
        self.metric, self.metrics = metric, len(self.kpis)
        self._spec, self._columns, self._most = compile_spec(self.kpis, plan, metric, AGGREGATES)
        self._predicates = np.array([plan.predicate(match) for match in ORDER_EVENTS] if self.kpis else [0] * 4, np.int64)
        self._index = UserIndex()
        self._times: I64 = np.zeros((1024, 4), np.int64)
        self._ties: U64 = np.zeros((1024, 4), np.uint64)
        self._dimensions: I64 = np.zeros((1024, 4, len(self._columns)), np.int64)
        self._swept = 0

    def apply(self, batch: Batch, cells: Cells) -> None:
        c = batch.columns
        rows = np.flatnonzero(c.order)
        if not len(rows):
            return
        order = self._index.resolve(np.stack((c.order[rows], np.zeros(len(rows), np.uint64)), axis=1))
        if len(self._index) > len(self._times):
            n = 2 * len(self._index)
            self._times, self._ties, self._dimensions = grown(self._times, n, 0), grown(self._ties, n, 0), grown(self._dimensions, n, 0)
        done = 0
        while True:
            done = _apply(
                cells.arrays, done, order, rows, self._times, self._ties, self._dimensions, self._spec, self._most, self._columns,
                self._predicates, c.ts, c.event_id, c.bits, c.fields,
            )  # fmt: skip
            if done == len(rows):
                return
            cells.grow(2 * self._most)

    def expire(self, horizon: int) -> None:
        if horizon - self._swept < DAY_MS:
            return
        self._swept = horizon
        n = len(self._index)
        alive = np.flatnonzero(self._times[:n].max(axis=1, initial=0) >= horizon - ORDER_HORIZON_MS)
        if len(alive) < n:
            self.load({"keys": self._index.dump()[alive], "times": self._times[alive], "ties": self._ties[alive], "dimensions": self._dimensions[alive]})

    def final_at(self, keys: I64) -> I64:
        aggregate = self._spec.kpis[(keys[:, 0] >> 32) - self.metric, 1]
        waits = np.where(aggregate >= 3, ORDER_HORIZON_MS, 0)
        return window_ends(keys, self._definitions) + waits + self._definitions.lateness_ms

    def rows(self, keys: I64, values: I64, versions: I64, strings: Strings, partition: int) -> Rows:
        return kpi_rows(self.kpis, self.metric, keys, values, versions, self.final_at(keys), strings, partition)

    def dump(self) -> Arrays:
        n = len(self._index)
        return {"keys": self._index.dump(), "times": self._times[:n], "ties": self._ties[:n], "dimensions": self._dimensions[:n]}

    def load(self, arrays: Arrays) -> None:
        self._index = UserIndex(arrays["keys"])
        n = len(self._index)
        self._times, self._ties = grown(arrays["times"], max(1024, 2 * n), 0), grown(arrays["ties"], max(1024, 2 * n), 0)
        self._dimensions = grown(arrays["dimensions"], max(1024, 2 * n), 0)
