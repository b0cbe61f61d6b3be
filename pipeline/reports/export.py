"""Reports for programs: one JSON document, or CSV with one row a window (or cohort and period). Times are ISO 8601 with their offset. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from pipeline.reports.model import FunnelReport, HealthReport, KpiReport, RetentionReport

Report = FunnelReport | RetentionReport | KpiReport | HealthReport
_encoder = msgspec.json.Encoder(decimal_format="number")


def to_json(document: Any, indent: bool = True) -> str:
    """Models, or dicts of them, as JSON; decimals are exact numbers."""
    encoded = _encoder.encode(document)
    return (msgspec.json.format(encoded, indent=2) if indent else encoded).decode()


def document(reports: Sequence[Report]) -> dict[str, Any]:
    """What `--json` gives: the models as they are, under the kind of report, with `so_far` (cells or windows that may still change)."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for report in reports:
        kind, extra = _extra(report)
        by_kind.setdefault(kind, []).append({**_fields(report), **extra})
    return by_kind


def _extra(report: Report) -> tuple[str, dict[str, Any]]:
    match report:
        case FunnelReport():
            return "funnels", {"conversion": report.conversion, "so_far": report.so_far, "final": not report.so_far}
        case RetentionReport():
            return "retentions", {"so_far": report.so_far, "final": not report.so_far}
        case KpiReport():
            return "kpis", {}
        case HealthReport():
            return "health", {"watermark": report.watermark, "freshness_ms": report.freshness_ms}


def _fields(report: Report) -> dict[str, Any]:
    return {name: getattr(report, name) for name in report.__dataclass_fields__}


HEADERS: dict[type[Any], tuple[str, ...]] = {
    FunnelReport: ("funnel", "segment", "window_start", "step", "step_name", "users", "of_first", "of_previous", "final"),
    RetentionReport: ("retention", "segment", "cohort_start", "period", "users", "share", "users_on_or_after", "value", "final"),
    KpiReport: ("kpi", "window", "window_start", "dimension", "dimension_value", "currency", "value", "ended", "final"),
    HealthReport: ("topic", "partition", "next_offset", "watermark", "applied", "duplicates", "rejected", "too_late", "rekeyed"),
}


def to_csv(kind: type[Any], reports: Iterable[Report]) -> str:
    """A header and the rows of every report; true and false are 1 and 0, what has no value is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADERS[kind])
    for report in reports:
        writer.writerows([_cell(value) for value in row] for row in _rows(report))
    return out.getvalue()


def _rows(report: Report) -> Iterable[tuple[Any, ...]]:
    match report:
        case FunnelReport():
            for window in report.windows:
                for i, (step, users) in enumerate(zip(report.steps, window.users, strict=True)):
                    first, previous = window.users[0], window.users[i - 1] if i else 0
                    shares = (users / first if first else None, users / previous if previous else None)
                    yield report.name, report.segment, window.start, step.number, step.name, users, *shares, window.final
        case RetentionReport():
            for cohort in report.cohorts:
                for n, cell in enumerate(cohort.cells):
                    counts = (cell.users, cohort.share(n), cell.on_or_after, cell.value)
                    yield report.name, report.segment, cohort.start, n, *counts, cell.final
        case KpiReport():
            for series in report.series:
                for point in series.points:
                    labels = (report.dimension, series.dimension_value, series.currency)
                    yield series.name, report.window, point.start, *labels, point.value, point.ended, point.final
        case HealthReport():
            for partition in report.partitions:
                yield tuple(getattr(partition, name) for name in HEADERS[HealthReport])


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return f"{value:.6f}"
    return value.isoformat() if hasattr(value, "isoformat") else value
