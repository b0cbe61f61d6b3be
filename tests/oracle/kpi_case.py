"""Columns with orders and currencies, and KPI cells as the oracles name them, for the tests of `pipeline.tables.kpi`, `sessions` and `orders`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.tables.table import Batch
from tests.oracle.cohort_case import Event, Run, columns_of

Key = tuple[str, str, int, str, str, str, int]
"""KPI, window, window start, dimension, its value, currency, histogram bucket or -1."""


@dataclass(frozen=True)
class ShopEvent(Event):
    order: int = 0
    currency: str = "EUR"


class KpiRun(Run):
    def apply(self, events: Sequence[ShopEvent]) -> None:  # type: ignore[override]
        columns = replace(
            columns_of(self.plan, events, self.strings),
            order=np.array([e.order for e in events], np.uint64),
            currency=np.array([self.strings.intern(e.currency) for e in events], np.int32),
        )
        user = self.users.resolve(columns.user)
        self.table.apply(Batch.of(columns, user, len(self.users)), self.cells)

    def found(self) -> dict[Key, int]:
        """Cells that are not 0."""
        names = ("kpi", "window", "window_start", "dimension", "dimension_value", "currency", "bucket")
        rows = self.rows("kpi_cells")
        found = {tuple(row[name] for name in names): row["value"] for row in rows}
        assert len(found) == len(rows)
        return found  # type: ignore[return-value]
