"""The demo's verdict: every number of the reports against the generator's own answers. `pipeline.cli.demo` calls it when all that was sent is applied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from generator.answers import Answers


@dataclass(frozen=True, slots=True)
class Verdict:
    """numbers: how many were compared. different: (report, key, what it shows, what is true), None for a missing row."""

    numbers: int
    different: tuple[tuple[str, Any, Any, Any], ...]


def verdict(warehouse: Any, answers: Answers, fates: Mapping[str, int]) -> Verdict:
    """Funnels, retention and KPIs in all their windows and segments, and what became of the events."""
    found = _reports(warehouse)
    true: dict[str, dict[Any, Any]] = {
        "funnel": dict(answers.funnels()),
        "retention": dict(answers.retentions()),
        "kpi": dict(answers.kpis()),
        "events": {
            "applied": answers.facts,
            "duplicates": fates.get("duplicate", 0),
            "rejected": fates.get("bad", 0),
            "too late": fates.get("too_late", 0),
        },
    }
    numbers, different = 0, []
    for report, wanted in true.items():
        rows = found[report]
        for key in {**wanted, **rows}:
            numbers += 1
            if rows.get(key) != wanted.get(key):
                different.append((report, key, rows.get(key), wanted.get(key)))
    return Verdict(numbers, tuple(different))


def _reports(warehouse: Any) -> dict[str, dict[Any, Any]]:
    funnels = warehouse.query("SELECT funnel, window_start, segment, step, users FROM funnel_report")
    retentions = warehouse.query("SELECT retention, cohort_start, segment, period, users, users_on_or_after FROM retention_report")
    kpis = warehouse.query("SELECT kpi, window, window_start, dimension, dimension_value, currency, value FROM kpi_report")
    return {
        "funnel": {(name, _ms(start), segment, int(step)): int(users) for name, start, segment, step, users in funnels},
        "retention": {
            (name, _ms(start), segment, int(n)): tuple(map(int, users)) for name, start, segment, n, *users in retentions if any(users)
        },
        "kpi": {(name, window, _ms(start), *of): value for name, window, start, *of, value in kpis},
        "events": event_counts(warehouse),
    }


def event_counts(warehouse: Any) -> dict[str, int]:
    """applied, duplicates, rejected, too late: of all source partitions together."""
    rows = warehouse.query("SELECT applied, duplicates, rejected, too_late FROM current_progress")
    total: Counter[str] = Counter()
    for row in rows:
        total.update(dict(zip(("applied", "duplicates", "rejected", "too late"), map(int, row), strict=True)))
    return {name: total[name] for name in ("applied", "duplicates", "rejected", "too late")}


def _ms(when: datetime) -> int:
    return int(when.timestamp()) * 1000
