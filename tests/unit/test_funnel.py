"""Facts about funnels that a reader of a report relies on, and agreement with ClickHouse's own windowFunnel."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pipeline.definitions import Definitions, Exclusion, Funnel, Match, Step
from pipeline.plan import compile_plan
from pipeline.tables.kernel import HISTOGRAM_UPPER
from tests.oracle.funnel_case import Event, Run

VIEW, CART, BUY = Match(("view_item",)), Match(("add_to_cart",)), Match(("purchase",))
STEPS = (Step("view", VIEW), Step("cart", CART), Step("buy", BUY))
DAY = 86_400_000
T0 = 1_764_000_000_000 - 1_764_000_000_000 % DAY
HOUR = 3_600_000


def _run(*funnels: Funnel, zone: str = "UTC", lateness: int = DAY) -> Run:
    return Run.of(compile_plan(Definitions(funnels=funnels, time_zone=zone, lateness_ms=lateness)))


def _event(ts: int, name: str, event_id: int = 0, user: int = 1, **fields: str) -> Event:
    return Event(user, T0 + ts, name, event_id or ts + 1, tuple(fields.items()), 1 if name == "purchase" else 0)


def _levels(run: Run) -> dict[int, int]:
    out: dict[int, int] = {}
    for (_, level, *_), users in run.counted().items():
        out[level] = out.get(level, 0) + users
    return out


def test_deepest_attempt_counts_not_the_first() -> None:
    run = _run(Funnel("f", STEPS, HOUR, "1d"))
    run.apply([_event(0, "view_item"), _event(5 * HOUR, "view_item"), _event(5 * HOUR + 9, "add_to_cart")])
    assert _levels(run) == {2: 1}


def test_conversion_window_includes_its_edge() -> None:
    run = _run(Funnel("f", STEPS, HOUR, "1d"))
    run.apply([_event(0, "view_item"), _event(HOUR, "add_to_cart"), _event(HOUR + 1, "purchase")])
    assert _levels(run) == {2: 1}


def test_late_event_lifts_user_and_retracts_the_old_level() -> None:
    run = _run(Funnel("f", STEPS, HOUR, "1d"))
    run.apply([_event(0, "view_item"), _event(20, "purchase")])
    assert _levels(run) == {1: 1}
    run.apply([_event(10, "add_to_cart")])
    assert _levels(run) == {3: 1}


def test_late_exclusion_kills_a_finished_attempt() -> None:
    run = _run(Funnel("f", STEPS, HOUR, "1d", exclusions=(Exclusion(Match(("remove_from_cart",)), 2, 3),)))
    run.apply([_event(0, "view_item"), _event(10, "add_to_cart"), _event(20, "purchase")])
    run.apply([_event(15, "remove_from_cart")])
    assert _levels(run) == {2: 1}


def test_segment_of_equal_starts_is_that_of_the_smaller_event_hash() -> None:
    for ids in ((7, 2**63 + 1), (2**63 + 1, 7)):
        run = _run(Funnel("f", STEPS, HOUR, "1d", breakdown="device"))
        run.apply([_event(0, "view_item", ids[0], device="web"), _event(0, "view_item", ids[1], device="app")])
        assert [key[4] for key in run.counted()] == ["web" if ids[0] == 7 else "app"]


def test_inactive_user_keeps_no_block() -> None:
    run = _run(Funnel("f", STEPS, HOUR, "1d"))
    run.apply([_event(0, "view_item"), _event(10, "add_to_cart")])
    run.table.expire(T0 + 3 * DAY)
    assert (run.table.heads < 0).all()
    assert _levels(run) == {2: 1}


def test_result_of_an_ended_window_is_kept_while_later_events_of_it_are_not_folded() -> None:
    run = _run(Funnel("f", STEPS[:2], 10 * HOUR, "1h", hold_constant="item_id"), lateness=4 * DAY)
    run.apply([_event(0, "view_item", item_id="a"), _event(10, "add_to_cart", item_id="a")])
    run.table.expire(T0 + 30)
    run.apply([_event(HOUR // 2, "view_item", item_id="b")])  # folds what was before
    run.apply([_event(3 * HOUR + i, "view_item", item_id="c") for i in range(10)])
    run.table.expire(T0 + HOUR + HOUR // 2)
    run.apply([_event(3 * HOUR + 5, "view_item", 5, item_id="d")])  # one of twelve events is before the horizon: too few to fold
    run.apply([_event(3 * HOUR + 6, "add_to_cart", 6, item_id="b")])
    first_hour = {key: users for key, users in run.counted().items() if key[3] == T0}
    assert first_hour == {(0, 2, int(np.searchsorted(HISTOGRAM_UPPER, 10)), T0, ""): 1}


def test_cells_are_final_after_window_conversion_and_lateness() -> None:
    run = _run(Funnel("f", STEPS, HOUR, "1d", version="v1"), zone="Asia/Shanghai", lateness=2 * HOUR)
    run.apply([_event(17 * HOUR, "view_item")])
    n = len(run.cells)
    arrays = run.cells.arrays
    rows = run.table.rows(arrays.keys[:n], arrays.values[:n], arrays.versions[:n], run.strings, 5)["funnel_cells"]
    assert rows["window_start"].tolist() == [T0 + 16 * HOUR]
    assert rows["final_at"].tolist() == [T0 + 16 * HOUR + DAY + HOUR + 2 * HOUR]
    assert (rows["funnel"], rows["definition"], rows["segment"], rows["level"].tolist()) == (["f"], ["v1"], [""], [1])


def test_too_many_exclusions_are_refused() -> None:
    exclusions = tuple(Exclusion(Match((f"x{i}",)), 1, 2) for i in range(33))
    with pytest.raises(ValueError, match="33 exclusions"):
        _run(Funnel("f", STEPS, HOUR, "1d", exclusions=exclusions))


def test_ordered_funnel_equals_clickhouse_window_funnel() -> None:
    chdb = pytest.importorskip("chdb")
    r = random.Random(5)
    names = ("view_item", "add_to_cart", "purchase", "page_view")
    weights = (5, 3, 2, 1)
    events = [
        _event(r.randrange(0, 3 * DAY, 60_000), r.choices(names, weights)[0], r.getrandbits(60), r.randrange(150)) for _ in range(6000)
    ]
    conversion = 5 * HOUR
    run = _run(Funnel("f", STEPS, conversion, "1d"), lateness=4 * DAY)
    for at in range(0, len(events), 700):
        run.apply(events[at : at + 700])
    # One row a user and entry window; only step 1 is restricted to the window.
    data = ",".join(f"({e.user},{e.ts},'{e.name}')" for e in events)
    sql = f"""
        WITH e AS (SELECT * FROM values('user UInt32, ts UInt64, name String', {data})),
             w AS (SELECT DISTINCT user, intDiv(ts, {DAY}) AS day FROM e WHERE name = 'view_item')
        SELECT day * {DAY}, level, count() FROM (
            SELECT user, day, windowFunnel({conversion}, 'strict_once')(
                ts, name = 'view_item' AND intDiv(ts, {DAY}) = day, name = 'add_to_cart', name = 'purchase') AS level
            FROM e INNER JOIN w USING (user) GROUP BY user, day) GROUP BY 1, 2"""
    expected = {tuple(int(x) for x in line.split(",")) for line in str(chdb.query(sql, "CSV")).split()}
    found: dict[tuple[int, int], int] = {}
    for (_, level, _, window, _), users in run.counted().items():
        found[window, level] = found.get((window, level), 0) + users
    assert {(window, level, users) for (window, level), users in found.items()} == expected


def test_one_users_hundred_thousand_views_stay_cheap_and_exact() -> None:
    run = _run(Funnel("f", STEPS, HOUR, "1d"))
    n = 100_000
    for at in range(0, n, 20_000):
        run.apply([_event(i * 500, "view_item", i + 1) for i in range(at, at + 20_000)])
    run.apply([_event(n * 500, "purchase"), _event(n * 500 - 1, "add_to_cart")])
    key = (0, 3, int(np.searchsorted(HISTOGRAM_UPPER, 500)), T0, "")
    assert run.counted() == {key: 1}
