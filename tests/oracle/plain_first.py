"""First and repeat occurrences by the definition, one user at a time, in plain Python: what `pipeline.tables.first` is compared with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from zoneinfo import ZoneInfo

from tests.oracle.plain_retention import period_of, start_ms

PERIODS = {"1d": "day", "1w": "week", "1mo": "month"}


@dataclass(frozen=True)
class FirstEvent:
    """An event that matches the KPI."""

    user: int
    ts: int
    event_id: int
    fields: Mapping[str, str] = field(default_factory=dict)


def plain_window_start(ts: int, window: str, zone: str) -> int:
    if window in PERIODS:
        return start_ms(period_of(ts, PERIODS[window], zone), zone)
    at = datetime.fromtimestamp(ts // 1000, ZoneInfo("UTC")).replace(second=0)
    return int((at if window == "1m" else at.replace(minute=0)).timestamp()) * 1000


def plain_first(
    events: Iterable[FirstEvent], windows: Iterable[str], dimensions: Iterable[str], zone: str, within_ms: int | None = None
) -> dict[tuple[str, int, str, str], int]:
    """(window, window start in ms, dimension or '', its value) → users; with `within_ms` those whose second event came so soon."""
    out: Counter[tuple[str, int, str, str]] = Counter()
    by_user: defaultdict[int, list[FirstEvent]] = defaultdict(list)
    for event in events:
        by_user[event.user].append(event)
    for own in by_user.values():
        own.sort(key=lambda e: (e.ts, e.event_id))
        if within_ms is not None and (len(own) < 2 or own[1].ts - own[0].ts > within_ms):
            continue
        for window in windows:
            start = plain_window_start(own[0].ts, window, zone)
            out[window, start, "", ""] += 1
            for dimension in dimensions:
                out[window, start, dimension, own[0].fields.get(dimension, "")] += 1
    return dict(out)
