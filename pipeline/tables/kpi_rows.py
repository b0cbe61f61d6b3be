"""What the KPI tables share: their lines (one KPI, window and dimension each) compiled for a kernel, adds collected before they reach the
cells, and cells as rows of `kpi_cells`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.columns import I32, I64, U64, Strings
from pipeline.definitions import Kpi
from pipeline.plan import Plan
from pipeline.tables.kernel import CellArrays, Cells, cells_add, cells_room, jit
from pipeline.tables.window_kernel import window_index, window_start
from pipeline.windows import boundary_table, window_indices, window_starts
from schemas.rows import Rows

PENDING = 4096  # 128 KiB: stays in the second-level cache
_MIX_A = np.uint64(0x9E3779B97F4A7C15)
_MIX_B = np.uint64(0xC2B2AE3D27D4EB4F)


class Events(NamedTuple):
    """The columns of a batch that KPI kernels read, and its grouping by user."""

    event_id: U64
    ts: I64
    bits: U64
    fields: I32
    numbers: I64
    order_key: U64
    currency: I32
    user: I32
    order: I64
    starts: I64


def events_of(batch: Any) -> Events:
    c = batch.columns
    return Events(
        np.ascontiguousarray(c.event_id), np.ascontiguousarray(c.ts), np.ascontiguousarray(c.bits), np.ascontiguousarray(c.fields),
        np.ascontiguousarray(c.numbers), np.ascontiguousarray(c.order), np.ascontiguousarray(c.currency), batch.user, batch.order, batch.starts,
    )  # fmt: skip


class Kinds(NamedTuple):
    """The distinct window kinds of some KPIs, and the window of each that was asked for last."""

    shape: I64  # [kinds, 3] size in ms or 0, starts[from:to]
    starts: I64
    last: I64  # [kinds, 3] start, end, index of the window


@jit
def _find_window(shape: I64, starts: I64, last: I64, kind: int, ts: int) -> None:
    size, own = shape[kind, 0], starts[shape[kind, 1] : shape[kind, 2]]
    index = window_index(size, own, ts)
    last[kind, 0] = window_start(size, own, index)
    last[kind, 1] = window_start(size, own, index + 1)
    last[kind, 2] = index


@jit
def window_of(shape: I64, starts: I64, last: I64, kind: int, ts: int) -> int:
    """Start of the window that holds `ts`; `last[kind]` is that window afterwards."""
    if ts < last[kind, 0] or ts >= last[kind, 1]:
        _find_window(shape, starts, last, kind, ts)
    return last[kind, 0]


class Lines(NamedTuple):
    """`table[line]`: cell key word 0, dimension kept or -1 for the total, window kind, number of the KPI. Lines of a KPI follow each other."""

    table: I64  # [lines, 4]
    columns: I64  # [dimensions kept] of `Columns.fields`
    of_kpi: I64  # [kpis + 1] KPI i has the lines of_kpi[i]:of_kpi[i + 1]


def compile_lines(plan: Plan, kpis: Sequence[Kpi], metric: int) -> tuple[Lines, Kinds, tuple[Any, ...]]:
    """Lines, window kinds, and the kinds' names."""
    kept = list(dict.fromkeys(d for kpi in kpis for d in kpi.dimensions))
    windows = tuple(dict.fromkeys(w for kpi in kpis for w in kpi.windows))
    lines, of_kpi = [], [0]
    for i, kpi in enumerate(kpis):
        for n, window in enumerate(kpi.windows):
            for number, name in enumerate(("", *kpi.dimensions)):
                lines.append(((metric + i) << 32 | number << 8 | n, kept.index(name) if name else -1, windows.index(window), i))
        of_kpi.append(len(lines))
    return (
        Lines(np.array(lines, np.int64).reshape(-1, 4), np.array([plan.field(d) for d in kept], np.int64), np.array(of_kpi, np.int64)),
        Kinds(*boundary_table(windows, plan.definitions.time_zone), np.zeros((len(windows), 3), np.int64)),
        windows,
    )


def new_pending() -> I64:
    """Adds of one batch by cell, direct mapped: neighbouring events add to the same few cells, so most adds never look a cell up.

    [PENDING, 5]: a cell's key, what to add, 1 when in use.
    """
    return np.zeros((PENDING, 5), np.int64)


@jit
def settle(pending: I64, at: int, cells: CellArrays) -> None:
    cells_add(cells, pending[at, 0], pending[at, 1], pending[at, 2], pending[at, 3])
    pending[at, 3] = 0
    pending[at, 4] = 0


@jit
def pending_put(pending: I64, k0: int, k1: int, k2: int, delta: int) -> int:
    """Note an add to a cell: -1. When another cell is pending in its place, that place: `settle` it, and put again."""
    h = (np.uint64(k0) * _MIX_B ^ np.uint64(k1)) * _MIX_A ^ np.uint64(k2) * _MIX_B
    at = np.int64((h ^ (h >> np.uint64(29))) & np.uint64(PENDING - 1))
    if pending[at, 0] == k0 and pending[at, 1] == k1 and pending[at, 2] == k2:
        pending[at, 3] += delta
        pending[at, 4] = 1
        return -1
    if pending[at, 4] == 1:
        return at
    pending[at, 0] = k0
    pending[at, 1] = k1
    pending[at, 2] = k2
    pending[at, 3] = delta
    pending[at, 4] = 1
    return -1


@jit
def _flush(pending: I64, cells: CellArrays) -> bool:
    for at in range(PENDING):
        if pending[at, 4] == 1:
            if not cells_room(cells, 1):
                return False
            settle(pending, at, cells)
    return True


def flush_pending(pending: I64, cells: Cells) -> None:
    """Bring what is pending into the cells: at the end of every `apply`."""
    while not _flush(pending, cells.arrays):
        cells.grow(1)


def window_ends(kpis: Sequence[Kpi], metric: int, time_zone: str, keys: I64) -> I64:
    """End, ms, of each cell's window; keys [m, 3]."""
    which, number = (keys[:, 0] >> 32) - metric, keys[:, 0] & 0xFF
    out = np.empty(len(keys), np.int64)
    for i, kpi in enumerate(kpis):
        for n, window in enumerate(kpi.windows):
            chosen = (which == i) & (number == n)
            out[chosen] = window_starts(window, time_zone, window_indices(window, time_zone, keys[chosen, 1]) + 1)
    return out


def kpi_rows(
    kpis: Sequence[Kpi], metric: int, keys: I64, values: I64, versions: I64, strings: Strings, partition: int, final_at: I64
) -> Rows:
    """Cells [m] as rows of `kpi_cells`."""
    of = [kpis[i] for i in ((keys[:, 0] >> 32) - metric).tolist()]
    windows, dimensions = (keys[:, 0] & 0xFF).tolist(), (keys[:, 0] >> 8 & 0xFF).tolist()
    columns: dict[str, Any] = {
        "kpi": [kpi.name for kpi in of],
        "definition": [kpi.version for kpi in of],
        "window": [kpi.windows[n] for kpi, n in zip(of, windows, strict=True)],
        "window_start": keys[:, 1],
        "dimension": [("", *kpi.dimensions)[n] for kpi, n in zip(of, dimensions, strict=True)],
        "dimension_value": [strings[i] for i in (keys[:, 2] >> 32).tolist()],
        "currency": [strings[i] for i in (keys[:, 2] & 0xFFFFFFFF).tolist()],
        "bucket": (keys[:, 0] >> 16 & 0xFFFF) - 1,
        "partition": np.full(len(keys), partition, np.int64),
        "value": values,
        "final_at": final_at,
        "version": versions,
    }
    return {"kpi_cells": columns}
