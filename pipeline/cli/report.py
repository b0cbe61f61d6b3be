"""`shopstream report`: funnels, retention, KPIs and health from the warehouse, for the terminal or for a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.cli.clients import Wrong
from pipeline.cli.reading import (
    CsvOption,
    JsonOption,
    WarehouseOption,
    WatchOption,
    check_output,
    parse_span,
    plain_console,
    reading,
    warehouse_url,
    watch_screen,
    watch_text,
    write,
)
from pipeline.definitions import Definitions
from pipeline.definitions_file import load
from pipeline.reports import export, queries, render
from pipeline.reports.model import FunnelReport, HealthReport, KpiReport, RetentionReport
from pipeline.reports.queries import Asked
from pipeline.settings import load_settings
from pipeline.sinks.warehouse import Warehouse

app = typer.Typer(
    no_args_is_help=True,
    help="Funnels, retention, KPIs and health from the warehouse. ~ marks what an event may still change.",
    rich_markup_mode=None,
)
COHORTS = 12
WINDOWS_SHOWN = 30
MOST = 10_000

FromOption = Annotated[str | None, typer.Option("--from", help="First day (or time) in the shop's zone, included.", metavar="DATE")]
ToOption = Annotated[str | None, typer.Option("--to", help="End, not included.", metavar="DATE")]
Reports = Sequence[export.Report]


@dataclass(frozen=True, slots=True)
class Output:
    """How a report leaves: at most one of json, csv; watch in seconds."""

    json: bool
    csv: bool
    watch: float | None


@app.command()
def funnel(
    name: Annotated[str | None, typer.Option(help="One funnel; all of them if not given.", metavar="FUNNEL")] = None,
    segment: Annotated[str | None, typer.Option(help="One value of the funnel's breakdown.")] = None,
    begin: FromOption = None,
    end: ToOption = None,
    limit: Annotated[int | None, typer.Option(min=1, max=MOST, help="Only so many of the newest entry windows.")] = None,
    warehouse: WarehouseOption = None,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
    watch: WatchOption = None,
) -> None:
    """Users of each step, their share of the first and of the previous step, and the time they took.

    A user counts once in each entry window (the funnel's definition says how long one is); windows are added up.
    ▼ stands where most are lost.

    Example: shopstream report funnel --name checkout --from 2026-03-01 --to 2026-04-01 --segment email
    """

    def ask(opened: Warehouse, definitions: Definitions) -> list[FunnelReport]:
        asked = _asked(definitions, begin, end, segment, limit)
        names = _names("funnel", name, queries.funnel_names(opened), [f.name for f in definitions.funnels])
        return [queries.funnel(opened, definitions, one, asked) for one in names]

    _answer(warehouse, Output(as_json, as_csv, watch), FunnelReport, ask, _each(render.funnel_panel))


@app.command()
def retention(
    name: Annotated[str | None, typer.Option(help="One retention; all of them if not given.", metavar="RETENTION")] = None,
    segment: Annotated[str | None, typer.Option(help="One value of the retention's breakdown.")] = None,
    begin: FromOption = None,
    end: ToOption = None,
    reading_: Annotated[
        Literal["in", "after"], typer.Option("--reading", help="Came back in the period, or in it or any later one.", case_sensitive=False)
    ] = "in",
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="So many of the newest cohorts.")] = COHORTS,
    warehouse: WarehouseOption = None,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
    watch: WatchOption = None,
) -> None:
    """Which share of the users that came first in a day, week or month came back in each later one.

    The last line is over all cohorts whose period is final. --from and --to choose cohorts.

    Example: shopstream report retention --name first_visit --limit 20 --csv > retention.csv
    """

    def ask(opened: Warehouse, definitions: Definitions) -> list[RetentionReport]:
        asked = _asked(definitions, begin, end, segment, limit)
        names = _names("retention", name, queries.retention_names(opened), [r.name for r in definitions.retentions])
        return [queries.retention(opened, definitions, one, asked) for one in names]

    draw = _each(partial(render.retention_heatmap, reading=reading_))
    _answer(warehouse, Output(as_json, as_csv, watch), RetentionReport, ask, draw)


@app.command()
def kpi(
    name: Annotated[str | None, typer.Option(help="One KPI, drawn as a chart; all of them if not given.", metavar="KPI")] = None,
    window: Annotated[
        Literal["1m", "1h", "1d", "1w", "1mo"] | None, typer.Option(help="Size of the windows; 1d if there are such.", show_default=False)
    ] = None,
    dimension: Annotated[str | None, typer.Option(help="By the values of a dimension, like channel or device.")] = None,
    segment: Annotated[str | None, typer.Option(help="One value of the dimension.")] = None,
    begin: FromOption = None,
    end: ToOption = None,
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="So many of the newest windows.")] = WINDOWS_SHOWN,
    top: Annotated[int, typer.Option(min=1, max=MOST, help="So many values of the dimension, the largest.")] = 20,
    warehouse: WarehouseOption = None,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
    watch: WatchOption = None,
) -> None:
    """The newest window that has ended, its change against the one before, the one that is running, and the trend.

    Money is kept a currency at a time. A window without an event counts 0; a ratio has no value then.

    Example: shopstream report kpi --name gmv --window 1d --dimension channel
    Example: shopstream report kpi --window 1m --limit 60 --watch 2
    """
    if segment is not None and dimension is None:
        raise Wrong("--segment of a KPI is a value of a dimension: say which, like --dimension device --segment mobile")
    if dimension is not None and name is None:
        raise Wrong("--dimension needs one KPI: say which, like --name gmv --dimension channel")

    def ask(opened: Warehouse, definitions: Definitions) -> list[KpiReport]:
        asked = _asked(definitions, begin, end, segment, limit)
        return [queries.kpis(opened, definitions, name, window, dimension or "", asked, top if dimension else None)]

    def draw(reports: Sequence[KpiReport], width: int) -> RenderableType:
        (report,) = reports
        if name is None or not report.series or (dimension and len(report.series) > 1):
            return render.kpi_panel(report, width, name or "")
        parts: list[RenderableType] = []
        for series in report.series:
            parts += [render.kpi_chart(series, report, width), Text()]
        return Group(*parts, *([render.kpi_table(report.series[0], report)] if len(report.series) == 1 and watch is None else []))

    _answer(warehouse, Output(as_json, as_csv, watch), KpiReport, ask, draw)


@app.command()
def health(warehouse: WarehouseOption = None, as_json: JsonOption = False, as_csv: CsvOption = False, watch: WatchOption = None) -> None:
    """How far the warehouse is: per partition the next offset, the watermark and what became of the records; and how fresh it is.

    What the consumers still have before them is in `shopstream doctor`, which asks Kafka.

    Example: shopstream report health --json | jq .health[0].freshness_ms
    """

    def ask(opened: Warehouse, definitions: Definitions) -> list[HealthReport]:
        return [queries.health(opened, definitions.time_zone, datetime.now(UTC))]

    _answer(warehouse, Output(as_json, as_csv, watch), HealthReport, ask, _each(render.health_panel))


def _asked(definitions: Definitions, begin: str | None, end: str | None, segment: str | None, limit: int | None) -> Asked:
    first, last = parse_span(begin, end, definitions.time_zone)
    return Asked(first, last, segment, limit)


def _names(kind: str, name: str | None, there: list[str], order: list[str]) -> list[str]:
    if name is not None:
        queries.check_name(kind, name, there)
        return [name]
    return sorted(there, key=lambda one: (order.index(one) if one in order else len(order), one))


def _each(panel: Callable[[Any, int], RenderableType]) -> Callable[[Any, int], RenderableType]:
    """All reports below each other, a line between them."""

    def draw(reports: Sequence[Any], width: int) -> RenderableType:
        parts: list[RenderableType] = []
        for report in reports:
            parts += [Text(), panel(report, width)] if parts else [panel(report, width)]
        return Group(*parts) if parts else Text("the definitions installed in this warehouse have none")

    return draw


def _answer(
    warehouse: str | None,
    output: Output,
    kind: type[Any],
    ask: Callable[[Warehouse, Definitions], Reports],
    draw: Callable[[Any, int], RenderableType],
) -> None:
    check_output(output.json, output.csv, output.watch)
    settings = load_settings(warehouse=warehouse_url(warehouse))
    file = load(settings.definitions)
    with reading(settings) as opened:

        def answer() -> Reports:
            return ask(opened, queries.of_shop(opened, file))

        if output.csv:
            write(export.to_csv(kind, answer()))
        elif output.json and output.watch is not None:
            watch_text(output.watch, lambda: export.to_json(export.document(answer()), indent=False))
        elif output.json:
            write(export.to_json(export.document(answer())))
        elif output.watch is not None:
            watch_screen(plain_console(), output.watch, answer, draw)
        else:
            console = plain_console()
            console.print(draw(answer(), console.width))
