"""Questions to the warehouse's report views, their answers as models. Every value goes through the warehouse's own binding of parameters.

In: an open warehouse, the definitions (for the shop's zone and units) and what is asked for. Called by the commands and the live demo.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

from pipeline.definitions import Definitions, Kpi
from pipeline.definitions import Window as WindowKind
from pipeline.reports.model import (
    FunnelReport,
    HealthReport,
    KpiReport,
    KpiSeries,
    PartitionHealth,
    RetentionReport,
    Unit,
    funnel_report,
    kpi_series,
    retention_report,
)
from pipeline.sinks.warehouse import Warehouse
from pipeline.windows import EARLIEST_MS, window_indices, window_starts

WINDOWS: tuple[WindowKind, ...] = ("1m", "1h", "1d", "1w", "1mo")
COARSENESS: tuple[WindowKind, ...] = ("1d", "1h", "1m", "1w", "1mo")
"""Which window a report takes when none is asked for: the first of these that there is."""


class UnknownName(Exception):
    """A name that the warehouse does not have; the message lists those it has."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Filters that every report understands. begin, end: aware, half-open, of a window's or cohort's start; segment: None for all together."""

    begin: datetime | None = None
    end: datetime | None = None
    segment: str | None = None
    limit: int | None = None


def of_shop(warehouse: Warehouse, definitions: Definitions) -> Definitions:
    """The definitions with the zone and the currency that the warehouse's windows were made with, whatever file is at hand."""
    settings = {str(setting): str(value) for setting, value in warehouse.query("SELECT setting, value FROM current_shop")}
    return replace(
        definitions,
        time_zone=settings.get("time_zone", definitions.time_zone),
        currency=settings.get("currency", definitions.currency),
    )


def funnel_names(warehouse: Warehouse) -> list[str]:
    """Names in the order of the alphabet; those installed last, removed ones not."""
    return [str(name) for (name,) in warehouse.query("SELECT DISTINCT funnel FROM current_funnels ORDER BY funnel")]


def retention_names(warehouse: Warehouse) -> list[str]:
    return [str(name) for (name,) in warehouse.query("SELECT DISTINCT retention FROM current_retentions ORDER BY retention")]


def check_name(kind: str, name: str, known: Sequence[str]) -> None:
    """Raises UnknownName unless `name` is one of `known`."""
    if name in known:
        return
    if not known:
        raise UnknownName(f"there is no {kind} {name!r}: this warehouse has none")
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UnknownName(f"there is no {kind} {name!r}: {hint}there are {', '.join(known)}")


# --- funnel -------------------------------------------------------------------------------------------------------------------


def funnel(warehouse: Warehouse, definitions: Definitions, name: str, asked: Asked) -> FunnelReport:
    """One funnel, its entry windows added up. Raises UnknownName for the funnel or the segment."""
    steps = warehouse.query(
        "SELECT step, any(step_name) FROM (SELECT funnel, definition, step, step_name FROM catalog_funnels WHERE step > 0) AS cells "
        "ALL INNER JOIN (SELECT * FROM current_funnels) AS current_funnels USING (funnel, definition) "
        "WHERE funnel = %(name)s GROUP BY step ORDER BY step",
        {"name": name},
    )
    if not steps:
        check_name("funnel", name, funnel_names(warehouse))
    where, values = _where("window_start", asked)
    rows = warehouse.query(
        f"SELECT window_start, segment, step, users, final FROM funnel_report WHERE funnel = %(name)s{where}",  # noqa: S608 our own text
        {"name": name, **values},
    )
    rows = _of_segment(warehouse, "funnel", name, rows, asked)
    starts = sorted({row[0] for row in rows})
    starts = starts[-asked.limit :] if asked.limit else starts
    times = _times(warehouse, name, starts[0], starts[-1], asked.segment) if starts else []
    names = [str(step) for _, step in steps]
    return funnel_report(name, definitions.time_zone, asked.segment, rows, times, names, _optional(definitions, name, names), asked.limit)


def _optional(definitions: Definitions, name: str, steps: list[str]) -> list[bool]:
    """Which steps may be left out. Only the definitions know; others than those installed have other steps, and then say nothing."""
    known = next((funnel.steps for funnel in definitions.funnels if funnel.name == name), ())
    return [step.optional for step in known] if [step.name for step in known] == steps else [False] * len(steps)


def _times(warehouse: Warehouse, name: str, first: datetime, last: datetime, segment: str | None) -> list[tuple[int, int, int]]:
    """(level, upper bound in ms, users) of the time that users took to their deepest step."""
    of_segment = "" if segment is None else " AND segment = %(segment)s"
    rows = warehouse.query(
        "SELECT level, bucket, sum(n) FROM ("  # noqa: S608 our own text
        "SELECT definition, window_start, segment, level, bucket, partition, argMax(value, version) AS n FROM funnel_cells "
        "WHERE definition IN (SELECT definition FROM current_funnels WHERE funnel = %(name)s) AND funnel = %(name)s "
        f"AND window_start >= %(first)s AND window_start <= %(last)s{of_segment} "
        "GROUP BY definition, window_start, segment, level, bucket, partition) WHERE n > 0 GROUP BY level, bucket",
        {"name": name, "first": first, "last": last, "segment": segment},
    )
    bounds = {int(bucket): int(upper) for bucket, upper in warehouse.query("SELECT bucket, upper_ms FROM histogram_bounds")} if rows else {}
    return [(int(level), bounds.get(int(bucket), 0), int(users)) for level, bucket, users in rows]


def _of_segment(warehouse: Warehouse, kind: str, name: str, rows: list[tuple[Any, ...]], asked: Asked) -> list[tuple[Any, ...]]:
    """Rows whose second column is the segment asked for. An unknown one is told from one that is empty in this time."""
    if asked.segment is None:
        return rows
    chosen = [row for row in rows if row[1] == asked.segment]
    if not chosen:
        known = warehouse.query(f"SELECT DISTINCT segment FROM {kind}_report WHERE {kind} = %(name)s ORDER BY segment", {"name": name})  # noqa: S608
        texts = [str(text) for (text,) in known]
        if set(texts) <= {""}:
            raise UnknownName(f"{kind} {name!r} has no segments: give its definition a breakdown, or leave --segment out")
        check_name(f"segment of {kind} {name!r} called", asked.segment, texts)
    return chosen


def _where(column: str, asked: Asked) -> tuple[str, dict[str, datetime]]:
    conditions, values = "", {}
    if asked.begin is not None:
        conditions, values["begin"] = conditions + f" AND {column} >= %(begin)s", asked.begin
    if asked.end is not None:
        conditions, values["end"] = conditions + f" AND {column} < %(end)s", asked.end
    return conditions, values


# --- retention ----------------------------------------------------------------------------------------------------------------


def retention(warehouse: Warehouse, definitions: Definitions, name: str, asked: Asked) -> RetentionReport:
    """One retention's cohorts. Raises UnknownName for the retention or the segment."""
    current = warehouse.query("SELECT period_unit, periods FROM current_retentions WHERE retention = %(name)s", {"name": name})
    if not current:
        check_name("retention", name, retention_names(warehouse))
    where, values = _where("cohort_start", asked)
    rows = warehouse.query(
        "SELECT cohort_start, segment, period, users, users_on_or_after, value, final FROM retention_report "  # noqa: S608 our own text
        f"WHERE retention = %(name)s{where}",
        {"name": name, **values},
    )
    rows = _of_segment(warehouse, "retention", name, rows, asked)
    period, last = str(current[0][0]), int(current[0][1])
    over = {(start, segment) for start, segment, n, *_, final in rows if int(n) == last and final}  # nobody of these can come back any more
    shaped = [(start, *row, final, (start, segment) in over) for start, segment, *row, final in rows]
    return retention_report(name, definitions.time_zone, asked.segment, period, shaped, asked.limit)


# --- kpis ---------------------------------------------------------------------------------------------------------------------


def kpi_windows(warehouse: Warehouse, name: str | None) -> list[str]:
    """The windows that have numbers, of one KPI or of any, in the order in which a report prefers them."""
    found = _distinct(warehouse, "window", name)
    return [window for window in COARSENESS if window in found]


def kpi_dimensions(warehouse: Warehouse, name: str) -> list[str]:
    return sorted(_distinct(warehouse, "dimension", name) - {""})


def _distinct(warehouse: Warehouse, column: str, name: str | None) -> set[str]:
    """Values of a column of the stored numbers that a KPI is made of. Asked of the cells: the view would compute every number there is."""
    if name is None:
        return {str(value) for (value,) in warehouse.query(f"SELECT DISTINCT {column} FROM kpi_cells")}  # noqa: S608 our own text
    legs = warehouse.query("SELECT kind, left_kpi, right_kpi FROM current_kpis WHERE kpi = %(name)s", {"name": name})
    stored = [leg for kind, *sides in legs for leg in (sides if kind == "formula" else [name])]
    if not stored:
        return set()
    rows = warehouse.query(f"SELECT DISTINCT {column} FROM kpi_cells WHERE kpi IN %(stored)s", {"stored": stored})  # noqa: S608 our own text
    return {str(value) for (value,) in rows}


def kpis(
    warehouse: Warehouse,
    definitions: Definitions,
    name: str | None,
    window: WindowKind | None,
    dimension: str,
    asked: Asked,
    most: int | None = None,
) -> KpiReport:
    """All KPIs, or one, over the newest `asked.limit` windows; by the values of `dimension`, the `most` largest of them.

    Raises UnknownName for a KPI, window, dimension or value (`asked.segment`) that has no numbers.
    """
    kinds = {
        str(kpi): (str(kind), str(operator)) for kpi, kind, operator in warehouse.query("SELECT kpi, kind, operator FROM current_kpis")
    }
    if name is not None:
        check_name("KPI", name, sorted(kinds))
    windows = kpi_windows(warehouse, name)
    if window is None:
        window = windows[0] if windows else "1d"  # type: ignore[assignment]
    elif windows and window not in windows:
        raise UnknownName(f"{name or 'no KPI'} has {'no ' if name else ''}windows of {window}: there are {', '.join(windows)}")
    if dimension and name is not None and dimension not in (known := kpi_dimensions(warehouse, name)):
        there = f"there are {', '.join(known)}" if known else "it has none; give its definition dimensions"
        raise UnknownName(f"KPI {name!r} has no dimension {dimension!r}: {there}")
    assert window is not None
    newest = warehouse.query("SELECT largest FROM watermarks")
    largest = int(newest[0][0]) if newest else 0
    begin = _begin(window, definitions.time_zone, asked, largest)
    where, values = _where("window_start", Asked(begin, asked.end))
    if name is not None:
        where, values = where + " AND kpi = %(name)s", {**values, "name": name}  # type: ignore[dict-item]
    rows = warehouse.query(
        "SELECT kpi, currency, dimension_value, window_start, value, final FROM kpi_report "  # noqa: S608 our own text
        f"WHERE window = %(window)s AND dimension = %(dimension)s{where}",
        {"window": window, "dimension": dimension, **values},
    )
    if asked.segment is not None:
        rows = _of_value(rows, name, dimension, asked.segment)
    series = _series(rows, definitions, kinds, window, asked, largest)
    if dimension:
        series.sort(key=lambda s: (-max((abs(p.value) for p in s.points if p.value is not None), default=Decimal(0)), s.dimension_value))
    return KpiReport(definitions.time_zone, window, dimension, tuple(series[:most] if most else series), len(series))


def _begin(window: WindowKind, time_zone: str, asked: Asked, largest: int) -> datetime | None:
    """The start of the oldest window that `limit` lets in, so that years of minutes are not read for the last hour."""
    if asked.limit is None:
        return asked.begin
    end = _ms(asked.end) - 1 if asked.end is not None else largest
    at = int(window_indices(window, time_zone, _array([max(EARLIEST_MS, min(end, largest))]))[0])
    oldest = _moment(int(window_starts(window, time_zone, _array([max(0, at - (asked.limit - 1))]))[0]))
    return max(oldest, asked.begin) if asked.begin is not None else oldest


def _of_value(rows: list[tuple[Any, ...]], name: str | None, dimension: str, wanted: str) -> list[tuple[Any, ...]]:
    if not dimension:
        raise UnknownName("--segment of a KPI is a value of a dimension: say which, like --dimension device --segment mobile")
    chosen = [row for row in rows if row[2] == wanted]
    if not chosen and rows:
        check_name(f"{dimension} called", wanted, sorted({str(row[2]) for row in rows}))
    return chosen


def _series(
    rows: list[tuple[Any, ...]],
    definitions: Definitions,
    kinds: dict[str, tuple[str, str]],
    window: WindowKind,
    asked: Asked,
    largest: int,
) -> list[KpiSeries]:
    zone = ZoneInfo(definitions.time_zone)
    known: dict[tuple[str, str, str], dict[datetime, tuple[Decimal, bool]]] = {}
    for kpi, currency, value, start, number, final in rows:
        known.setdefault((str(kpi), str(value), str(currency)), {})[start.astimezone(zone)] = (Decimal(number), bool(final))
    if not known:
        return []
    grid = _grid(window, definitions.time_zone, min(start for of in known.values() for start in of), asked, largest)
    order = {kpi.name: i for i, kpi in enumerate(definitions.kpis)}

    def place(key: tuple[str, str, str]) -> tuple[int, str, bool, str, str]:
        """As in the definitions; of several currencies the shop's first."""
        return order.get(key[0], len(order)), key[0], key[2] != definitions.currency, key[2], key[1]

    by_name = {kpi.name: kpi for kpi in definitions.kpis}
    return [
        kpi_series(
            kpi,
            _unit(kpi, currency, kinds, by_name),
            currency,
            value,
            of,
            grid,
            kinds.get(kpi, ("", ""))[1] != "/" and kinds[kpi][0] != "quantile",
        )
        for (kpi, value, currency), of in sorted(known.items(), key=lambda item: place(item[0]))
    ]


def _grid(window: WindowKind, time_zone: str, first: datetime, asked: Asked, largest: int) -> list[tuple[datetime, bool]]:
    """Every window from `first` to the one that holds the newest event (or that ends the time asked for), and whether it has ended."""
    zone = ZoneInfo(time_zone)
    end = min(largest, _ms(asked.end) - 1) if asked.end is not None else largest
    bounds = window_indices(window, time_zone, _array([_ms(first), max(end, _ms(first))]))
    numbers = list(range(int(bounds[0]), int(bounds[1]) + 2))
    if asked.limit:
        numbers = numbers[-asked.limit - 1 :]
    starts = [int(s) for s in window_starts(window, time_zone, _array(numbers))]
    return [(datetime.fromtimestamp(s / 1000, zone), after <= largest) for s, after in pairwise(starts)]


def _unit(name: str, currency: str, kinds: dict[str, tuple[str, str]], known: dict[str, Kpi]) -> Unit:
    kind, operator = kinds.get(name, ("", ""))
    kpi = known.get(name)
    if kind == "quantile" or (kpi is not None and kpi.aggregate == "dwell"):
        return "duration"
    if operator == "/":
        left, right = (known.get(side) for side in (kpi.left, kpi.right)) if kpi is not None else (None, None)
        return (
            "duration" if left and left.aggregate == "dwell" and right and right.aggregate != "dwell" else "money" if currency else "ratio"
        )
    return "money" if currency else "count"


# --- health -------------------------------------------------------------------------------------------------------------------


def health(warehouse: Warehouse, time_zone: str, now: datetime) -> HealthReport:
    """Progress of every source topic partition, and rejects by reason."""
    zone = ZoneInfo(time_zone)
    columns = ("next_offset", "watermark", "applied", "duplicates", "rejected", "too_late", "rekeyed")
    rows = warehouse.query(f"SELECT topic, partition, {', '.join(columns)} FROM current_progress ORDER BY topic, partition")  # noqa: S608
    partitions = tuple(
        PartitionHealth(str(topic), int(p), int(offset), datetime.fromtimestamp(mark / 1000, zone) if mark else None, *map(int, counts))
        for topic, p, offset, mark, *counts in rows
    )
    reasons = warehouse.query(
        "SELECT reason, uniqExact(topic, partition, offset) AS n FROM rejects GROUP BY reason ORDER BY n DESC, reason"
    )
    return HealthReport(time_zone, partitions, now.astimezone(zone), tuple((str(reason), int(n)) for reason, n in reasons))


def _ms(when: datetime) -> int:
    return round(when.timestamp() * 1000)


def _moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)


def _array(values: list[int]) -> Any:
    import numpy as np

    return np.array(values, np.int64)
