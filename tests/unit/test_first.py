"""Facts about first and repeat occurrences that a reader of the board relies on."""

from __future__ import annotations

from pipeline.definitions import Definitions, Kpi, Match
from pipeline.plan import compile_plan
from pipeline.tables.first import FirstTable
from tests.oracle.cohort_case import Event, Run

BUY = Match(("purchase",))
HOUR, DAY = 3_600_000, 86_400_000
T0 = 20_000 * DAY


def _run(*kpis: Kpi, zone: str = "UTC", lateness: int = DAY) -> Run:
    return Run(FirstTable, compile_plan(Definitions(kpis=kpis, time_zone=zone, lateness_ms=lateness)))


def _new(**options: object) -> Kpi:
    return Kpi("new", "first", "users", BUY, **{"windows": ("1d",), **options})  # type: ignore[arg-type]


def _repeat(within_ms: int = 30 * DAY) -> Kpi:
    return Kpi("again", "repeat", "users", BUY, within_ms=within_ms, windows=("1d",))


def _buy(day: float, user: int = 1, event_id: int = 0, **fields: str) -> Event:
    ts = T0 + int(day * DAY)
    return Event(user, ts, "purchase", event_id or ts, fields)


def _days(run: Run, kpi: str, dimension: str = "") -> dict[tuple[int, str], int]:
    """(day after T0, dimension's value) → users."""
    rows = [row for row in run.rows("kpi_cells") if row["kpi"] == kpi and row["dimension"] == dimension]
    return {((row["window_start"] - T0) // DAY, row["dimension_value"]): row["value"] for row in rows}


def test_user_is_new_once_in_the_window_of_the_first_event() -> None:
    run = _run(_new())
    run.apply([_buy(0), _buy(0.5), _buy(3), _buy(1, user=2)])
    assert _days(run, "new") == {(0, ""): 1, (1, ""): 1}


def test_late_event_moves_user_to_earlier_window_with_its_own_dimensions() -> None:
    run = _run(_new(dimensions=("channel", "device")))
    run.apply([_buy(3, channel="ads", device="web")])
    run.apply([_buy(1, channel="mail", device="web")])
    assert _days(run, "new") == {(1, ""): 1}
    assert _days(run, "new", "channel") == {(1, "mail"): 1}
    assert _days(run, "new", "device") == {(1, "web"): 1}


def test_dimension_of_equal_first_events_is_that_of_the_smaller_event_hash() -> None:
    for ids in ((7, 2**63 + 1), (2**63 + 1, 7)):
        run = _run(_new(dimensions=("channel",)))
        for event_id, channel in zip(ids, ("ads", "mail"), strict=True):
            run.apply([_buy(0, event_id=event_id, channel=channel)])
        assert _days(run, "new", "channel") == {(0, "ads" if ids[0] == 7 else "mail"): 1}


def test_repeat_within_the_limit_includes_its_edge_and_counts_in_the_window_of_the_first() -> None:
    run = _run(_repeat(2 * DAY))
    run.apply([_buy(0, 1), _buy(2, 1), _buy(0, 2), _buy(2.001, 2), _buy(0, 3)])
    assert _days(run, "again") == {(0, ""): 1}


def test_second_event_at_the_time_of_the_first_is_a_repeat() -> None:
    run = _run(_repeat(0))
    run.apply([_buy(0, event_id=1)])
    run.apply([_buy(0, event_id=2)])
    assert _days(run, "again") == {(0, ""): 1}


def test_late_event_between_first_and_second_makes_a_repeat() -> None:
    run = _run(_repeat(2 * DAY))
    run.apply([_buy(0), _buy(5)])
    assert _days(run, "again") == {}
    run.apply([_buy(1)])
    assert _days(run, "again") == {(0, ""): 1}


def test_late_first_event_can_end_a_repeat() -> None:
    run = _run(_repeat(2 * DAY))
    run.apply([_buy(5), _buy(6)])
    assert _days(run, "again") == {(5, ""): 1}
    run.apply([_buy(1)])
    assert _days(run, "again") == {}


def test_without_a_match_every_event_is_the_first() -> None:
    run = _run(Kpi("seen", "first", "users", windows=("1d",)))
    run.apply([Event(1, T0, "whatever", 1), Event(2, T0 + DAY, "page_view", 2)])
    assert _days(run, "seen") == {(0, ""): 1, (1, ""): 1}


def test_kpis_with_one_match_share_a_users_memory() -> None:
    run = _run(_new(dimensions=("channel",)), _repeat(), Kpi("seen", "first", "users", Match(("*",)), windows=("1d",)))
    run.apply([_buy(0), Event(2, T0, "page_view", 9)])
    assert isinstance(run.table, FirstTable)
    assert [int(state.used[0]) for state in run.table.states] == [1, 2]


def test_cell_is_final_after_window_repeat_limit_and_lateness() -> None:
    run = _run(_new(windows=("1h", "1d"), version="v1"), _repeat(3 * DAY), zone="Asia/Shanghai", lateness=HOUR)
    run.apply([_buy(0, event_id=1), _buy(1, event_id=2)])
    midnight = T0 - 8 * HOUR
    found = {(row["kpi"], row["window"]): (row["window_start"], row["final_at"]) for row in run.rows("kpi_cells")}
    assert found == {
        ("new", "1h"): (T0, T0 + 2 * HOUR),
        ("new", "1d"): (midnight, midnight + DAY + HOUR),
        ("again", "1d"): (midnight, midnight + DAY + 3 * DAY + HOUR),
    }
    row = run.rows("kpi_cells")[0]
    assert (row["definition"], row["dimension"], row["currency"], row["bucket"], row["partition"]) == ("v1", "", "", -1, 5)


def test_many_users_survive_growth_and_reload() -> None:
    run = _run(_new(dimensions=("channel",)), _repeat())
    run.apply([_buy(0, user, channel="ads") for user in range(1, 5001)])
    run.reload()
    run.apply([_buy(1, user) for user in range(1, 5001, 2)])
    assert (_days(run, "new", "channel"), _days(run, "again")) == ({(0, "ads"): 5000}, {(0, ""): 2500})
