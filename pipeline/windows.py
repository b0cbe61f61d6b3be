"""Tumbling windows: which one holds a timestamp, when it ends. Half-open, in ms UTC.

Minutes and hours are aligned in UTC; days, weeks (from Monday) and months in the shop's time zone, local midnight to local
midnight, so a day is 23 or 25 hours long where the clock changes. Reads the IANA time zone database through `zoneinfo`.
"""

from __future__ import annotations

from datetime import date, datetime, timedelta
from functools import cache
from typing import NamedTuple
from zoneinfo import ZoneInfo

import numpy as np

from pipeline.columns import I64
from pipeline.definitions import Period, Window

MINUTE_MS = 60_000
HOUR_MS = 3_600_000
DAY_MS = 86_400_000
WINDOW_OF_PERIOD: dict[Period, Window] = {"day": "1d", "week": "1w", "month": "1mo"}
FIRST_DAY = date(1999, 11, 29)  # a Monday before EARLIEST_MS
LAST_DAY = date(2101, 3, 1)
EARLIEST_MS = 946_684_800_000  # 2000-01-01: an earlier ts is absurd and rejected by decode
LATEST_MS = 4_102_444_800_000  # 2100-01-01


class Boundaries(NamedTuple):
    """What a kernel needs to find a window: `size` ms when all are alike (starts is empty), else 0 and every window's start, ascending."""

    size: int
    starts: I64


@cache
def boundaries(window: Window, time_zone: str) -> Boundaries:
    if window == "1m":
        return Boundaries(MINUTE_MS, np.empty(0, np.int64))
    if window == "1h":
        return Boundaries(HOUR_MS, np.empty(0, np.int64))
    if window == "1mo":
        days = [date(y, m, 1) for y in range(FIRST_DAY.year, LAST_DAY.year + 1) for m in range(1, 13)]
        days = [d for d in days if FIRST_DAY <= d <= LAST_DAY]
    else:
        step = 1 if window == "1d" else 7
        days = [FIRST_DAY + timedelta(days=i) for i in range(0, (LAST_DAY - FIRST_DAY).days, step)]
    return Boundaries(0, np.array([_local_midnight_ms(day, ZoneInfo(time_zone)) for day in days], np.int64))


class BoundaryTable(NamedTuple):
    """The boundaries of several kinds of windows as kernels want them; all tables share it, none writes to it."""

    shape: I64  # [kinds, 3] size in ms or 0, starts[from:to]
    starts: I64


@cache
def boundary_table(windows: tuple[Window, ...], time_zone: str) -> BoundaryTable:
    starts, shape = [np.empty(0, np.int64)], []
    for window in windows:
        bounds = boundaries(window, time_zone)
        at = sum(map(len, starts))
        shape.append((bounds.size, at, at + len(bounds.starts)))
        starts.append(bounds.starts)
    return BoundaryTable(np.array(shape, np.int64).reshape(-1, 3), np.concatenate(starts))


def _local_midnight_ms(day: date, zone: ZoneInfo) -> int:
    """The first instant of a local day. Where the clock jumps over midnight, the instant of the jump (fold=0 reads the offset before it)."""
    return round(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp() * 1000)


def window_indices(window: Window, time_zone: str, ts: I64) -> I64:
    """Numbers of the windows that hold `ts` [n]: consecutive windows have consecutive numbers."""
    bounds = boundaries(window, time_zone)
    return ts // bounds.size if bounds.size else np.searchsorted(bounds.starts, ts, side="right") - 1


def window_starts(window: Window, time_zone: str, indices: I64) -> I64:
    """Starts (ms) of windows by number [n]; a window ends where the next one starts."""
    bounds = boundaries(window, time_zone)
    return indices * bounds.size if bounds.size else bounds.starts[indices]
