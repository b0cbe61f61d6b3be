"""When a row of a report is final, from the definition and the raw events alone, by calendar arithmetic.

In: the messages of each partition and the definitions. Out: the watermarks, and for each row whether nothing that may still come can change it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from functools import cache
from typing import NamedTuple
from zoneinfo import ZoneInfo

from pipeline.definitions import Definitions, Retention
from tests.oracle.shops import Sent
from tests.oracle.sql import FunnelKey, KpiKey, RetentionKey

HOUR_MS, DAY_MS = 3_600_000, 86_400_000


class Watermarks(NamedTuple):
    """Of the partitions that have shown an event: each is the smallest of its topics' largest times; 0 before all of them have shown one."""

    smallest: int
    largest: int


def watermarks(lanes: Iterable[list[Sent]], idle: frozenset[str]) -> Watermarks:
    of_partitions = []
    for lane in lanes:
        newest: dict[str, int] = defaultdict(int)
        for message in lane:
            newest[message.topic] = max(newest[message.topic], message.ts)
        if lane:
            of_partitions.append(min(newest[topic] for topic in {"clickstream", "orders"} - idle))
    return Watermarks(min(of_partitions), max(of_partitions))


@cache
def midnight_ms(day: date, zone: str) -> int:
    return round(datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone)).timestamp() * 1000)


@cache
def local_date(start_ms: int, zone: str) -> date:
    return datetime.fromtimestamp(start_ms / 1000, UTC).astimezone(ZoneInfo(zone)).date()


def later(first_day: date, unit: str, n: int) -> date:
    """The first day of the period `n` periods after the one that begins on `first_day`."""
    if unit == "month":
        months = first_day.year * 12 + first_day.month - 1 + n
        return date(months // 12, months % 12 + 1, 1)
    return first_day + timedelta(days=n * (7 if unit == "week" else 1))


def window_end(start_ms: int, window: str, zone: str) -> int:
    if window in ("1m", "1h"):
        return start_ms + (60_000 if window == "1m" else HOUR_MS)
    return midnight_ms(later(local_date(start_ms, zone), {"1d": "day", "1w": "week", "1mo": "month"}[window], 1), zone)


def funnel_is_final(definitions: Definitions, name: str, window_start: int, watermark: int) -> bool:
    """Window end + conversion window + lateness ≤ watermark."""
    funnel = next(f for f in definitions.funnels if f.name == name)
    return (
        window_end(window_start, funnel.entry_window, definitions.time_zone) + funnel.conversion_ms + definitions.lateness_ms <= watermark
    )


def funnel_finals(definitions: Definitions, keys: Iterable[FunnelKey], watermark: int) -> dict[FunnelKey, bool]:
    judge = cache(lambda name, start: funnel_is_final(definitions, name, start, watermark))
    return {key: judge(key[0], key[1]) for key in keys}


def follows_ms(definitions: Definitions, name: str) -> int:
    """So long after its window a KPI may change: second orders, sessions of up to a day, what becomes of an order; a formula with its slower side."""
    kpi = next(k for k in definitions.kpis if k.name == name)
    if kpi.source == "formula":
        return max(follows_ms(definitions, kpi.left), follows_ms(definitions, kpi.right))
    if kpi.source == "orders" and kpi.aggregate in ("paid_of_created", "refunded_of_paid"):
        return 180 * DAY_MS
    return {"repeat": kpi.within_ms, "sessions": DAY_MS}.get(kpi.source, 0)


def kpi_finals(definitions: Definitions, keys: Iterable[KpiKey], watermark: int) -> dict[KpiKey, bool]:
    """Window end + what follows + lateness ≤ watermark."""
    follows = {kpi.name: follows_ms(definitions, kpi.name) for kpi in definitions.kpis}
    end = cache(lambda start, window: window_end(start, window, definitions.time_zone))
    return {key: end(key[2], key[1]) + follows[key[0]] + definitions.lateness_ms <= watermark for key in keys}


def retention_finals(
    definitions: Definitions, cells: dict[RetentionKey, tuple[int, int, object]], at: Watermarks
) -> dict[RetentionKey, frozenset[bool]]:
    """What `final` may say of each row that the report must have: period's end + lateness ≤ watermark; a row without users may be an hour late.

    Every cohort has a row for each period up to the last one that has begun by the largest watermark or has shown a user.
    """
    of = {r.name: r for r in definitions.retentions}
    last: dict[tuple[str, int, str], int] = defaultdict(int)
    for (name, cohort, segment, n), (users, _, value) in cells.items():
        if users or value:
            last[name, cohort, segment] = max(last[name, cohort, segment], n)
    out: dict[RetentionKey, frozenset[bool]] = {}
    for (name, cohort, segment), newest in last.items():
        for n in range(of[name].periods + 1):
            if n <= newest or _begins(of[name], cohort, n, definitions.time_zone) <= at.largest:
                ripe = _begins(of[name], cohort, n + 1, definitions.time_zone) + definitions.lateness_ms
                users, _, value = cells.get((name, cohort, segment, n), (0, 0, 0))
                sure = ripe <= at.smallest
                out[name, cohort, segment, n] = (
                    frozenset({sure, ripe + 2 * HOUR_MS <= at.smallest}) if not users and not value else frozenset({sure})
                )
    return out


def _begins(retention: Retention, cohort: int, n: int, zone: str) -> int:
    return midnight_ms(later(local_date(cohort, zone), retention.period, n), zone)
