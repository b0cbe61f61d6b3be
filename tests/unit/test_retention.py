"""Facts about retention that a reader of a cohort report relies on, and agreement with plain SQL in ClickHouse."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from pipeline.definitions import Definitions, Match, Retention
from pipeline.plan import compile_plan
from pipeline.tables.retention import RetentionTable, first_words
from tests.oracle.cohort_case import Event, Run

SIGN_UP, VIEW, BUY = Match(("sign_up",)), Match(("page_view",)), Match(("purchase",))
HOUR, DAY = 3_600_000, 86_400_000
T0 = 20_000 * DAY  # 2024-10-04, a Friday


def _run(*retentions: Retention, zone: str = "UTC", lateness: int = DAY) -> Run:
    return Run(RetentionTable, compile_plan(Definitions(retentions=retentions, time_zone=zone, lateness_ms=lateness)))


def _event(day: float, name: str, user: int = 1, event_id: int = 0, value: int = 0, **fields: str) -> Event:
    ts = T0 + int(day * DAY)
    return Event(user, ts, name, event_id or ts, fields, {"value": value})


def _cells(run: Run, measure: str) -> dict[tuple[int, int, str], int]:
    """(cohort's day after T0, n, segment) → value."""
    rows = [row for row in run.rows("retention_cells") if row["measure"] == measure]
    return {((row["cohort_start"] - T0) // DAY, row["period"], row["segment"]): row["value"] for row in rows}


def test_late_event_moves_user_to_earlier_cohort() -> None:
    run = _run(Retention("r", SIGN_UP, VIEW, "day", 3))
    run.apply([_event(2, "page_view"), _event(4, "sign_up"), _event(5, "page_view"), _event(6, "page_view")])
    assert _cells(run, "users") == {(4, 0, ""): 1, (4, 1, ""): 1, (4, 2, ""): 1}
    assert _cells(run, "last") == {(4, 2, ""): 1}
    run.apply([_event(1, "sign_up")])
    assert _cells(run, "users") == {(1, 0, ""): 1, (1, 1, ""): 1}
    assert _cells(run, "last") == {(1, 1, ""): 1}


def test_user_counts_once_in_a_period_and_not_after_the_last() -> None:
    run = _run(Retention("r", SIGN_UP, VIEW, "day", 3))
    run.apply([_event(0, "sign_up")] + [_event(d, "page_view") for d in (0.5, 1, 1.5, 3.99, 4)])
    assert _cells(run, "users") == {(0, 0, ""): 1, (0, 1, ""): 1, (0, 3, ""): 1}
    assert _cells(run, "last") == {(0, 3, ""): 1}


def test_user_who_never_comes_back_was_last_active_in_period_0() -> None:
    run = _run(Retention("r", SIGN_UP, VIEW, "day", 3))
    run.apply([_event(0, "sign_up"), _event(0.1, "page_view")])
    assert _cells(run, "users") == _cells(run, "last") == {(0, 0, ""): 1}


def test_user_without_a_cohort_event_counts_nowhere() -> None:
    run = _run(Retention("r", SIGN_UP, VIEW, "day", 3))
    run.apply([_event(0, "page_view"), _event(1, "page_view")])
    assert run.rows("retention_cells") == []


def test_value_of_period_0_holds_the_first_event_and_those_before_it_in_the_same_period() -> None:
    run = _run(Retention("ltv", BUY, BUY, "day", 2, value="value"))
    run.apply([_event(0.5, "purchase", value=7), _event(2, "purchase", value=20), _event(3, "purchase", value=100)])
    run.apply([_event(0.25, "purchase", value=5)])
    assert _cells(run, "value") == {(0, 0, ""): 12, (0, 2, ""): 20}


def test_value_moves_with_its_user() -> None:
    run = _run(Retention("ltv", BUY, BUY, "day", 2, value="value"))
    run.apply([_event(2, "purchase", value=20), _event(3, "purchase", value=100)])
    run.apply([_event(1, "purchase", value=3)])
    assert _cells(run, "value") == {(1, 0, ""): 3, (1, 1, ""): 20, (1, 2, ""): 100}


def test_segment_of_equal_first_events_is_that_of_the_smaller_event_hash() -> None:
    for ids in ((7, 2**63 + 1), (2**63 + 1, 7)):
        run = _run(Retention("r", SIGN_UP, VIEW, "day", 1, breakdown="device"))
        for event_id, device in zip(ids, ("web", "app"), strict=True):
            run.apply([_event(0, "sign_up", event_id=event_id, device=device)])
        assert _cells(run, "users") == {(0, 0, "web" if ids[0] == 7 else "app"): 1}


def test_days_are_local_days_also_where_the_clock_changes() -> None:
    run = _run(Retention("r", SIGN_UP, VIEW, "day", 3), zone="Europe/Berlin")
    start = 1_761_343_200_000  # 2025-10-25 00:00 in Berlin; the 26th has 25 hours
    run.apply([Event(1, start, "sign_up", 1), Event(1, start + 49 * HOUR - 1, "page_view", 2), Event(2, start + DAY, "sign_up", 3)])
    run.apply([Event(2, start + 49 * HOUR, "page_view", 4)])
    found = {(row["cohort_start"] - start, row["period"]): row["value"] for row in run.rows("retention_cells") if row["measure"] == "users"}
    assert found == {(0, 0): 1, (0, 1): 1, (DAY, 0): 1, (DAY, 1): 1}


def test_activity_a_year_ahead_of_the_horizon_is_not_lost() -> None:
    run = _run(Retention("r", SIGN_UP, VIEW, "day", 3))
    run.table.expire(T0)
    run.apply([_event(d, "page_view", user) for user in (1, 2) for d in (1, 2, 365, 366)])
    run.apply([_event(364, "sign_up", 1), _event(0, "sign_up", 2)])
    assert _cells(run, "users") == {(364, 0, ""): 1, (364, 1, ""): 1, (364, 2, ""): 1, (0, 0, ""): 1, (0, 1, ""): 1, (0, 2, ""): 1}


def test_words_of_a_row_hold_the_periods_and_the_lateness() -> None:
    def words(periods: int, lateness: int) -> int:
        return first_words(Retention("r", SIGN_UP, VIEW, "day", periods), lateness)

    assert [words(30, DAY), words(60, DAY), words(61, DAY), words(30, 40 * DAY)] == [1, 1, 2, 2]


def test_user_who_matches_nothing_gets_no_row() -> None:
    run = _run(Retention("r", SIGN_UP, VIEW, "day", 3))
    run.apply([_event(0, "purchase", user) for user in range(100)] + [_event(0, "page_view", 7)])
    assert isinstance(run.table, RetentionTable)
    assert int(run.table.states[0].used[0]) == 1


def test_many_users_survive_growth_and_reload() -> None:
    run = _run(Retention("r", SIGN_UP, VIEW, "day", 3, value="value"))
    run.apply([_event(0, "sign_up", user) for user in range(1, 5001)])
    run.reload()
    run.apply([_event(1, "page_view", user, value=2) for user in range(1, 5001, 2)])
    assert _cells(run, "users") == {(0, 0, ""): 5000, (0, 1, ""): 2500}
    assert _cells(run, "value") == {(0, 1, ""): 5000}


def test_cell_is_final_after_its_period_and_lateness_and_last_after_all_periods() -> None:
    run = _run(Retention("r", SIGN_UP, VIEW, "week", 2, version="v1"), zone="Asia/Shanghai", lateness=HOUR)
    monday = 1_728_230_400_000  # 2024-10-07 00:00 in Shanghai
    run.apply([Event(1, monday + DAY, "sign_up", 1), Event(1, monday + 8 * DAY, "page_view", 2)])
    found = {(row["measure"], row["period"]): (row["final_at"] - monday - HOUR) // (7 * DAY) for row in run.rows("retention_cells")}
    assert found == {("users", 0): 1, ("users", 1): 2, ("last", 1): 3}
    row = run.rows("retention_cells")[0]
    assert (row["retention"], row["definition"], row["cohort_start"], row["segment"], row["partition"]) == ("r", "v1", monday, "", 5)


def test_equals_plain_sql_in_clickhouse() -> None:
    chdb = pytest.importorskip("chdb")
    r = random.Random(11)
    names = r.choices(("sign_up", "page_view", "purchase"), (1, 6, 2), k=4000)
    devices = ("", "web", "app")
    events = [
        _event(r.uniform(0, 40), name, r.randrange(250), r.getrandbits(64), r.randint(0, 90), device=r.choice(devices)) for name in names
    ]
    run = _run(Retention("r", Match(("sign_up",)), Match(("page_view", "purchase")), "day", 14, "device", "value"), zone="Asia/Shanghai")
    for at in range(0, len(events), 300):
        run.apply(events[at : at + 300])
    data = ",".join(f"({e.user},{e.ts},{e.event_id},'{e.name}','{e.fields['device']}',{e.numbers['value']})" for e in events)
    sql = f"""
        WITH e AS (SELECT *, toRelativeDayNum(toDateTime(intDiv(ts, 1000), 'Asia/Shanghai')) AS day
                   FROM values('user UInt32, ts UInt64, id UInt64, name String, device String, value Int64', {data})),
             c AS (SELECT user, argMin(day, (ts, id)) AS cohort, argMin(device, (ts, id)) AS segment FROM e WHERE name = 'sign_up' GROUP BY user),
             a AS (SELECT c.user AS user, cohort, segment, toInt64(day) - cohort AS n, value
                   FROM c INNER JOIN (SELECT * FROM e WHERE name != 'sign_up') AS x ON c.user = x.user
                   WHERE day >= cohort AND day <= cohort + 14)
        SELECT 'users', cohort, segment, 0, count() FROM c GROUP BY ALL
        UNION ALL SELECT 'users', cohort, segment, n, uniqExact(user) FROM a WHERE n > 0 GROUP BY ALL
        UNION ALL SELECT 'last', cohort, segment, m, count()
            FROM (SELECT c.user, c.cohort AS cohort, c.segment AS segment, max(n) AS m FROM c LEFT JOIN a ON c.user = a.user GROUP BY ALL) GROUP BY ALL
        UNION ALL SELECT 'value', cohort, segment, n, sum(value) AS total FROM a GROUP BY ALL HAVING total != 0"""
    lines: list[list[Any]] = [line.replace('"', "").split(",") for line in str(chdb.query(sql, "CSV")).splitlines()]
    expected = {(measure, int(cohort), segment, int(n)): int(value) for measure, cohort, segment, n, value in lines}
    found = {
        (row["measure"], (row["cohort_start"] + 8 * HOUR) // DAY, row["segment"], row["period"]): row["value"]
        for row in run.rows("retention_cells")
    }
    assert len(expected) > 500
    assert found == expected


def test_state_does_not_depend_on_arrays_that_were_dumped() -> None:
    run = _run(Retention("r", SIGN_UP, VIEW, "day", 3))
    run.apply([_event(0, "sign_up")])
    dumped = {name: array.copy() for name, array in run.table.dump().items()}
    loaded = RetentionTable(run.plan, 3)
    loaded.load(dumped)
    run.table, loaded = loaded, run.table
    run.apply([_event(1, "page_view")])
    again = RetentionTable(run.plan, 3)
    again.load(dumped)
    assert all(np.array_equal(again.dump()[name], dumped[name]) for name in dumped)
