"""What `run` prints at its end: counts, funnels and retention, read back from the warehouse as `report` reads them."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

from pipeline.definitions import Definitions
from pipeline.reports import queries, render
from pipeline.reports.queries import Asked
from pipeline.sinks.warehouse import Warehouse

COHORTS = 12


def show_summary(console: Console, warehouse: Warehouse, definitions: Definitions, read: int, seconds: float) -> None:
    health = queries.health(warehouse, definitions.time_zone, datetime.now(UTC))
    counts = {
        "applied": "applied",
        "duplicates dropped": "duplicates",
        "rejected": "rejected",
        "too late": "too_late",
        "re-keyed": "rekeyed",
    }
    said = [f"read {read:,}", *(f"{what} {health.total(count):,}" for what, count in counts.items()), f"{seconds:.1f} s"]
    console.print(Text(" · ".join(said)))
    if health.total("too_late"):
        console.print(
            Text(
                f"too late: more than {definitions.lateness_ms // 3_600_000} h behind an event read before; --sort helps files not sorted by time"
            )
        )
    if health.reasons:
        console.print(render.reasons_line(health.reasons))
    for funnel in definitions.funnels:
        console.print(Text(), render.funnel_panel(queries.funnel(warehouse, definitions, funnel.name, Asked()), console.width), sep="\n")
    for retention in definitions.retentions:
        report = queries.retention(warehouse, definitions, retention.name, Asked(limit=COHORTS))
        console.print(Text(), render.retention_heatmap(report, console.width), sep="\n")
