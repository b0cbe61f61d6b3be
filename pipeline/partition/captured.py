"""What a flush has for the warehouse, as of the instant it was taken: it stays what it was while the partition goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.columns import I64
from pipeline.partition.letters import RejectRow
from pipeline.tables.board import Board
from schemas.rows import PROGRESS, REJECTS, Rows

HELD_BACK = 1
"""Watermark (ms) in `progress` of a partition with events, one of whose topics has shown none yet: nothing in the reports is final."""


@dataclass(frozen=True, slots=True)
class Captured:
    """Cells [n], rejects and progress that changed after the flush which the sink had confirmed then."""

    n: int  # number of the flush
    keys: I64
    values: I64
    versions: I64
    rejects: list[RejectRow]
    progress: list[tuple[Any, ...]]

    def rows(self, board: Board, partition: int, sunk: int, since_ms: int) -> Rows:
        """Of what changed after flush `sunk`, which the sink has confirmed; without windows that start before `since_ms`."""
        new = self.versions > sunk
        rows = board.rows(self.keys[new], self.values[new], self.versions[new], partition)
        if since_ms:
            rows = {name: _since(columns, since_ms) for name, columns in rows.items()}
        rejects = [row for row in self.rejects if row.version > sunk]
        if rejects:
            rows["rejects"] = dict(zip(REJECTS, map(list, zip(*rejects, strict=True)), strict=True))
        if self.progress:
            rows["progress"] = dict(zip(PROGRESS, map(list, zip(*self.progress, strict=True)), strict=True))
        return rows


def _since(columns: dict[str, Any], since_ms: int) -> dict[str, Any]:
    """The rows whose window starts then or later."""
    starts = np.asarray(columns["cohort_start" if "cohort_start" in columns else "window_start"])
    kept = np.flatnonzero(starts >= since_ms)
    return {name: column[kept] if isinstance(column, np.ndarray) else [column[i] for i in kept] for name, column in columns.items()}
