"""Random funnels over random events in random arrival order, cut into random batches: the table equals the brute-force oracle."""

from __future__ import annotations

import random
from datetime import datetime
from zoneinfo import ZoneInfo

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.definitions import Definitions, Exclusion, Funnel, Match, Order, Step, Window
from pipeline.plan import compile_plan
from schemas.events import TOPIC_OF_EVENT
from tests.oracle.funnel_case import Event, Run, plain_counted

EXAMPLES = 800
NAMES = ("view_item", "add_to_cart", "begin_checkout", "purchase", "custom")
ZONES = ("UTC", "Asia/Shanghai", "Europe/Berlin")
MIDNIGHTS = ((2026, 3, 29), (2026, 10, 25), (2026, 11, 1))
ORDERS: tuple[Order, ...] = ("ordered", "strict", "any")
GRIDS: dict[Window, int] = {"1m": 15_000, "1h": 900_000, "1d": 7_200_000}


def _match(r: random.Random) -> Match:
    if r.random() < 0.05:
        return Match(("*",))
    return Match(tuple(sorted(r.sample(NAMES, r.choice((1, 1, 1, 2, 3))))))


def _funnel(r: random.Random, i: int, window: Window, order: Order) -> Funnel:
    n = r.randint(2, 4)
    steps = tuple(Step(f"s{k}", _match(r), order != "any" and 0 < k < n - 1 and r.random() < 0.4) for k in range(n))
    exclusions = []
    for _ in range(r.choice((0, 0, 1, 2))):
        after = r.randint(1, n - 1)
        exclusions.append(Exclusion(_match(r), after, r.randint(after + 1, n)))
    hold = "item_id" if r.random() < 0.3 else None
    conversion = GRIDS[window] * r.choice((0, 1, 2, 4, 8, 20)) + r.choice((0, 0, 1))
    return Funnel(f"f{i}", steps, conversion, window, order, "device" if r.random() < 0.5 else None, hold, tuple(exclusions))


def _event(r: random.Random, i: int, users: int, start: int, grid: int, span: int) -> Event:
    name = r.choice(NAMES)
    fields = (("device", r.choice(("", "web", "app"))), ("item_id", r.choice(("", "a", "b", "b"))))
    topic = r.randint(0, 1) if name == "custom" else TOPIC_OF_EVENT[name]
    return Event(r.randrange(users), start + grid * r.randrange(span), name, r.getrandbits(62) << 2 | i & 3, fields, topic)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**64))
def test_table_equals_oracle_however_events_arrive(seed: int) -> None:
    r = random.Random(seed)
    zone = r.choice(ZONES)
    window: Window = r.choice(tuple(GRIDS))
    grid, span = GRIDS[window], r.choice((3, 12, 40))
    lateness = grid * r.choice((0, 1, 3, 10, 50))
    funnels = tuple(_funnel(r, i, window, order) for i, order in enumerate(ORDERS))
    plan = compile_plan(Definitions(funnels=funnels, time_zone=zone, lateness_ms=lateness))
    midnight = int(datetime(*r.choice(MIDNIGHTS), tzinfo=ZoneInfo(zone)).timestamp()) * 1000
    start = midnight - grid * (span // 2)
    events = [_event(r, i, 3, start, grid, span) for i in range(r.randint(1, 70))]
    if r.random() < 0.3:
        r.shuffle(events)
    else:
        events.sort(key=lambda e: e.ts + r.randint(0, max(lateness, 1)))
    run = Run.of(plan)
    at = 0
    while at < len(events):
        cut = at + r.choice((1, 1, 3, 10, 40))
        run.apply(events[at:cut])
        at = cut
        if r.random() < 0.5:
            run.table.expire(min((e.ts for e in events[at:]), default=start + 100 * grid) - r.choice((0, 0, grid, 5 * grid)))
        if r.random() < 0.15:
            run.reload()
    assert run.counted() == plain_counted(funnels, events, zone)
