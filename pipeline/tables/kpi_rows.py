"""The cell layout that all KPI tables share, and its way into rows.

k0 = metric << 32 | (bucket + 1) << 16 | dimension number << 8 | window number; k1 = window start ms; k2 = dimension value << 32 | currency.
Dimension number 0 is the total, d is kpi.dimensions[d - 1].
"""

from __future__ import annotations

import numpy as np

from pipeline.columns import I64, Strings
from pipeline.definitions import Definitions, Kpi, Window
from pipeline.windows import window_indices, window_starts
from schemas.rows import Rows

WINDOWS: tuple[Window, ...] = ("1m", "1h", "1d", "1w", "1mo")
"""A window's number in a key is its place here."""


def window_ends(keys: I64, definitions: Definitions) -> I64:
    """End (ms) of the window of every KPI cell key [m, 3]."""
    ends = np.empty(len(keys), np.int64)
    numbers = keys[:, 0] & 0xFF
    for number, window in enumerate(WINDOWS):
        chosen = numbers == number
        if chosen.any():
            indices = window_indices(window, definitions.time_zone, keys[chosen, 1])
            ends[chosen] = window_starts(window, definitions.time_zone, indices + 1)
    return ends


def kpi_rows(kpis: list[Kpi], metric: int, keys: I64, values: I64, versions: I64, final_at: I64, strings: Strings, partition: int) -> Rows:
    """KPI cells as rows of schemas.rows.KPI_CELLS."""
    chosen = [kpis[m] for m in ((keys[:, 0] >> 32) - metric).tolist()]
    dimensions = ((keys[:, 0] >> 8) & 0xFF).tolist()
    value_ids, currency_ids = (keys[:, 2] >> 32).tolist(), (keys[:, 2] & 0xFFFFFFFF).tolist()
    return {
        "kpi_cells": {
            "kpi": [kpi.name for kpi in chosen],
            "definition": [kpi.version for kpi in chosen],
            "window": [WINDOWS[w] for w in (keys[:, 0] & 0xFF).tolist()],
            "window_start": keys[:, 1],
            "dimension": [kpi.dimensions[d - 1] if d else "" for kpi, d in zip(chosen, dimensions, strict=True)],
            "dimension_value": [strings[i] for i in value_ids],
            "currency": [strings[i] for i in currency_ids],
            "bucket": ((keys[:, 0] >> 16) & 0xFFFF) - 1,
            "partition": np.full(len(keys), partition, np.int64),
            "value": values,
            "final_at": final_at,
            "version": versions,
        }
    }
