"""What a report says: frozen values, and the pure functions that shape the warehouse's rows into them.

In: rows of the report views (`queries`). Out: models that `render` draws and `export` writes. Times are aware datetimes in the shop's zone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal
from zoneinfo import ZoneInfo

Unit = Literal["count", "money", "ratio", "duration"]


@dataclass(frozen=True, slots=True)
class FunnelStep:
    """users: got to this step or further. of_first, of_previous: shares, None without a denominator. median_ms: from the first step, of those who got exactly this far."""

    number: int
    name: str
    users: int
    of_first: float | None
    of_previous: float | None
    median_ms: int | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class FunnelWindow:
    """One entry window: users of each step, over all segments shown."""

    start: datetime
    users: tuple[int, ...]
    final: bool


@dataclass(frozen=True, slots=True)
class FunnelReport:
    """A funnel over one or more entry windows. segments: (value, users of each step), largest first; empty for a funnel without breakdown."""

    name: str
    time_zone: str
    segment: str | None
    steps: tuple[FunnelStep, ...]
    windows: tuple[FunnelWindow, ...]
    segments: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def so_far(self) -> int:
        """Entry windows that an event may still change."""
        return sum(not window.final for window in self.windows)

    @property
    def conversion(self) -> float | None:
        return self.steps[-1].of_first if self.steps else None


@dataclass(frozen=True, slots=True)
class CohortCell:
    """users: active in that period. on_or_after: active in it or a later one. value: the summed field. final: of users and value, after_final: of on_or_after."""

    users: int
    on_or_after: int
    value: Decimal
    final: bool
    after_final: bool


@dataclass(frozen=True, slots=True)
class Cohort:
    """Users whose first event fell into one period; `cells[n]` is period n after it, cells[0].users the size."""

    start: datetime
    cells: tuple[CohortCell, ...]

    @property
    def size(self) -> int:
        return self.cells[0].users if self.cells else 0

    def share(self, n: int) -> float | None:
        return self.cells[n].users / self.size if n < len(self.cells) and self.size else None


@dataclass(frozen=True, slots=True)
class RetentionReport:
    """Cohorts by start, oldest first, of those asked for; `found` is how many there are."""

    name: str
    time_zone: str
    segment: str | None
    period: str
    cohorts: tuple[Cohort, ...]
    found: int

    @property
    def so_far(self) -> int:
        """Cells that an event may still change."""
        return sum(not cell.final for cohort in self.cohorts for cell in cohort.cells)

    @property
    def periods(self) -> int:
        return max((len(cohort.cells) - 1 for cohort in self.cohorts), default=0)

    def share(self, n: int) -> float | None:
        """Share of all users that came back in period n, over the cohorts whose period n is final; None when none is."""
        done = [cohort for cohort in self.cohorts if n < len(cohort.cells) and cohort.cells[n].final]
        size = sum(cohort.size for cohort in done)
        return sum(cohort.cells[n].users for cohort in done) / size if size else None


@dataclass(frozen=True, slots=True)
class KpiPoint:
    """value: None for a ratio without denominator. ended: the newest event is past the window's end. final: no event can change it."""

    start: datetime
    value: Decimal | None
    ended: bool
    final: bool


@dataclass(frozen=True, slots=True)
class KpiSeries:
    """One KPI over consecutive windows, oldest first; one value of a dimension, one currency."""

    name: str
    unit: Unit
    currency: str
    dimension_value: str
    points: tuple[KpiPoint, ...]

    @property
    def last(self) -> KpiPoint | None:
        """The newest window that has ended."""
        return next((point for point in reversed(self.points) if point.ended), None)

    @property
    def running(self) -> KpiPoint | None:
        """The window that the newest event is in."""
        return self.points[-1] if self.points and not self.points[-1].ended else None

    @property
    def change(self) -> float | None:
        """Relative change of the last ended window against the one before it."""
        values = [point.value for point in self.points if point.ended][-2:]
        if len(values) < 2 or values[0] is None or values[1] is None or not values[0]:
            return None
        return float(values[1] / values[0] - 1)


@dataclass(frozen=True, slots=True)
class KpiReport:
    """Series side by side; dimension '' for totals."""

    time_zone: str
    window: str
    dimension: str
    series: tuple[KpiSeries, ...]
    found: int
    """Series there are; those of the largest values are shown."""


@dataclass(frozen=True, slots=True)
class PartitionHealth:
    """One source topic partition: everything before next_offset is in the reports; counts since the beginning. watermark: None before the first event."""

    topic: str
    partition: int
    next_offset: int
    watermark: datetime | None
    applied: int
    duplicates: int
    rejected: int
    too_late: int
    rekeyed: int


@dataclass(frozen=True, slots=True)
class HealthReport:
    """How far the warehouse is. freshness_ms: age of the newest event in the reports, now − largest watermark; None before the first event."""

    time_zone: str
    partitions: tuple[PartitionHealth, ...]
    now: datetime
    reasons: tuple[tuple[str, int], ...] = field(default=())

    @property
    def watermark(self) -> datetime | None:
        return max((p.watermark for p in self.partitions if p.watermark), default=None)

    @property
    def freshness_ms(self) -> int | None:
        return round((self.now - self.watermark).total_seconds() * 1000) if self.watermark else None

    def behind_ms(self, partition: PartitionHealth) -> int | None:
        """How far a partition's watermark is behind the newest one."""
        if self.watermark is None or partition.watermark is None:
            return None
        return round((self.watermark - partition.watermark).total_seconds() * 1000)

    def total(self, count: str) -> int:
        return sum(int(getattr(partition, count)) for partition in self.partitions)


# --- shaping ------------------------------------------------------------------------------------------------------------------


def ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def funnel_report(
    name: str,
    time_zone: str,
    segment: str | None,
    rows: Iterable[tuple[Any, ...]],
    times: Iterable[tuple[int, int, int]],
    names: Sequence[str],
    optional: Sequence[bool],
    limit: int | None,
) -> FunnelReport:
    """From (window_start, segment, step, users, final) of one funnel, (level, upper_ms, users) of its histogram, the steps' names, and which may be left out.

    Only the newest `limit` entry windows count (None: all); `times` must be of the same windows.
    """
    found = [(_local(start, time_zone), str(value), int(step), int(users), bool(final)) for start, value, step, users, final in rows]
    starts = sorted({row[0] for row in found})
    starts = starts[-limit:] if limit else starts
    kept = set(starts)
    by_window: dict[datetime, list[int]] = {start: [0] * len(names) for start in starts}
    by_segment: dict[str, list[int]] = {}
    final = dict.fromkeys(starts, True)
    for start, value, step, users, is_final in found:
        if start in kept and 1 <= step <= len(names):
            by_window[start][step - 1] += users
            by_segment.setdefault(value, [0] * len(names))[step - 1] += users
            final[start] = final[start] and is_final
    totals = [sum(users[i] for users in by_window.values()) for i in range(len(names))]
    medians = _medians(times)
    steps = tuple(
        FunnelStep(
            number=i + 1,
            name=names[i],
            users=totals[i],
            of_first=ratio(totals[i], totals[0]),
            of_previous=ratio(totals[i], totals[i - 1]) if i else None,
            median_ms=medians.get(i + 1),
            optional=optional[i],
        )
        for i in range(len(names))
    )
    windows = tuple(FunnelWindow(start, tuple(by_window[start]), final[start]) for start in starts)
    segments = tuple(sorted(((value, tuple(users)) for value, users in by_segment.items()), key=lambda s: (-s[1][0], s[0])))
    return FunnelReport(name, time_zone, segment, steps, windows, segments if set(by_segment) - {""} else ())


def _medians(times: Iterable[tuple[int, int, int]]) -> dict[int, int]:
    """Median (nearest rank) upper bound, ms, by level from (level, upper_ms, users)."""
    buckets: dict[int, list[tuple[int, int]]] = {}
    for level, upper, users in times:
        buckets.setdefault(int(level), []).append((int(upper), int(users)))
    medians = {}
    for level, counts in buckets.items():
        rank, seen = (sum(users for _, users in counts) + 1) // 2, 0
        for upper, users in sorted(counts):
            seen += users
            if users and seen >= rank:
                medians[level] = upper
                break
    return medians


def retention_report(
    name: str, time_zone: str, segment: str | None, period: str, rows: Iterable[tuple[Any, ...]], limit: int | None
) -> RetentionReport:
    """From (cohort_start, period, users, users_on_or_after, value, final, after_final), of one or several segments, which add up."""
    cells: dict[datetime, dict[int, CohortCell]] = {}
    for start, n, users, after, value, final, after_final in rows:
        of = cells.setdefault(_local(start, time_zone), {})
        old = of.get(int(n), CohortCell(0, 0, Decimal(0), True, True))
        of[int(n)] = CohortCell(
            old.users + int(users),
            old.on_or_after + int(after),
            old.value + Decimal(value),
            old.final and bool(final),
            old.after_final and bool(after_final),
        )
    starts = sorted(cells)
    kept = starts[-limit:] if limit else starts
    empty = CohortCell(0, 0, Decimal(0), False, False)
    cohorts = tuple(Cohort(start, tuple(cells[start].get(n, empty) for n in range(max(cells[start]) + 1))) for start in kept)
    return RetentionReport(name, time_zone, segment, period, cohorts, len(starts))


def kpi_series(
    name: str,
    unit: Unit,
    currency: str,
    dimension_value: str,
    known: dict[datetime, tuple[Decimal, bool]],
    grid: Sequence[tuple[datetime, bool]],
    fill: bool,
) -> KpiSeries:
    """`known` (value, final by start) on the windows of `grid` (start, ended). `fill`: a window without a row is 0, else it has no value.

    A window without a row is final when a later one is: what is final is final in the order of the windows.
    """
    final_from = max((start for start, (_, final) in known.items() if final), default=None)
    points = []
    for start, ended in grid:
        value, final = known.get(start, (Decimal(0) if fill else None, final_from is not None and start <= final_from))
        points.append(KpiPoint(start, value, ended, final))
    return KpiSeries(name, unit, currency, dimension_value, tuple(points))


def _local(start: datetime, time_zone: str) -> datetime:
    return start.astimezone(ZoneInfo(time_zone))
