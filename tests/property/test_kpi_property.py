"""Random event KPIs over random events in random arrival order, cut into random batches: the table equals the plain oracle."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.definitions import Definitions, Kpi, Match, Window
from pipeline.plan import compile_plan
from pipeline.tables.kpi import EventKpiTable
from tests.oracle.cohort_case import ZONES, clock_change, play
from tests.oracle.kpi_case import KpiRun, ShopEvent
from tests.oracle.plain_kpi import plain_kpi

EXAMPLES = 300
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
NAMES = ("page_view", "sign_up", "purchase")
WINDOWS: tuple[Window, ...] = ("1m", "1h", "1d", "1w", "1mo")
MATCHES = (None, Match(("*",)), Match(("sign_up",)), Match(("page_view", "purchase")))


def _kpi(r: random.Random, i: int) -> Kpi:
    aggregate = r.choice(("count", "sum", "users", "users"))
    field = r.choice(("value", "tax")) if aggregate == "sum" else None
    dimensions = tuple(r.sample(("device", "country"), r.randint(0, 2)))
    windows = tuple(r.sample(WINDOWS, r.randint(1, 3)))
    return Kpi(f"k{i}", "events", aggregate, r.choice(MATCHES), field, dimensions=dimensions, windows=windows, money=field == "value")


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**64))
def test_table_equals_oracle_however_events_arrive(seed: int) -> None:
    r = random.Random(seed)
    zone = r.choice(ZONES)
    grid, span = r.choice((MINUTE // 2, HOUR // 2, 6 * HOUR, 5 * DAY)), r.choice((3, 12, 40))
    kpis = tuple(_kpi(r, i) for i in range(r.randint(1, 5)))
    lateness = grid * r.choice((0, 1, 3, span))
    start = clock_change(r, zone) - grid * (span // 2)
    users = r.choice((1, 4, 200))
    events: list[Any] = [
        ShopEvent(
            r.randrange(users), start + grid * r.randrange(span) - r.choice((0, 0, 1)), r.choice(NAMES), r.getrandbits(64),
            {"device": r.choice(("", "web", "app")), "country": r.choice(("", "CN", "DE"))},
            {"value": r.choice((0, 1, -10_000, 10**14)), "tax": r.randint(0, 9)}, currency=r.choice(("EUR", "CNY")),
        )
        for _ in range(r.choice((1, 30, 300)))
    ]  # fmt: skip
    run = KpiRun(EventKpiTable, compile_plan(Definitions(kpis=kpis, time_zone=zone, lateness_ms=lateness)))
    play(r, run, events, lateness)
    expected: dict[Any, int] = {}
    for kpi in kpis:
        expected |= plain_kpi(events, kpi, zone)
    assert run.found() == expected
