"""Windows: half-open, minutes and hours in UTC, days and longer between the shop's local midnights."""

from __future__ import annotations

from datetime import datetime
from typing import get_args
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.definitions import Window
from pipeline.tables.window_kernel import window_index, window_start
from pipeline.windows import EARLIEST_MS, LATEST_MS, boundaries, window_indices, window_starts

ZONES = ("UTC", "Asia/Shanghai", "Europe/Berlin", "America/Sao_Paulo", "Asia/Kolkata")
WINDOWS: tuple[Window, ...] = get_args(Window)


def ms(zone: str, *when: int) -> int:
    return round(datetime(*when, tzinfo=ZoneInfo(zone)).timestamp() * 1000)  # type: ignore[arg-type, misc]


def bounds_of(window: Window, zone: str, ts: int) -> tuple[int, int]:
    index = window_indices(window, zone, np.array([ts], np.int64))
    return int(window_starts(window, zone, index)[0]), int(window_starts(window, zone, index + 1)[0])


def test_a_day_in_shanghai_begins_at_16_utc() -> None:
    start, end = bounds_of("1d", "Asia/Shanghai", ms("UTC", 2026, 3, 1, 17))
    assert (start, end) == (ms("UTC", 2026, 3, 1, 16), ms("UTC", 2026, 3, 2, 16))


@pytest.mark.parametrize(("day", "hours"), [((2026, 3, 29), 23), ((2026, 10, 25), 25), ((2026, 6, 1), 24)])
def test_a_day_is_23_or_25_hours_long_where_the_clock_changes(day: tuple[int, int, int], hours: int) -> None:
    start, end = bounds_of("1d", "Europe/Berlin", ms("Europe/Berlin", *day, 12))
    assert end - start == hours * 3_600_000
    assert start == ms("Europe/Berlin", *day)


def test_where_midnight_does_not_exist_the_day_begins_with_the_jump() -> None:
    start, _ = bounds_of("1d", "America/Sao_Paulo", ms("UTC", 2018, 11, 4, 12))
    assert start == ms("UTC", 2018, 11, 4, 3)


def test_weeks_begin_on_monday_and_months_on_the_first() -> None:
    ts = ms("Europe/Berlin", 2026, 4, 1, 10)
    assert bounds_of("1w", "Europe/Berlin", ts) == (ms("Europe/Berlin", 2026, 3, 30), ms("Europe/Berlin", 2026, 4, 6))
    assert bounds_of("1mo", "Europe/Berlin", ts) == (ms("Europe/Berlin", 2026, 4, 1), ms("Europe/Berlin", 2026, 5, 1))


def test_minutes_and_hours_ignore_the_zone() -> None:
    ts = ms("UTC", 2026, 3, 1, 10, 42, 30)
    for zone in ZONES:
        assert bounds_of("1h", zone, ts)[0] == ms("UTC", 2026, 3, 1, 10)
        assert bounds_of("1m", zone, ts)[0] == ms("UTC", 2026, 3, 1, 10, 42)


@settings(deadline=None)
@given(st.sampled_from(WINDOWS), st.sampled_from(ZONES), st.integers(EARLIEST_MS, LATEST_MS))
def test_window_holds_its_timestamp_and_the_end_belongs_to_the_next(window: Window, zone: str, ts: int) -> None:
    start, end = bounds_of(window, zone, ts)
    assert start <= ts < end
    assert bounds_of(window, zone, start)[0] == start
    assert bounds_of(window, zone, end)[0] == end


@settings(deadline=None)
@given(st.sampled_from(WINDOWS), st.sampled_from(ZONES), st.integers(EARLIEST_MS, LATEST_MS))
def test_kernels_and_arrays_agree(window: Window, zone: str, ts: int) -> None:
    size, starts = boundaries(window, zone)
    index = window_index(size, starts, ts)
    assert index == window_indices(window, zone, np.array([ts], np.int64))[0]
    assert window_start(size, starts, index) == bounds_of(window, zone, ts)[0]


@settings(deadline=None)
@given(st.sampled_from(("1d", "1w", "1mo")), st.sampled_from(ZONES), st.integers(EARLIEST_MS, LATEST_MS))
def test_start_is_the_local_date_that_the_calendar_says(window: Window, zone: str, ts: int) -> None:
    start = datetime.fromtimestamp(bounds_of(window, zone, ts)[0] / 1000, ZoneInfo(zone))
    local = datetime.fromtimestamp(ts // 1000, ZoneInfo(zone))
    days = {"1d": 0, "1w": local.weekday(), "1mo": local.day - 1}[window]
    assert start.date().toordinal() == local.date().toordinal() - days
