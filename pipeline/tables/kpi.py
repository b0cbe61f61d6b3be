"""KPIs counted an event at a time: counts, sums, and exactly how many distinct users.

In: accepted batches. Out: cells (see `pipeline.tables.kpi_rows`). Called by `pipeline.tables.board`.

Counts and sums only add. Distinct users need a memory of who was counted: a set a window, dropped when the window is over.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.columns import I64, Strings
from pipeline.plan import Plan
from pipeline.tables.kernel import CellArrays, Cells, jit
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
from pipeline.tables.slices import FIRST_SLOTS, SliceArrays, Slices, home_slot, slice_position
from pipeline.tables.table import Arrays, Batch
from pipeline.windows import window_indices, window_starts
from schemas.rows import Rows

DONE, MORE_CELLS, NO_SLICE, FULL = 0, 1, 2, 3
COUNT, SUM, USERS = 0, 1, 2
SPARSE, DENSE = 1, 2  # words a slot: a user each, or 64 users of consecutive index
MOST_USERS = 1 << 30  # a set's key is line + 1 (10 bits), string id (24), user (30)
MOST_STRINGS = 1 << 24
MOST_LINES = (1 << 10) - 1
MOST_OPENED = 64  # windows of a batch whose sets are made before it is applied


class Spec(NamedTuple):
    """The KPIs compiled."""

    kpis: I64  # [kpis, 4] predicate or -1 for every event, aggregate, column of `Columns.numbers`, money 0 or 1
    lines: Lines
    kinds: Kinds
    sets: I64  # [kinds, 2] lines that count users, words a slot
    at: I64  # [kinds] scratch: the position of the set of the kind's last window


@jit
def _newly_in(words: I64, used: I64, k: int, offset: int, mask: int, stride: int, line: int, value: int, user: int) -> bool:
    """Put a user into set k of a line and dimension value; whether they were not in it. The caller has made sure of room."""
    low = user if stride == SPARSE else user >> 6
    key = (line + 1) << 54 | value << 30 | low
    at = home_slot(key, mask)
    word = offset + at * stride
    while words[word] != 0 and words[word] != key:
        at = (at + 1) & mask
        word = offset + at * stride
    new = words[word] == 0
    if new:
        words[word] = key
        used[k] += 1
    if stride == DENSE:
        bit = np.int64(1) << (user & 63)
        if new:
            words[word + 1] = 0
        new = words[word + 1] & bit == 0
        words[word + 1] |= bit
    return new


@jit
def _room(used: I64, slots: I64, sets: I64, position: I64) -> tuple[int, int]:
    """(how many events the last windows' sets have room for, the position of the one with the least)."""
    least, which = np.int64(1) << 62, np.int64(-1)
    for kind in range(len(sets)):
        if sets[kind, 0] > 0:
            k = position[kind]
            room = (slots[k] * 3 // 4 - used[k]) // sets[kind, 0]
            if room < least:
                least, which = room, k
    return least, which


@jit
def _apply(spec: Spec, events: Events, i: int, slices: SliceArrays, pending: I64, cells: CellArrays) -> tuple[int, int, int]:
    """Apply events from i on. (status, i, slice or kind): when not DONE, the caller makes room and goes on from there."""
    kpis, sets, position = spec.kpis, spec.sets, spec.at
    table, columns, of_kpi = spec.lines.table, spec.lines.columns, spec.lines.of_kpi
    shape, starts, last = spec.kinds.shape, spec.kinds.starts, spec.kinds.last
    bits, stamps, fields, numbers, currencies, users = events.bits, events.ts, events.fields, events.numbers, events.currency, events.user
    words, used, offsets, slots, strides = slices.words, slices.used, slices.offset, slices.slots, slices.stride
    meta, capacity = cells.meta, len(cells.values)
    n_kinds, n_kpis, n_lines = len(sets), len(kpis), len(table)
    low, high, room = np.int64(1), np.int64(0), np.int64(0)  # where the last windows overlap, and events that their sets have room for
    while i < len(stamps):
        if meta[0] + n_lines > capacity:
            return MORE_CELLS, i, 0
        ts = stamps[i]
        if ts < low or ts >= high:
            low, high = np.int64(0), np.int64(1) << 62
            for kind in range(n_kinds):
                low = max(low, window_of(shape, starts, last, kind, ts))
                high = min(high, last[kind, 1])
                if sets[kind, 0] > 0:
                    position[kind] = slice_position(slices, last[kind, 2] * n_kinds + kind)
                    if position[kind] < 0:
                        return NO_SLICE, i, kind
            room = np.int64(0)
        if room == 0:
            room, k = _room(used, slots, sets, position)
            if room <= 0:
                return FULL, i, k
        room -= 1

        user = np.int64(users[i])
        for kpi in range(n_kpis):
            predicate, aggregate = kpis[kpi, 0], kpis[kpi, 1]
            if predicate >= 0 and (bits[i, predicate >> 6] >> np.uint64(predicate & 63)) & np.uint64(1) == 0:
                continue
            delta, currency = np.int64(1), np.int64(0)
            if aggregate == SUM:
                delta = numbers[i, kpis[kpi, 2]]
                if kpis[kpi, 3] == 1:
                    currency = np.int64(currencies[i])
            for line in range(of_kpi[kpi], of_kpi[kpi + 1]):
                dimension, kind = table[line, 1], table[line, 2]
                value = np.int64(0)
                if dimension >= 0:
                    value = np.int64(fields[i, columns[dimension]])
                if aggregate == USERS:
                    k = position[kind]
                    if not _newly_in(words, used, k, offsets[k], slots[k] - 1, strides[k], line, value, user):
                        continue
                k0, k1, k2 = table[line, 0], last[kind, 0], value << 32 | currency
                taken = pending_put(pending, k0, k1, k2, delta)
                if taken >= 0:
                    settle(pending, taken, cells)
                    pending_put(pending, k0, k1, k2, delta)
        i += 1
    return DONE, i, 0


class EventKpiTable:
    """All KPIs of one partition with source `events`."""

    def __init__(self, plan: Plan, metric: int) -> None:
        self.metric = metric
        self.kpis = tuple(kpi for kpi in plan.definitions.kpis if kpi.source == "events")
        self.metrics = len(self.kpis)
        self.time_zone = plan.definitions.time_zone
        self.lateness_ms = plan.definitions.lateness_ms
        lines, kinds, self.windows = compile_lines(plan, self.kpis, metric)
        if len(lines.table) > MOST_LINES:
            raise ValueError(f"the KPIs have {len(lines.table)} windows × dimensions; at most {MOST_LINES} are possible")
        compiled = [
            (
                -1 if kpi.match is None else plan.predicate(kpi.match),
                ("count", "sum", "users").index(kpi.aggregate),
                plan.number(kpi.field) if kpi.field else 0,
                int(kpi.money),
            )
            for kpi in self.kpis
        ]
        sets = [
            (sum(compiled[i][1] == USERS and w == kind for _, _, w, i in lines.table.tolist()), SPARSE if window == "1m" else DENSE)
            for kind, window in enumerate(self.windows)
        ]
        self.spec = Spec(
            np.array(compiled, np.int64).reshape(-1, 4),
            lines,
            kinds,
            np.array(sets, np.int64).reshape(-1, 2),
            np.zeros(len(sets), np.int64),
        )
        self.slices = Slices()
        self._slots: dict[int, int] = {}  # window kind to half the size of the newest grown set: what the next one begins with
        self.pending = new_pending()

    def apply(self, batch: Batch, cells: Cells) -> None:
        """Add the batch to the cells. Raises OverflowError beyond 2^30 users or 2^24 strings in a partition."""
        events = events_of(batch)
        dimensions = events.fields[:, self.spec.lines.columns]
        if batch.users > MOST_USERS or (dimensions.size and int(dimensions.max()) >= MOST_STRINGS):
            raise OverflowError(f"a partition has more than {MOST_USERS} users or {MOST_STRINGS} field values; use more partitions")
        if len(events.ts):
            self._open_sets(int(events.ts.min()), int(events.ts.max()))
        status, i = -1, 0
        while status != DONE:
            status, i, which = _apply(self.spec, events, i, self.slices.arrays, self.pending, cells.arrays)
            if status == MORE_CELLS:
                cells.grow(len(self.spec.lines.table))
            elif status == NO_SLICE:
                self._open(which, np.unique(window_indices(self.windows[which], self.time_zone, events.ts[i:])))
            elif status == FULL:
                self.slices.grow(which)
                self._slots[int(self.slices.arrays.number[which]) % len(self.windows)] = int(self.slices.arrays.slots[which]) // 2
        flush_pending(self.pending, cells)

    def _open_sets(self, first: int, last: int) -> None:
        """The sets of all windows from the batch's first to its last, unless it is scattered: `apply` makes those of its events then."""
        for kind, window in enumerate(self.windows):
            low, high = window_indices(window, self.time_zone, np.array([first, last])).tolist()
            if self.spec.sets[kind, 0] > 0 and high - low < MOST_OPENED:
                self._open(kind, np.arange(low, high + 1))

    def _open(self, kind: int, windows: I64) -> None:
        """Make the sets of windows of this kind, numbers ascending, that are not there."""
        lines, stride = self.spec.sets[kind].tolist()
        slots = max(self._slots.get(kind, FIRST_SLOTS), 1 << (2 * lines).bit_length())
        self.slices.add_many(windows * len(self.windows) + kind, stride, slots)

    def expire(self, horizon: int) -> None:
        """Forget who was counted in windows that end at or before the horizon."""
        number = self.slices.arrays.number
        ends = np.empty(len(number), np.int64)
        for kind, window in enumerate(self.windows):
            chosen = number % len(self.windows) == kind
            ends[chosen] = window_starts(window, self.time_zone, number[chosen] // len(self.windows) + 1)
        self.slices.keep(ends > horizon)

    def final_at(self, keys: I64) -> I64:
        """Per cell key: window end + lateness, ms."""
        return window_ends(self.kpis, self.metric, self.time_zone, keys) + self.lateness_ms

    def rows(self, keys: I64, values: I64, versions: I64, strings: Strings, partition: int) -> Rows:
        """Cells [m] as rows of `kpi_cells`."""
        return kpi_rows(self.kpis, self.metric, keys, values, versions, strings, partition, self.final_at(keys))

    def dump(self) -> Arrays:
        return dict(self.slices.dump())

    def load(self, arrays: Arrays) -> None:
        self.slices.load(arrays)
