"""Random retentions over random events in random arrival order, cut into random batches: the table equals the plain oracle."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.definitions import Definitions, Match, Period, Retention
from pipeline.plan import compile_plan
from pipeline.tables.retention import RetentionTable
from tests.oracle.cohort_case import ZONES, Event, Run, clock_change, play
from tests.oracle.plain_retention import RetentionEvent, plain_retention

EXAMPLES = 500
LONG_EXAMPLES = 150
HOUR, DAY = 3_600_000, 86_400_000
NAMES = ("page_view", "sign_up", "purchase")
PERIODS: tuple[Period, ...] = ("day", "week", "month")
LENGTH: dict[Period, int] = {"day": DAY, "week": 7 * DAY, "month": 30 * DAY}


def _match(r: random.Random) -> Match:
    return Match(("*",)) if r.random() < 0.1 else Match(tuple(sorted(r.sample(NAMES, r.choice((1, 1, 2))))))


def _retention(r: random.Random, i: int, period: Period) -> Retention:
    breakdown = "device" if r.random() < 0.5 else None
    value = "value" if r.random() < 0.6 else None
    return Retention(f"r{i}", _match(r), _match(r), period, r.choice((1, 2, 4, 30, 70)), breakdown, value)


def _event(r: random.Random, users: int, weights: tuple[int, int, int], start: int, grid: int, span: int) -> Event:
    ts = start + grid * r.randrange(span) - r.choice((0, 0, 1))
    numbers = {"value": r.randint(-50, 200)} if r.random() < 0.7 else {}
    return Event(r.randrange(users), ts, r.choices(NAMES, weights)[0], r.getrandbits(64), {"device": r.choice(("", "web", "app"))}, numbers)


def _plain(retention: Retention, events: list[Event], zone: str) -> dict[Any, int]:
    seen = [
        RetentionEvent(
            e.user, e.ts, e.event_id, e.is_one_of(retention.cohort.events), e.is_one_of(retention.returning.events),
            e.fields["device"] if retention.breakdown else "", e.numbers.get("value", 0),
        )
        for e in events
    ]  # fmt: skip
    found = plain_retention(seen, retention.period, retention.periods, zone, retention.value is not None)
    return {(retention.name, *key): value for key, value in found.items()}


def _check(r: random.Random, zone: str, lateness: int, retentions: tuple[Retention, ...], events: list[Event]) -> None:
    plan = compile_plan(Definitions(retentions=retentions, time_zone=zone, lateness_ms=min(lateness, 40 * DAY)))
    run = Run(RetentionTable, plan)
    play(r, run, events, lateness)
    found = {
        (row["retention"], row["measure"], row["period"], row["cohort_start"], row["segment"]): row["value"]
        for row in run.rows("retention_cells")
    }
    expected: dict[Any, int] = {}
    for retention in retentions:
        expected |= _plain(retention, events, zone)
    assert found == expected


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**64))
def test_table_equals_oracle_however_events_arrive(seed: int) -> None:
    r = random.Random(seed)
    zone = r.choice(ZONES)
    periods = [r.choice(PERIODS), r.choice(PERIODS)]
    retentions = tuple(_retention(r, i, period) for i, period in enumerate(periods))
    length = LENGTH[periods[0]]
    grid = r.choice((HOUR, length // 4, length, 3 * length))
    span = r.choice((3, 12, 40))
    start = clock_change(r, zone) - grid * (span // 2)
    users = r.choice((1, 3, 6))
    events = [_event(r, users, (1, 1, 1), start, grid, span) for _ in range(r.choice((2, 10, 40, 80)))]
    _check(r, zone, r.choice((0, grid, 3 * grid, span * grid)), retentions, events)


@settings(max_examples=LONG_EXAMPLES, deadline=None)
@given(st.integers(0, 2**64))
def test_table_equals_oracle_over_histories_longer_than_a_row(seed: int) -> None:
    r = random.Random(seed)
    returning = Match(("page_view",))
    cohorts = (Match(("sign_up",)), Match(("purchase",)))  # rare, so that they come after much activity
    retentions = tuple(Retention(f"r{i}", m, returning, "day", r.choice((3, 30, 60)), None, "value") for i, m in enumerate(cohorts))
    events = [_event(r, 2, (60, 1, 2), 20_000 * DAY, DAY, 300) for _ in range(300)]
    _check(r, "UTC", r.choice((0, 3, 20, 90, 150)) * DAY, retentions, events)
