"""KPIs compiled for the kernels of sessions and orders: which windows and dimensions a contribution goes to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.columns import I64
from pipeline.definitions import Kpi
from pipeline.plan import Plan
from pipeline.tables.kernel import CellArrays, cells_add, jit
from pipeline.tables.kpi_rows import WINDOWS
from pipeline.windows import boundaries, window_index, window_start


class Spec(NamedTuple):
    """`kpis`[k] = (metric, aggregate, windows as bits, dimensions); `dimensions`[k, d] = column in the table's own dimension list."""

    kpis: I64
    dimensions: I64
    sizes: I64
    firsts: I64
    bounds: I64


def compile_spec(kpis: list[Kpi], plan: Plan, metric: int, aggregates: dict[str, int]) -> tuple[Spec, I64, int]:
    """The spec, the columns of `Columns.fields` that the table keeps (its dimension list), and the most cells one contribution of all KPIs touches."""
    names = list(dict.fromkeys(d for kpi in kpis for d in kpi.dimensions))
    dimensions = np.zeros((len(kpis), max(1, len(names))), np.int64)
    rows = np.zeros((len(kpis), 4), np.int64)
    for k, kpi in enumerate(kpis):
        rows[k] = (metric + k, aggregates[kpi.aggregate], sum(1 << WINDOWS.index(w) for w in kpi.windows), len(kpi.dimensions))
        dimensions[k, : len(kpi.dimensions)] = [names.index(d) for d in kpi.dimensions]
    bounds = [boundaries(w, plan.definitions.time_zone) for w in WINDOWS]
    spec = Spec(
        rows,
        dimensions,
        np.array([b.size for b in bounds], np.int64),
        np.cumsum([0, *(len(b.starts) for b in bounds)]).astype(np.int64),
        np.concatenate([b.starts for b in bounds]),
    )
    most = sum(len(k.windows) * (1 + len(k.dimensions)) for k in kpis)
    return spec, np.array([plan.field(name) for name in names], np.int64), most


@jit
def contribute(cells: CellArrays, spec: Spec, k: int, ts: int, dimensions: I64, bucket: int, amount: int) -> None:
    """Add `amount` to KPI k's cells of the windows that hold `ts`: the total and each dimension's value (string ids in `dimensions`)."""
    for w in range(len(spec.sizes)):
        if (spec.kpis[k, 2] >> w) & 1 == 0:
            continue
        starts = spec.bounds[spec.firsts[w] : spec.firsts[w + 1]]
        begin = window_start(spec.sizes[w], starts, window_index(spec.sizes[w], starts, ts))
        for d in range(spec.kpis[k, 3] + 1):
            value = dimensions[spec.dimensions[k, d - 1]] if d else np.int64(0)
            cells_add(cells, (spec.kpis[k, 0] << 32) | ((bucket + 1) << 16) | (d << 8) | w, begin, value << 32, amount)
