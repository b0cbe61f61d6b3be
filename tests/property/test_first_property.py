"""Random first and repeat KPIs over random events in random arrival order, cut into random batches: the table equals the plain oracle."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.definitions import Definitions, Kpi, Match, Window
from pipeline.plan import compile_plan
from pipeline.tables.first import FirstTable
from tests.oracle.cohort_case import ZONES, Event, Run, clock_change, play
from tests.oracle.plain_first import FirstEvent, plain_first

EXAMPLES = 300
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
NAMES = ("page_view", "sign_up", "purchase")
WINDOWS: tuple[Window, ...] = ("1m", "1h", "1d", "1w", "1mo")
MATCHES = (None, Match(("*",)), Match(("sign_up",)), Match(("page_view", "purchase")))


def _kpi(r: random.Random, i: int, grid: int) -> Kpi:
    match = r.choice(MATCHES)
    dimensions = tuple(r.sample(("device", "country"), r.randint(0, 2)))
    windows = tuple(r.sample(WINDOWS, r.randint(1, 3)))
    if r.random() < 0.5:
        return Kpi(f"k{i}", "first", "users", match, dimensions=dimensions, windows=windows)
    return Kpi(f"k{i}", "repeat", "users", match, within_ms=grid * r.choice((0, 1, 3, 10)), dimensions=dimensions, windows=windows)


def _plain(kpi: Kpi, events: list[Event], zone: str) -> dict[Any, int]:
    names = kpi.match.events if kpi.match else ("*",)
    seen = [FirstEvent(e.user, e.ts, e.event_id, e.fields) for e in events if e.is_one_of(names)]
    found = plain_first(seen, kpi.windows, kpi.dimensions, zone, kpi.within_ms if kpi.source == "repeat" else None)
    return {(kpi.name, *key): value for key, value in found.items()}


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**64))
def test_table_equals_oracle_however_events_arrive(seed: int) -> None:
    r = random.Random(seed)
    zone = r.choice(ZONES)
    grid, span = r.choice((MINUTE // 2, HOUR // 2, 6 * HOUR, 5 * DAY)), r.choice((3, 12, 40))
    kpis = tuple(_kpi(r, i, grid) for i in range(r.randint(1, 4)))
    lateness = grid * r.choice((0, 1, 3, span))
    plan = compile_plan(Definitions(kpis=kpis, time_zone=zone, lateness_ms=lateness))
    start = clock_change(r, zone) - grid * (span // 2)
    users = r.choice((1, 4, 10))
    events = [
        Event(
            r.randrange(users), start + grid * r.randrange(span) - r.choice((0, 0, 1)), r.choice(NAMES), r.getrandbits(64),
            {"device": r.choice(("", "web", "app")), "country": r.choice(("", "CN", "DE"))},
        )
        for _ in range(r.randint(1, 60))
    ]  # fmt: skip
    run = Run(FirstTable, plan)
    play(r, run, events, lateness)
    found = {
        (row["kpi"], row["window"], row["window_start"], row["dimension"], row["dimension_value"]): row["value"]
        for row in run.rows("kpi_cells")
    }
    expected: dict[Any, int] = {}
    for kpi in kpis:
        expected |= _plain(kpi, events, zone)
    assert found == expected
