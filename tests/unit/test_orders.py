"""Orders, fact by fact."""

from __future__ import annotations

from pipeline.definitions import Definitions, Kpi, Window
from pipeline.plan import compile_plan
from pipeline.tables.orders import DECIDES, ORDER_HORIZON_MS, OrderTable
from tests.oracle.kpi_case import KpiRun, ShopEvent

DAY = 86_400_000
START = 1_790_000_000_000 // DAY * DAY
DAY_WINDOW: tuple[Window, ...] = ("1d",)


def _run() -> KpiRun:
    kpis = tuple(Kpi(name, "orders", name, dimensions=("channel",) if name == "paid" else (), windows=DAY_WINDOW) for name in DECIDES)
    return KpiRun(OrderTable, compile_plan(Definitions(kpis=kpis, lateness_ms=5)))


def _event(name: str, ts: int = 0, order: int = 9, event_id: int = 1, channel: str = "") -> ShopEvent:
    return ShopEvent(1, START + ts, name, event_id, {"channel": channel}, order=order)


def _totals(run: KpiRun) -> dict[tuple[str, int], int]:
    return {(key[0], (key[2] - START) // DAY): value for key, value in run.found().items() if key[3] == ""}


def test_payment_counts_by_the_day_of_creation_and_by_its_own() -> None:
    run = _run()
    run.apply([_event("order_created"), _event("purchase", DAY)])
    assert _totals(run) == {("created", 0): 1, ("paid_of_created", 0): 1, ("paid", 1): 1}


def test_refund_counts_by_the_day_of_payment_once() -> None:
    run = _run()
    run.apply([_event("purchase"), _event("refund", DAY), _event("refund", 2 * DAY)])
    assert _totals(run) == {("paid", 0): 1, ("refunded_of_paid", 0): 1}


def test_late_payment_moves_the_order_to_its_day_and_channel() -> None:
    run = _run()
    run.apply([_event("purchase", DAY, channel="ads")])
    run.apply([_event("purchase", DAY - 1, channel="mail")])
    assert {(key[2], key[4]) for key in run.found() if key[3]} == {(START, "mail")}


def test_event_without_order_id_is_no_order() -> None:
    run = _run()
    run.apply([_event("purchase", order=0), _event("purchase", order=0)])
    assert run.found() == {}


def test_order_is_followed_for_180_days_after_its_first_event() -> None:
    run = _run()
    run.apply([_event("order_created"), _event("purchase", ORDER_HORIZON_MS)])
    assert _totals(run)["paid_of_created", 0] == 1


def test_later_event_of_the_same_id_begins_a_new_order() -> None:
    run = _run()
    run.apply([_event("order_created"), _event("purchase", ORDER_HORIZON_MS + 1)])
    assert _totals(run) == {("created", 0): 1, ("paid", 180): 1}


def test_old_orders_are_forgotten_and_their_counts_stay() -> None:
    run = _run()
    run.apply([_event("order_created")])
    run.table.expire(START + ORDER_HORIZON_MS)
    assert int(run.table.state.used[0]) == 1  # type: ignore[attr-defined]
    run.table.expire(START + ORDER_HORIZON_MS + DAY)
    assert int(run.table.state.used[0]) == 0  # type: ignore[attr-defined]
    run.apply([_event("purchase", ORDER_HORIZON_MS + DAY)])
    assert _totals(run) == {("created", 0): 1, ("paid", 181): 1}


def test_what_waits_for_a_later_event_is_final_180_days_later() -> None:
    run = _run()
    run.apply([_event("order_created"), _event("purchase")])
    final = {row["kpi"]: row["final_at"] - START for row in run.rows("kpi_cells")}
    assert final == {"created": DAY + 5, "paid": DAY + 5, "paid_of_created": DAY + 5 + ORDER_HORIZON_MS}
