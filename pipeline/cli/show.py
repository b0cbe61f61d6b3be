"""What `run` prints at its end: counts, funnels and retention, read back from the warehouse's views."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.definitions import Definitions, Step

COHORTS = 12
PERIODS = 8


def show_summary(console: Console, warehouse: Any, definitions: Definitions, read: int, seconds: float) -> None:
    counts = warehouse.query(
        "SELECT sum(a), sum(d), sum(r), sum(l), sum(k) FROM (SELECT argMax(applied, version) AS a, argMax(duplicates, version) AS d, "
        'argMax(rejected, version) AS r, argMax(too_late, version) AS l, argMax(rekeyed, version) AS k FROM progress GROUP BY topic, "partition")'
    )[0]
    applied, duplicates, rejected, late, rekeyed = (int(n or 0) for n in counts)
    console.print(
        f"read {read:,} · applied {applied:,} · duplicates dropped {duplicates:,} · rejected {rejected:,} · too late {late:,} · re-keyed {rekeyed:,} · "
        f"{seconds:.1f} s",
        highlight=False,
    )
    reasons = warehouse.query('SELECT reason, uniqExact(topic, "partition", offset) FROM rejects GROUP BY reason ORDER BY 2 DESC')
    if reasons:
        console.print("rejected: " + ", ".join(f"{reason} {int(n):,}" for reason, n in reasons), highlight=False)
    for funnel in definitions.funnels:
        console.print(_funnel(warehouse, funnel.name, funnel.steps))
    for retention in definitions.retentions:
        console.print(_retention(warehouse, retention.name, retention.period, _fitting(console.width)))


def _funnel(warehouse: Any, name: str, steps: tuple[Step, ...]) -> Table:
    rows = warehouse.query(
        "SELECT step, any(step_name), sum(users) FROM funnel_report WHERE funnel = %(name)s GROUP BY step ORDER BY step", {"name": name}
    )
    table = Table(title=f"funnel {name}: users, all entry windows", title_justify="left")
    for column in ("step", "event"):
        table.add_column(column)
    for column in ("users", "of first", "of previous"):
        table.add_column(column, justify="right")
    table.add_column("")
    first = int(rows[0][2]) if rows else 0
    previous = first
    for step, event, users in rows:
        n = int(users)
        bar = "█" * round(18 * n / first) if first else ""
        optional = " (optional)" if steps[int(step) - 1].optional else ""
        table.add_row(str(step), f"{event}{optional}", f"{n:,}", _share(n, first), _share(n, previous), bar)
        previous = n
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _fitting(width: int) -> int:
    """Periods whose columns fit beside cohort and users: 7 characters each after 24."""
    return max(1, min(PERIODS, (width - 24) // 7))


def _retention(warehouse: Any, name: str, period: str, periods: int) -> Table:
    rows = warehouse.query(
        "SELECT cohort_start, period, sum(users) FROM retention_report WHERE retention = %(name)s AND period <= %(last)s "
        "GROUP BY cohort_start, period ORDER BY cohort_start, period",
        {"name": name, "last": periods},
    )
    cohorts: dict[Any, dict[int, int]] = {}
    for start, n, users in rows:
        cohorts.setdefault(start, {})[int(n)] = int(users)
    last = max((n for counts in cohorts.values() for n in counts), default=0)
    title = f"retention {name} by {period}" + (f" (first {COHORTS} of {len(cohorts)} cohorts)" if len(cohorts) > COHORTS else "")
    table = Table(title=title, title_justify="left")
    table.add_column("cohort", no_wrap=True)
    table.add_column("users", justify="right")
    for n in range(1, last + 1):
        table.add_column(str(n), justify="right", no_wrap=True)
    for start, counts in list(cohorts.items())[:COHORTS]:
        size = counts.get(0, 0)
        table.add_row(f"{start:%Y-%m-%d}", f"{size:,}", *(_cell(counts.get(n), size) for n in range(1, last + 1)))
    return table


def _cell(users: int | None, size: int) -> Text:
    if users is None or not size:
        return Text("")
    share = users / size
    return Text(f"{share:.0%}", style=f"on color({22 + round(min(share, 0.5) * 10)})" if users else "dim")
