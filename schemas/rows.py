"""Rows of the warehouse's base tables: what `pipeline.tables` gives and `pipeline.sinks` inserts.

Every row is an absolute value of one (keys…, partition) as of a flush number, `version`. The newest version wins, whatever order rows arrive in;
reports add the partitions up. Column order here is the order of the ClickHouse tables (`schemas/migrations`).
"""

from __future__ import annotations

from typing import Any

FUNNEL_CELLS = ("funnel", "definition", "window_start", "segment", "level", "bucket", "partition", "value", "final_at", "version")
"""value: users whose best attempt in the window has deepest level `level` (1-based) and took a time in histogram `bucket` from its first step to it.
window_start: ms UTC; final_at: the watermark (ms) from which the value can't change any more."""

RETENTION_CELLS = ("retention", "definition", "cohort_start", "segment", "period", "measure", "partition", "value", "final_at", "version")
"""measure: 'users' active in `period` (0: cohort size) | 'last' users whose last active period it is | 'value' sum in 1/10,000."""

KPI_CELLS = (
    "kpi",
    "definition",
    "window",
    "window_start",
    "dimension",
    "dimension_value",
    "currency",
    "bucket",
    "partition",
    "value",
    "final_at",
    "version",
)
"""value: a count, or a sum in 1/10,000 of `currency` ('' for what is not money); bucket: histogram bucket of a duration, -1 for what is no histogram."""

REJECTS = ("topic", "partition", "offset", "reason", "cause", "key", "raw", "record_ts", "version")
PROGRESS = (
    "topic",
    "partition",
    "next_offset",
    "watermark",
    "applied",
    "duplicates",
    "rejected",
    "too_late",
    "rekeyed",
    "version",
    "revision",
)
"""One row a source topic partition and revision: everything before next_offset is in the other tables' rows. watermark in ms, 0 before the first event;
counts are totals."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "funnel_cells": FUNNEL_CELLS,
    "retention_cells": RETENTION_CELLS,
    "kpi_cells": KPI_CELLS,
    "rejects": REJECTS,
    "progress": PROGRESS,
}

Rows = dict[str, dict[str, Any]]
"""Base table name → column name → a list or numpy array; all columns of a table have the same length."""
