"""`pipeline.windows` for one timestamp, compiled: size and starts are those of `windows.boundaries`. Called by the tables' kernels."""

from __future__ import annotations

import numpy as np

from pipeline.columns import I64
from pipeline.tables.kernel import jit


@jit
def window_index(size: int, starts: I64, ts: int) -> int:
    """A window's number: consecutive windows have consecutive numbers."""
    if size > 0:
        return ts // size
    return np.searchsorted(starts, ts, side="right") - 1


@jit
def window_start(size: int, starts: I64, index: int) -> int:
    """Start of window number `index`, ms; its end is the start of `index + 1`."""
    return index * size if size > 0 else starts[index]
