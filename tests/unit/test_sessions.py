"""Sessions, fact by fact."""

from __future__ import annotations

from pipeline.definitions import Definitions, Kpi, Window
from pipeline.plan import compile_plan
from pipeline.tables.sessions import AGGREGATES, UNDECIDED, SessionTable
from tests.oracle.kpi_case import KpiRun, ShopEvent

NOON = 1_790_000_000_000 // 86_400_000 * 86_400_000 + 43_200_000
DAY = 86_400_000
GAP = 1_800_000
DAY_WINDOW: tuple[Window, ...] = ("1d",)


def _run() -> KpiRun:
    kpis = tuple(Kpi(name, "sessions", name, dimensions=("channel",) if name == "count" else (), windows=DAY_WINDOW) for name in AGGREGATES)
    return KpiRun(SessionTable, compile_plan(Definitions(kpis=kpis, session_gap_ms=GAP)))


def _view(ts: int, channel: str = "", event_id: int = 1, user: int = 1, name: str = "page_view") -> ShopEvent:
    return ShopEvent(user, NOON + ts, name, event_id, {"channel": channel})


def _totals(run: KpiRun) -> dict[str, int]:
    totals = dict.fromkeys(AGGREGATES, 0)
    for key, value in run.found().items():
        totals[key[0]] += value if key[3] == "" else 0
    return totals


def test_gap_of_exactly_the_limit_stays_in_the_session() -> None:
    run = _run()
    run.apply([_view(0), _view(GAP)])
    assert _totals(run) == {"count": 1, "bounces": 0, "pages": 2, "dwell": GAP, "dwell_quantile": 1}


def test_gap_longer_than_the_limit_splits() -> None:
    run = _run()
    run.apply([_view(0), _view(GAP + 1)])
    assert _totals(run) == {"count": 2, "bounces": 2, "pages": 2, "dwell": 0, "dwell_quantile": 2}


def test_late_event_joins_two_sessions() -> None:
    run = _run()
    run.apply([_view(0), _view(2 * GAP)])
    run.apply([_view(GAP)])
    assert _totals(run) == {"count": 1, "bounces": 0, "pages": 3, "dwell": 2 * GAP, "dwell_quantile": 1}


def test_late_event_moves_session_to_earlier_window_and_its_own_channel() -> None:
    run = _run()
    run.apply([_view(DAY // 2, "ads")])
    run.apply([_view(DAY // 2 - 1, "mail")])
    counts = {(key[2], key[4]): value for key, value in run.found().items() if key[0] == "count" and key[3]}
    assert counts == {(NOON - DAY // 2, "mail"): 1}


def test_of_equal_times_the_smaller_event_id_is_first() -> None:
    run = _run()
    run.apply([_view(0, "ads", event_id=(1 << 63) + 1)])
    run.apply([_view(0, "mail", event_id=7)])
    assert [key[4] for key in run.found() if key[3]] == ["mail"]


def test_session_without_a_page_is_no_bounce() -> None:
    run = _run()
    run.apply([_view(0, name="purchase"), _view(1, name="purchase")])
    assert _totals(run) == {"count": 1, "bounces": 0, "pages": 0, "dwell": 1, "dwell_quantile": 1}


def test_cell_is_undecided_while_a_session_of_its_window_may_change() -> None:
    run = _run()
    run.apply([_view(0)])
    table, keys = run.table, run.cells.arrays.keys[: len(run.cells)]
    table.expire(NOON + GAP)
    assert set(table.final_at(keys).tolist()) == {UNDECIDED}
    table.expire(NOON + GAP + 1)
    assert set(table.final_at(keys).tolist()) == {NOON + DAY // 2 + 2 * DAY}


def test_memory_of_ended_sessions_is_used_again() -> None:
    run = _run()
    run.apply([_view(0, user=user) for user in range(100)])
    before = int(run.table.arena.arrays.meta[0])  # type: ignore[attr-defined]
    run.table.expire(NOON + DAY)
    run.apply([_view(2 * DAY, user=user) for user in range(100, 200)])
    assert int(run.table.arena.arrays.meta[0]) == before  # type: ignore[attr-defined]
