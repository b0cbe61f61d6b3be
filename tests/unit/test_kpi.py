"""Event KPIs, fact by fact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.definitions import Definitions, Kpi, Match, Window
from pipeline.plan import compile_plan
from pipeline.tables.kpi import EventKpiTable
from pipeline.tables.table import Batch
from tests.oracle.cohort_case import columns_of
from tests.oracle.kpi_case import KpiRun, ShopEvent

NOON = 1_790_000_000_000 // 86_400_000 * 86_400_000 + 43_200_000
DAY_WINDOW: tuple[Window, ...] = ("1d",)
BUYERS = Kpi("buyers", "events", "users", Match(("purchase",)), windows=DAY_WINDOW)
GMV = Kpi("gmv", "events", "sum", Match(("purchase",)), "value", dimensions=("channel",), windows=DAY_WINDOW, money=True)


def _run(*kpis: Kpi) -> KpiRun:
    return KpiRun(EventKpiTable, compile_plan(Definitions(kpis=kpis, lateness_ms=1000)))


def _purchase(user: int, ts: int = NOON, value: int = 0, currency: str = "EUR", channel: str = "") -> ShopEvent:
    return ShopEvent(user, ts, "purchase", 1, {"channel": channel}, {"value": value}, currency=currency)


def test_money_is_summed_a_currency_at_a_time() -> None:
    run = _run(GMV)
    run.apply([_purchase(1, value=5, currency="EUR"), _purchase(1, value=7, currency="CNY"), _purchase(1, value=1, currency="EUR")])
    assert {(key[3], key[4], key[5]): value for key, value in run.found().items()} == {
        ("", "", "EUR"): 6, ("channel", "", "EUR"): 6, ("", "", "CNY"): 7, ("channel", "", "CNY"): 7,
    }  # fmt: skip


def test_sum_of_large_amounts_is_exact() -> None:
    run = _run(GMV)
    run.apply([_purchase(1, value=10**17 + 1), _purchase(2, value=10**17 + 1)])
    assert set(run.found().values()) == {2 * 10**17 + 2}


def test_user_counts_once_a_window_and_again_in_the_next() -> None:
    run = _run(BUYERS)
    run.apply([_purchase(1), _purchase(1, NOON + 1), _purchase(2)])
    run.apply([_purchase(1, NOON + 86_400_000)])
    assert sorted(run.found().values()) == [1, 2]


def test_set_of_a_window_is_dropped_when_no_event_of_it_can_come() -> None:
    run = _run(BUYERS)
    run.apply([_purchase(user) for user in range(200)])
    run.table.expire(NOON + 43_199_999)
    assert len(run.table.slices.arrays.number) == 1  # type: ignore[attr-defined]
    run.table.expire(NOON + 43_200_000)
    assert len(run.table.slices.arrays.number) == 0  # type: ignore[attr-defined]


def test_cell_is_final_when_its_window_and_the_lateness_are_over() -> None:
    run = _run(BUYERS)
    run.apply([_purchase(1)])
    assert run.rows("kpi_cells")[0]["final_at"] == NOON + 43_200_000 + 1000


def test_too_many_values_of_a_dimension_end_loudly() -> None:
    run = _run(GMV)
    columns = columns_of(run.plan, [_purchase(1)], run.strings)
    columns = replace(columns, fields=np.full_like(columns.fields, 1 << 24))
    with pytest.raises(OverflowError, match="more partitions"):
        run.table.apply(Batch.of(columns, np.zeros(1, np.int32), 1), run.cells)


def test_days_of_all_users_take_a_bit_each() -> None:
    run = _run(Kpi("active", "events", "users", None, windows=DAY_WINDOW))
    run.apply([_purchase(user) for user in np.arange(64 * 100).tolist()])
    assert list(run.found().values()) == [6400]
    assert len(run.table.slices) == 100  # type: ignore[attr-defined]
