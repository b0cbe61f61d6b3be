"""Retention by the definition, one user at a time, in plain Python: what `pipeline.tables.retention` is compared with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo


@dataclass(frozen=True)
class RetentionEvent:
    user: int
    ts: int
    event_id: int
    starts: bool  # matches `cohort`
    returns: bool  # matches `returning`
    segment: str = ""
    value: int = 0


def period_of(ts: int, period: str, zone: str) -> date:
    """First local day of the period that holds ts (ms)."""
    day = datetime.fromtimestamp(ts // 1000, ZoneInfo(zone)).date()
    if period == "week":
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if period == "month" else day


def age(cohort: date, later: date, period: str) -> int:
    """Periods from one period's first day to another's."""
    if period == "month":
        return (later.year - cohort.year) * 12 + later.month - cohort.month
    return (later - cohort).days // (7 if period == "week" else 1)


def start_ms(first_day: date, zone: str) -> int:
    return int(datetime(first_day.year, first_day.month, first_day.day, tzinfo=ZoneInfo(zone)).timestamp()) * 1000


def plain_retention(
    events: Iterable[RetentionEvent], period: str, periods: int, zone: str, with_value: bool
) -> dict[tuple[str, int, int, str], int]:
    """(measure, n, cohort start in ms, segment) → value, without zeros."""
    out: Counter[tuple[str, int, int, str]] = Counter()
    by_user: defaultdict[int, list[RetentionEvent]] = defaultdict(list)
    for event in events:
        by_user[event.user].append(event)
    for own in by_user.values():
        starting = [e for e in own if e.starts]
        if not starting:
            continue
        first = min(starting, key=lambda e: (e.ts, e.event_id))
        cohort = period_of(first.ts, period, zone)
        start = start_ms(cohort, zone)
        returns = [(age(cohort, period_of(e.ts, period, zone), period), e.value) for e in own if e.returns]
        active = {n for n, _ in returns if 1 <= n <= periods}
        for n in {0} | active:
            out["users", n, start, first.segment] += 1
        out["last", max(active, default=0), start, first.segment] += 1
        if with_value:
            for n, value in returns:
                if 0 <= n <= periods:
                    out["value", n, start, first.segment] += value
    return {key: value for key, value in out.items() if value}
