"""Random order KPIs over random orders in random arrival order, cut into random batches: the table equals the plain oracle."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.definitions import Definitions, Kpi, Window
from pipeline.plan import compile_plan
from pipeline.tables.orders import DECIDES, OrderTable
from tests.oracle.cohort_case import ZONES, clock_change, play
from tests.oracle.kpi_case import KpiRun, ShopEvent
from tests.oracle.plain_orders import plain_orders

EXAMPLES = 300
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
NAMES = ("order_created", "purchase", "order_cancelled", "refund", "order_shipped")
WINDOWS: tuple[Window, ...] = ("1m", "1h", "1d", "1w", "1mo")


def _kpi(r: random.Random, i: int) -> Kpi:
    dimensions = tuple(r.sample(("device", "country"), r.randint(0, 2)))
    return Kpi(f"k{i}", "orders", r.choice(list(DECIDES)), dimensions=dimensions, windows=tuple(r.sample(WINDOWS, r.randint(1, 3))))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**64))
def test_table_equals_oracle_however_events_arrive(seed: int) -> None:
    r = random.Random(seed)
    zone = r.choice(ZONES)
    grid, span = r.choice((MINUTE // 2, HOUR // 2, 6 * HOUR, 4 * DAY)), r.choice((3, 12, 40))
    kpis = tuple(_kpi(r, i) for i in range(r.randint(1, 5)))
    lateness = grid * r.choice((0, 1, 3, span))
    start = clock_change(r, zone) - grid * (span // 2)
    orders = [r.getrandbits(64) | 1 for _ in range(r.choice((1, 10, 60)))]
    events: list[Any] = [
        ShopEvent(
            r.randrange(9), start + grid * r.randrange(span) - r.choice((0, 0, 1)), r.choice(NAMES), r.getrandbits(64),
            {"device": r.choice(("", "web", "app")), "country": r.choice(("", "CN", "DE"))}, order=r.choice((0, *orders, *orders)),
        )
        for _ in range(r.choice((1, 30, 150)))
    ]  # fmt: skip
    run = KpiRun(OrderTable, compile_plan(Definitions(kpis=kpis, time_zone=zone, lateness_ms=lateness)))
    play(r, run, events, lateness)
    expected: dict[Any, int] = {}
    for kpi in kpis:
        expected |= plain_orders(events, kpi, zone)
    assert run.found() == expected
