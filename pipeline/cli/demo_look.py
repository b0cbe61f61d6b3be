"""What the demo's screen shows, read from the report views and from the feed: a `Snapshot` of one moment. `pipeline.cli.demo` takes one a second."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from pipeline.cli.demo_check import event_counts
from pipeline.cli.demo_feed import Feed
from pipeline.cli.local import Backlog, Local
from pipeline.definitions import Definitions
from pipeline.reports import queries
from pipeline.reports.model import FunnelReport, KpiPoint, RetentionReport

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
TREND_HOURS = 48
COHORTS = 40
FUNNEL_DAYS = 7
RECENT_HOURS = 3
KPIS = (
    "gmv", "orders", "buyers", "active_users", "conversion", "sessions", "bounce_rate", "sign_ups", "order_value",
    "pages", "page_errors", "payment_failures", "payment_attempts",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Number:
    """One KPI: of the shop's day so far, of the last few hours, and hour by hour, newest last."""

    today: Decimal
    recent: Decimal
    hours: tuple[KpiPoint, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """clock: the shop's. events_per_second: of wall clock. lag: events sent and not yet in the reports. fresh_seconds: age of the newest event in them,
    wall clock. late: events that came late and were counted all the same. metrics: the workers' addresses for Prometheus."""

    clock: datetime
    day_seconds: float
    sent: int
    events_per_second: float
    lag: int
    fresh_seconds: float | None
    late: int
    duplicates: int
    rejected: int
    too_late: int
    numbers: dict[str, Number]
    funnel: FunnelReport
    visitors: RetentionReport
    buyers: RetentionReport
    metrics: tuple[str, ...] = ()

    def share(self, part: str, of: str) -> float | None:
        """Of the last few hours."""
        whole = self.numbers[of].recent
        return float(self.numbers[part].recent / whole) if whole else None


class Watcher:
    """Takes snapshots; knows the recent rate. Numbers are read each time, of funnel and retention one in turn: a look should not cost the worker's core."""

    def __init__(self, local: Local, definitions: Definitions, feed: Feed, backlog: Backlog) -> None:
        self._local, self._definitions, self._feed, self._backlog = local, definitions, feed, backlog
        self._rates: deque[tuple[float, int]] = deque(maxlen=6)
        self._reports: dict[str, Any] = {}
        self._looks = 0

    def look(self, everything: bool = False) -> Snapshot:
        """Raises RunFailed when the pipeline stands still, and tells the feed how far it is behind."""
        feed, warehouse = self._feed, self._local.warehouse
        self._backlog.look()
        counts = event_counts(warehouse)
        sent, clock_ms = feed.sent, feed.now_ms
        feed.behind = max(0, sent - sum(counts.values()))
        self._rates.append((time.monotonic(), sent))
        (before, sent_before), (now, _) = self._rates[0], self._rates[-1]
        newest = max((int(largest) for (largest,) in warehouse.query("SELECT largest FROM watermarks")), default=0)
        clock = datetime.fromtimestamp(clock_ms / 1000, UTC)
        midnight = clock.replace(hour=0, minute=0, second=0, microsecond=0)
        self._read_reports(midnight, everything)
        return Snapshot(
            clock,
            86_400 / feed.speed,
            sent,
            (sent - sent_before) / (now - before) if now > before else 0.0,
            feed.behind,
            max(0.0, (clock_ms - newest) / 1000 / feed.speed) if newest else None,
            feed.fates["late"],
            counts["duplicates"],
            counts["rejected"],
            counts["too late"],
            self._numbers(midnight, clock.replace(minute=0, second=0, microsecond=0)),
            self._reports["checkout"],
            self._reports["visitors"],
            self._reports["buyers"],
            tuple(f"http://127.0.0.1:{port}/metrics" for port in self._local.metrics),
        )

    def _read_reports(self, midnight: datetime, everything: bool) -> None:
        names = ("checkout", "visitors", "buyers")
        in_turn = names[self._looks % len(names)]
        self._looks += 1
        for name in names:
            if everything or name == in_turn or name not in self._reports:
                read = queries.funnel if name == "checkout" else queries.retention
                days = FUNNEL_DAYS - 1 if name == "checkout" else COHORTS
                self._reports[name] = read(self._local.warehouse, self._definitions, name, queries.Asked(begin=midnight - days * DAY))

    def _numbers(self, midnight: datetime, hour: datetime) -> dict[str, Number]:
        """Money in the shop's currency only."""
        first = hour - (TREND_HOURS - 1) * HOUR
        rows = self._local.warehouse.query(
            "SELECT kpi, window, window_start, value, final FROM kpi_report WHERE dimension = '' AND currency IN ('', %(currency)s) "
            "AND window_start >= %(first)s AND kpi IN %(kpis)s",
            {"currency": self._definitions.currency, "first": min(first, midnight), "kpis": KPIS},
        )
        known: dict[tuple[str, str, datetime], tuple[Decimal, bool]] = {
            (kpi, window, start): (value, bool(final)) for kpi, window, start, value, final in rows
        }
        return {kpi: _number(kpi, known, midnight, [first + n * HOUR for n in range(TREND_HOURS)]) for kpi in KPIS}


def _number(kpi: str, known: dict[tuple[str, str, datetime], Any], midnight: datetime, hours: list[datetime]) -> Number:
    nothing = (Decimal(0), False)
    points = []
    for start in hours:
        value, final = known.get((kpi, "1h", start), nothing)
        points.append(KpiPoint(start, value, start != hours[-1], final))
    recent = sum((point.value or Decimal(0) for point in points[-RECENT_HOURS:]), Decimal(0))
    return Number(known.get((kpi, "1d", midnight), nothing)[0], recent, tuple(points))
