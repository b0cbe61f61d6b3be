"""KPIs over events: counts, exact sums and exact distinct users by window and dimension.

The board applies batches; counts and sums are additions, distinct users go through a set of (group, user) pairs, a group being a cell's key.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.columns import I32, I64, U64, Strings
from pipeline.plan import Plan
from pipeline.tables.kernel import CellArrays, Cells, cells_add, cells_room, cells_row, jit
from pipeline.tables.kpi_rows import WINDOWS, kpi_rows, window_ends
from pipeline.tables.table import Arrays, Batch
from pipeline.windows import boundaries, window_index, window_start
from schemas.rows import Rows

COUNT, SUM, USERS = 0, 1, 2
AGGREGATES = {"count": COUNT, "sum": SUM, "users": USERS}
SWEEP_MS = 3_600_000


@jit
def _insert(pairs: U64, pair: np.uint64) -> bool:
    """Whether the pair is new; it is in the set afterwards. Stored plus one: 0 is an empty slot."""
    mask = np.uint64(len(pairs) - 1)
    at = ((pair * np.uint64(0x9E3779B185EBCA87)) >> np.uint64(20)) & mask
    stored = pair + np.uint64(1)
    while pairs[at] != 0:
        if pairs[at] == stored:
            return False
        at = (at + np.uint64(1)) & mask
    pairs[at] = stored
    return True


@jit
def _apply(
    cells: CellArrays, groups: CellArrays, pairs: U64, used: int, start: int, most: int, spec: I64, dimensions: I64, sizes: I64, firsts: I64, bounds: I64,
    ts: I64, user: I32, bits: U64, fields: I32, numbers: I64, currency: I32,
) -> tuple[int, int]:  # fmt: skip
    """Apply rows from `start`; returns (rows done, pairs used), early when a cell, a group or a pair might not fit."""
    windows = len(sizes)
    begins = np.zeros(windows, np.int64)
    ends = np.zeros(windows, np.int64)
    for i in range(start, len(ts)):
        if not (cells_room(cells, most) and cells_room(groups, most) and (used + most) * 2 <= len(pairs)):
            return i, used
        for w in range(windows):
            if sizes[w] >= 0 and not (begins[w] <= ts[i] < ends[w]):
                starts = bounds[firsts[w] : firsts[w + 1]]
                index = window_index(sizes[w], starts, ts[i])
                begins[w] = window_start(sizes[w], starts, index)
                ends[w] = window_start(sizes[w], starts, index + 1)
        for k in range(len(spec)):
            if (bits[i, spec[k, 2]] >> np.uint64(spec[k, 3])) & np.uint64(1) == 0:
                continue
            money = np.int64(currency[i]) if spec[k, 5] else np.int64(0)
            amount = numbers[i, spec[k, 4]] if spec[k, 1] == SUM else np.int64(1)
            for w in range(windows):
                if (spec[k, 6] >> w) & 1 == 0:
                    continue
                for d in range(spec[k, 7] + 1):
                    value = np.int64(fields[i, dimensions[k, d - 1]]) if d else np.int64(0)
                    k0 = (spec[k, 0] << 32) | (d << 8) | w
                    k2 = (value << 32) | money
                    if spec[k, 1] == USERS:
                        group = cells_row(groups, k0, begins[w], k2)
                        if not _insert(pairs, (np.uint64(group) << np.uint64(32)) | np.uint64(user[i])):
                            continue
                        used += 1
                    cells_add(cells, k0, begins[w], k2, amount)
    return len(ts), used


@jit
def _move(old: U64, new: U64, renumbered: I64) -> int:
    """Copy the pairs whose group lives on under its new number; how many."""
    used = 0
    for stored in old:
        if stored != 0:
            pair = stored - np.uint64(1)
            group = renumbered[np.int64(pair >> np.uint64(32))]
            if group >= 0:
                _insert(new, (np.uint64(group) << np.uint64(32)) | (pair & np.uint64(0xFFFFFFFF)))
                used += 1
    return used


class EventKpiTable:
    """All KPIs with source `events`."""

    def __init__(self, plan: Plan, metric: int) -> None:
        definitions = plan.definitions
        self.kpis = [kpi for kpi in definitions.kpis if kpi.source == "events"]
        self.metric, self.metrics = metric, len(self.kpis)
        self._definitions = definitions
        self._spec = np.zeros((len(self.kpis), 8), np.int64)
        self._dimensions = np.zeros((len(self.kpis), max([1, *(len(k.dimensions) for k in self.kpis)])), np.int64)
        for k, kpi in enumerate(self.kpis):
            assert kpi.match is not None
            predicate = plan.predicate(kpi.match)
            number = plan.number(kpi.field) if kpi.aggregate == "sum" and kpi.field else 0
            windows = sum(1 << WINDOWS.index(w) for w in kpi.windows)
            self._spec[k] = (
                metric + k, AGGREGATES[kpi.aggregate], predicate >> 6, predicate & 63, number, kpi.money, windows, len(kpi.dimensions)
            )  # fmt: skip
            self._dimensions[k, : len(kpi.dimensions)] = [plan.field(d) for d in kpi.dimensions]
        asked = {w for kpi in self.kpis for w in kpi.windows}
        bounds = [boundaries(w, definitions.time_zone) for w in WINDOWS]
        self._sizes = np.array([b.size if w in asked else -1 for w, b in zip(WINDOWS, bounds, strict=True)], np.int64)
        self._firsts = np.cumsum([0, *(len(b.starts) for b in bounds)]).astype(np.int64)
        self._bounds: I64 = np.concatenate([b.starts for b in bounds])
        self._most = int(sum(len(k.windows) * (1 + len(k.dimensions)) for k in self.kpis))
        self._groups = Cells()
        self._pairs: U64 = np.zeros(1 << 12, np.uint64)
        self._used = 0
        self._swept = 0

    def apply(self, batch: Batch, cells: Cells) -> None:
        c, done = batch.columns, 0
        while True:
            done, self._used = _apply(
                cells.arrays, self._groups.arrays, self._pairs, self._used, done, self._most, self._spec, self._dimensions, self._sizes, self._firsts,
                self._bounds, c.ts, batch.user, c.bits, c.fields, c.numbers, c.currency,
            )  # fmt: skip
            if done == len(c):
                return
            if not cells_room(cells.arrays, self._most):
                cells.grow(self._most)
            if not cells_room(self._groups.arrays, self._most):
                self._groups.grow(self._most)
            if (self._used + self._most) * 2 > len(self._pairs):
                self._rebuild(np.arange(len(self._groups), dtype=np.int64), 2 * (self._used + self._most))

    def _rebuild(self, renumbered: npt.NDArray[np.int64], room: int) -> None:
        pairs = np.zeros(1 << max(12, (room * 2 - 1).bit_length()), np.uint64)
        self._used = _move(self._pairs, pairs, renumbered)
        self._pairs = pairs

    def expire(self, horizon: int) -> None:
        if horizon - self._swept < SWEEP_MS or not len(self._groups):
            return
        self._swept = horizon
        alive = window_ends(self._groups.arrays.keys[: len(self._groups)], self._definitions) > horizon
        if not alive.all():
            renumbered = np.where(alive, np.cumsum(alive) - 1, -1)
            self._rebuild(renumbered, self._used)
            self._groups.keep(alive)

    def final_at(self, keys: I64) -> I64:
        return window_ends(keys, self._definitions) + self._definitions.lateness_ms

    def rows(self, keys: I64, values: I64, versions: I64, strings: Strings, partition: int) -> Rows:
        return kpi_rows(self.kpis, self.metric, keys, values, versions, self.final_at(keys), strings, partition)

    def dump(self) -> Arrays:
        return {"groups": self._groups.arrays.keys[: len(self._groups)], "pairs": self._pairs[self._pairs != 0]}

    def load(self, arrays: Arrays) -> None:
        keys = arrays["groups"]
        zeros = np.zeros(len(keys), np.int64)
        self._groups.load({"keys": keys, "values": zeros, "versions": zeros})
        self._pairs = arrays["pairs"]
        self._rebuild(np.arange(len(keys), dtype=np.int64), len(self._pairs) + self._most)
