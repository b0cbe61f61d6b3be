"""Random session KPIs over random events in random arrival order, cut into random batches: the table equals the plain oracle."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.definitions import Definitions, Kpi, Match, Window
from pipeline.plan import compile_plan
from pipeline.tables.sessions import UNDECIDED, SessionTable
from tests.oracle.cohort_case import ZONES, clock_change, play
from tests.oracle.kpi_case import KpiRun, ShopEvent
from tests.oracle.plain_sessions import plain_session_kpi, plain_sessions

EXAMPLES = 300
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
NAMES = ("page_view", "sign_up", "purchase")
WINDOWS: tuple[Window, ...] = ("1m", "1h", "1d", "1w", "1mo")


def _kpi(r: random.Random, i: int) -> Kpi:
    aggregate = r.choice(("count", "bounces", "pages", "dwell", "dwell_quantile"))
    dimensions = tuple(r.sample(("device", "country", "channel"), r.randint(0, 3)))
    return Kpi(f"k{i}", "sessions", aggregate, quantile=0.5, dimensions=dimensions, windows=tuple(r.sample(WINDOWS, r.randint(1, 3))))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**64))
def test_table_equals_oracle_however_events_arrive(seed: int) -> None:
    r = random.Random(seed)
    zone = r.choice(ZONES)
    grid, span = r.choice((7, MINUTE // 2, HOUR // 2, 6 * HOUR)), r.choice((3, 12, 40, 300))
    gap = grid * r.choice((0, 1, 2, 5)) + r.choice((0, 1))
    kpis = tuple(_kpi(r, i) for i in range(r.randint(1, 5)))
    pages = r.choice((("page_view",), ("*",), ("page_view", "purchase")))
    lateness = grid * r.choice((0, 1, 3, span))
    start = clock_change(r, zone) - grid * (span // 2)
    users = r.choice((1, 4, 10))
    events: list[Any] = [
        ShopEvent(
            r.randrange(users), start + grid * r.randrange(span) - r.choice((0, 0, 1)), r.choice(NAMES), r.getrandbits(64),
            {"device": r.choice(("", "web", "app")), "country": r.choice(("", "CN", "DE")), "channel": r.choice("abc")},
        )
        for _ in range(r.choice((1, 20, 150)))
    ]  # fmt: skip
    plan = compile_plan(Definitions(kpis=kpis, time_zone=zone, lateness_ms=lateness, session_gap_ms=gap, page=Match(pages)))
    run = KpiRun(SessionTable, plan)
    play(r, run, events, lateness)
    sessions = plain_sessions(events, gap)
    expected: dict[Any, int] = {}
    for kpi in kpis:
        expected |= plain_session_kpi(sessions, kpi, pages, zone)
    assert run.found() == expected

    horizon = r.choice((max(e.ts for e in events) + r.choice((0, gap, gap + 1)), 0))
    run.table.expire(horizon)
    keys = run.cells.arrays.keys[: len(run.cells)]
    starts = [(s[0].ts, s[-1].ts) for s in sessions if s[-1].ts + gap >= run.table.horizon]  # type: ignore[attr-defined]
    ends = run.table._bounds(keys)[0]  # type: ignore[attr-defined]
    undecided = [any(key[1] <= first < end for first, _ in starts) for key, end in zip(keys.tolist(), ends.tolist(), strict=True)]
    assert (run.table.final_at(keys) == UNDECIDED).tolist() == undecided
