"""The demo's screen for a given size, and its plain lines where there is no terminal. Pure: a `Snapshot` in, renderables and text out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.cli.demo_look import RECENT_HOURS, Number, Snapshot
from pipeline.reports.model import KpiReport, KpiSeries, RetentionReport, Unit
from pipeline.reports.render import FAINT, funnel_panel, kpi_chart, retention_heatmap, sparkline

WIDE = 130
"""Columns from which funnel and retention stand side by side."""
PERIODS = 14
ROOMY = 100
"""Columns from which the footer says more than how to end and the numbers."""
LABELS, CELL = 22, 5
"""Columns of a heat map before its periods, and of each."""
HEAT = LABELS + PERIODS * CELL
TILE = 12
CHART = 6
ORDINALS = {2: "second", 3: "third"}
PAYMENTS_FAIL = 0.25
PAGES_FAIL = 0.03
SUMMARY_LINES = 20
ENOUGH = 20
"""Attempts below which a share says nothing."""

Tile = tuple[str, Callable[[Snapshot], str], str]
"""Label, value, and the KPI whose hours make its trend."""


def _count(kpi: str) -> Callable[[Snapshot], str]:
    return lambda snapshot: f"{snapshot.numbers[kpi].today:,.0f}"


def _percent(part: float | None) -> str:
    return "–" if part is None else f"{part:.1%}"


TILES: tuple[Tile, ...] = (
    ("GMV today", lambda s: f"{s.numbers['gmv'].today:,.0f} EUR", "gmv"),
    ("orders", _count("orders"), "orders"),
    ("active users", _count("active_users"), "active_users"),
    ("sessions", _count("sessions"), "sessions"),
    ("pay failures", lambda s: _percent(s.share("payment_failures", "payment_attempts")), "payment_failures"),
    ("page errors", lambda s: _percent(s.share("page_errors", "pages")), "page_errors"),
    ("buyers", _count("buyers"), "buyers"),
    ("conversion", lambda s: f"{s.numbers['conversion'].today:.1%}", "conversion"),
    ("bounce rate", lambda s: f"{s.numbers['bounce_rate'].today:.1%}", "bounce_rate"),
    ("sign-ups", _count("sign_ups"), "sign_ups"),
)


def screen(snapshot: Snapshot, width: int, height: int) -> RenderableType:
    """Everything on `width` × `height` characters: what matters most is never cut."""
    head = [_header(snapshot, width), *_tiles(snapshot, width), Text()]
    foot = [_alerts_or_metrics(snapshot), _footer(snapshot, width)]
    room = height - _lines([*head, *foot], width)
    body = _side_by_side(snapshot, width, room) if width >= WIDE else _stacked(snapshot, width, room)
    blank = [Text()] * max(0, room - _lines([body], width))
    return Group(*head, body, *blank, *foot)


def _stacked(snapshot: Snapshot, width: int, room: int) -> RenderableType:
    funnel = funnel_panel(snapshot.funnel, width, segments=0)
    left = room - _lines([funnel], width) - 1
    return Group(funnel, Text(), _heat_map(snapshot.visitors, width, left)) if left >= 5 else funnel


def _side_by_side(snapshot: Snapshot, width: int, room: int) -> RenderableType:
    left = max(width - HEAT - 4, 60)
    right = width - left - 4
    table = Table.grid(padding=(0, 4, 0, 0))
    table.add_column(width=left)
    table.add_column(width=right)
    table.add_row(Group(*_funnel_and_charts(snapshot, left, room)), Group(*_heat_maps(snapshot, right, room)))
    return table


def _funnel_and_charts(snapshot: Snapshot, width: int, room: int) -> list[RenderableType]:
    parts = [funnel_panel(snapshot.funnel, width, 0 if room < 16 else 6)]
    for kpi in ("gmv", "payment_failures", "page_errors"):
        points = snapshot.numbers[kpi].hours
        unit: Unit = "money" if kpi == "gmv" else "count"
        series = KpiSeries(kpi, unit, "EUR" if kpi == "gmv" else "", "", points)
        chart = kpi_chart(series, KpiReport("UTC", "1h", "", (series,), 1), width, CHART)
        if _lines([*parts, Text(), chart], width) <= room:
            parts += [Text(), chart]
    return parts


def _heat_maps(snapshot: Snapshot, width: int, room: int) -> list[RenderableType]:
    """Visitors, and buyers where both have room for a dozen cohorts."""
    if room < 34:
        return [_heat_map(snapshot.visitors, width, room)]
    upper = _heat_map(snapshot.visitors, width, room // 2)
    return [upper, Text(), _heat_map(snapshot.buyers, width, room - _lines([upper], width) - 1)]


def _heat_map(report: RetentionReport, width: int, room: int) -> RenderableType:
    """The cohorts that are young enough to have a share to come; where they don't fit, every second one, every third …"""
    periods = min(PERIODS, max(1, (width - LABELS) // CELL))
    found = [replace(cohort, cells=cohort.cells[: periods + 1]) for cohort in report.cohorts[-periods - 1 :]]
    for step in range(1, len(found) + 1):
        shown = tuple(found[::-1][::step][::-1])
        name = report.name if step == 1 else f"{report.name}, every {ORDINALS.get(step, f'{step}th')} day"
        drawn = retention_heatmap(replace(report, name=name, cohorts=shown, found=len(shown)), width)
        if _lines([drawn], width) <= room:
            return drawn
    return Text()


def _lines(parts: Iterable[RenderableType], width: int) -> int:
    console = Console(width=width, height=200, color_system=None)
    return len(console.render_lines(Group(*parts), console.options.update(width=width), pad=False))


def _header(snapshot: Snapshot, width: int) -> Text:
    facts = [
        Text("shopstream", "bold cyan"),
        Text(f"{snapshot.clock:%a %Y-%m-%d %H:%M}", "bold"),
        Text(f"{snapshot.events_per_second:,.0f} events/s"),
        Text(f"lag {snapshot.lag:,}"),
        Text("fresh –" if snapshot.fresh_seconds is None else f"fresh {snapshot.fresh_seconds:.1f} s"),
        Text(f"1 day = {snapshot.day_seconds:.0f} s", FAINT),
        Text(f"{snapshot.sent:,} events", FAINT),
    ]
    return _flowing(facts, width, " · ")


def _footer(snapshot: Snapshot, width: int) -> Text:
    facts = [
        Text("Ctrl-C ends", FAINT),  # first: what does not fit is left out
        Text(f"{'late, corrected' if width >= ROOMY else 'late'} {snapshot.late:,}"),
        Text(f"duplicates {snapshot.duplicates:,}"),
        Text(f"rejected {snapshot.rejected:,}"),
        Text(f"too late {snapshot.too_late:,}"),
    ]
    return _flowing(facts, width, " · ")


def _alerts_or_metrics(snapshot: Snapshot) -> Text:
    """What is wrong; while nothing is, where to look closer."""
    where = "  ".join(snapshot.metrics)
    return Text("  ", no_wrap=True).join(alerts(snapshot)) or Text(f"metrics at {where}" * bool(where), FAINT, no_wrap=True)


def alerts(snapshot: Snapshot) -> Iterable[Text]:
    """What on-call would be told, by the reports' numbers alone."""
    for _, what in _alarms(snapshot):
        yield Text(f"▲ {what} in the last {RECENT_HOURS} h", "bold red")


def _alarms(snapshot: Snapshot) -> Iterable[tuple[str, str]]:
    """(KPI, what is wrong)."""
    payments = snapshot.share("payment_failures", "payment_attempts")
    pages = snapshot.share("page_errors", "pages")
    if payments is not None and payments > PAYMENTS_FAIL and snapshot.numbers["payment_attempts"].recent >= ENOUGH:
        yield "payment_failures", f"payments fail: {payments:.0%}"
    if pages is not None and pages > PAGES_FAIL and snapshot.numbers["pages"].recent >= ENOUGH:
        yield "page_errors", f"pages fail: {pages:.1%}"


def _tiles(snapshot: Snapshot, width: int) -> list[Text]:
    """A row of label, value and trend."""
    shown = TILES[: max(1, (width + 1) // (TILE + 1))]
    each = min(24, (width + 1) // len(shown) - 1)
    rows = [Text(no_wrap=True) for _ in range(3)]
    alarmed = {kpi for kpi, _ in _alarms(snapshot)}
    for label, value, kpi in shown:
        style = "bold red" if kpi in alarmed else "bold"
        for row, cell in zip(rows, (Text(label, FAINT), Text(value(snapshot), style), _trend(snapshot.numbers[kpi], each)), strict=True):
            cell.truncate(each, pad=True)
            row.append_text(cell).append(" ")
    return rows


def _trend(number: Number, width: int) -> Text:
    """Hour by hour; the running hour is faint."""
    return sparkline([replace(point, final=point.ended) for point in number.hours[-width:]], width)


def _flowing(parts: list[Text], width: int, between: str) -> Text:
    """As many parts as fit in a line."""
    line = Text(no_wrap=True)
    for part in parts:
        if line.cell_len + part.cell_len + (len(between) if line.cell_len else 0) > width:
            break
        if line.cell_len:
            line.append(between, FAINT)
        line.append_text(part)
    return line


def summary(snapshot: Snapshot, width: int) -> RenderableType:
    """What stays on the terminal when the screen is gone."""
    return Group(funnel_panel(snapshot.funnel, width), Text(), _heat_map(snapshot.visitors, width, SUMMARY_LINES), Text())


def plain_line(snapshot: Snapshot) -> str:
    """The same in one line, for a file or a pipe."""
    numbers = snapshot.numbers
    parts = [
        f"{snapshot.clock:%Y-%m-%d %H:%M}",
        f"{snapshot.sent:,} events ({snapshot.events_per_second:,.0f}/s, lag {snapshot.lag:,})",
        f"today: GMV {numbers['gmv'].today:,.2f} EUR, {numbers['orders'].today:,.0f} orders, {numbers['active_users'].today:,.0f} active users, "
        f"{numbers['sessions'].today:,.0f} sessions",
        *(alert.plain for alert in alerts(snapshot)),
    ]
    return " · ".join(parts)


def plain_reports(snapshot: Snapshot) -> list[str]:
    """Funnel and retention in a line each."""
    steps = " → ".join(
        f"{step.name} {step.users:,}" + (f" ({step.of_previous:.0%})" if step.of_previous is not None else "")
        for step in snapshot.funnel.steps
    )
    shares = ((n, snapshot.visitors.share(n)) for n in (1, 2, 3, 7, 14))
    back = ", ".join(f"day {n} {share:.1%}" for n, share in shares if share is not None)
    return [f"funnel of {len(snapshot.funnel.windows)} days: {steps}", *([f"back after their first visit: {back}"] if back else [])]
