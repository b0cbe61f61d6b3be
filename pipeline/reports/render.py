"""Models as Rich renderables for a given width: bars, a heat map, sparklines, a chart. Pure: no clock, no warehouse, no terminal.

Everything that colour says is also in the text, so that it reads in a file or a pipe. Called by the commands and the live demo.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.reports.model import Cohort, FunnelReport, FunnelStep, HealthReport, KpiPoint, KpiReport, KpiSeries, RetentionReport
from pipeline.reports.text import NOTHING, SO_FAR, change, duration, moment, safe, share, value

BAR = "cyan"
FAINT = "bright_black"
WIDE = 100
"""Columns from which a funnel shows times."""
WIDE_HEALTH = 120
"""Columns from which all of a partition's counts are shown."""
SHARE_WIDTH = 8

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = " ▁▂▃▄▅▆▇█"
_CELL = 5
_RAMP = ((68, 57, 130), (49, 104, 142), (33, 145, 140), (53, 183, 121), (144, 215, 67), (253, 231, 37))
"""Dark violet to yellow (after viridis): each step is lighter than the one before, and reads on light and dark terminals and without colour vision."""


# --- funnel -------------------------------------------------------------------------------------------------------------------


def funnel_panel(report: FunnelReport, width: int, segments: int = 8) -> RenderableType:
    """Users of each step as bars, with their share of the first and of the previous step; below, the largest `segments` values of the breakdown."""
    heading = _heading("funnel", report.name, _funnel_facts(report), width)
    if not report.windows:
        return Group(heading, _nothing("nobody entered this funnel in these windows"))
    name_width = min(max(len(_step(step)) for step in report.steps) + 2, max(12, width * 7 // 20))
    wide = width >= WIDE
    users_width = max(5, *(len(f"{step.users:,}") for step in report.steps))
    used = name_width + users_width + len("of first") + len("of previous") + 4 * 2 + (10 if wide else 0)
    bar_width = max(6, width - used)
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style=FAINT)
    table.add_column("step", width=name_width, no_wrap=True, overflow="ellipsis")
    for header, column in (("users", users_width), ("of first", 8), ("of previous", 11)):
        table.add_column(header, justify="right", width=column, no_wrap=True)
    if wide:
        table.add_column("median", justify="right", width=8, no_wrap=True)
    table.add_column("", width=bar_width, no_wrap=True)
    worst = _largest_loss(report.steps)
    for step in report.steps:
        lost = step.number == worst
        cells: list[RenderableType] = [
            Text.assemble((f"{step.number} ", FAINT), _step(step)),
            f"{step.users:,}",
            share(step.of_first),
            Text(share(step.of_previous) + (" ▼" if lost else "  ") if step.number > 1 else "", "bold red" if lost else ""),
        ]
        if wide:
            cells.append(duration(step.median_ms) if step.number > 1 else "")
        table.add_row(*cells, Text(bar(step.of_first or 0.0, bar_width), BAR))
    parts: list[RenderableType] = [heading, table]
    if report.segments and segments and report.segment is None:
        parts += [Text(), _funnel_segments(report, width, segments)]
    return Group(*parts)


def _funnel_facts(report: FunnelReport) -> list[Text]:
    facts = [Text(_span([window.start for window in report.windows], "entry window"))]
    if report.segment is not None:
        facts.append(Text(f"segment {_segment(report.segment)}"))
    if report.steps and report.steps[-1].median_ms is not None:
        facts.append(Text(f"median to convert {duration(report.steps[-1].median_ms)}"))
    return [*facts, _finality(report.so_far, len(report.windows))]


def _step(step: FunnelStep) -> str:
    return safe(step.name) + (" (optional)" if step.optional else "")


def _largest_loss(steps: Sequence[FunnelStep]) -> int:
    """The step with the lowest share of its previous one; 0 when there is nothing to tell apart."""
    known = [(step.of_previous, step.number) for step in steps if step.of_previous is not None]
    return min(known)[1] if len(known) > 1 and min(known)[0] < 1 else 0


def _funnel_segments(report: FunnelReport, width: int, most: int) -> RenderableType:
    names = [safe(step.name) for step in report.steps[1:]]
    shown_segments = report.segments[:most]
    labels = [_segment(segment) for segment, _ in shown_segments]
    title = f"largest {most} of {len(report.segments)} segments" if len(report.segments) > most else "segment"
    label_width = min(24, max(len(title), *map(len, labels)))
    first_width = max(8, *(len(f"{users[0]:,}") for _, users in shown_segments))
    fitting = max(1, (width - label_width - 2 - first_width) // (SHARE_WIDTH + 2))
    steps = list(range(len(names)))[-fitting:]
    column = max(SHARE_WIDTH, min(14, (width - label_width - 2 - first_width) // len(steps) - 2))
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style=FAINT)
    table.add_column(title, width=label_width, no_wrap=True, overflow="ellipsis")
    table.add_column(safe(report.steps[0].name), justify="right", width=first_width, no_wrap=True, overflow="ellipsis")
    for i in steps:
        table.add_column(names[i], justify="right", width=min(column, max(SHARE_WIDTH, len(names[i]))), no_wrap=True, overflow="ellipsis")
    for label, (_, users) in zip(labels, shown_segments, strict=True):
        cells = [share(users[i + 1] / users[0] if users[0] else None) for i in steps]
        table.add_row(label, f"{users[0]:,}", *cells)
    return table


# --- retention ----------------------------------------------------------------------------------------------------------------


def retention_heatmap(report: RetentionReport, width: int, reading: str = "in") -> RenderableType:
    """Share of each cohort that came back `in` each period, or in it or later (`after`): a number on a colour. The last row: all cohorts whose period is final."""
    facts = [Text(_cohorts(report))]
    if report.segment is not None:
        facts.append(Text(f"segment {_segment(report.segment)}"))
    heading = _heading("retention", report.name, [*facts, _finality(report.so_far, sum(len(c.cells) for c in report.cohorts))], width)
    if not report.cohorts:
        return Group(heading, _nothing("no cohort began in this time"))
    periods = min(report.periods, max(1, (width - 22) // _CELL))
    shares = [[_reading(cohort, n, reading) for n in range(1, periods + 1)] for cohort in report.cohorts]
    most = max((s for row in shares for s in row if s is not None), default=0.0)
    table = Table(box=None, padding=0, pad_edge=False, header_style=FAINT)
    table.add_column("cohort", width=12, no_wrap=True)
    table.add_column(f"{'users':>7} ", min_width=8, no_wrap=True)
    for n in range(1, periods + 1):
        table.add_column(f"{n:>{_CELL - 1}} ", width=_CELL, no_wrap=True)  # right-justified text would lose the place of the mark
    for cohort, row in zip(report.cohorts, shares, strict=True):
        size = Text(f"{cohort.size:>7,}" + (" " if cohort.cells and cohort.cells[0].final else SO_FAR))
        cells = [_heat(s, most, n >= len(cohort.cells) or _is_final(cohort, n, reading)) for n, s in enumerate(row, 1)]
        table.add_row(moment(cohort.start, report.period), size, *cells)
    if len(report.cohorts) > 1 and reading == "in":
        table.add_row(
            "all", Text(f"{sum(c.size for c in report.cohorts):>7,} "), *(_heat(report.share(n), most, True) for n in range(1, periods + 1))
        )
    notes = [Text(f"columns: {report.period}s after the first", FAINT), Text.assemble(("colours ", FAINT), *_legend(most))]
    if report.periods > periods:
        notes.append(Text(f"{periods} of {report.periods} {report.period}s fit", FAINT))
    return Group(heading, table, _flow(notes, width))


def _cohorts(report: RetentionReport) -> str:
    shown = len(report.cohorts)
    return f"newest {shown} of {report.found} cohorts" if report.found > shown else f"{shown} cohort{'s' if shown != 1 else ''}"


def _reading(cohort: Cohort, n: int, reading: str) -> float | None:
    if n >= len(cohort.cells) or not cohort.size:
        return None
    return (cohort.cells[n].on_or_after if reading == "after" else cohort.cells[n].users) / cohort.size


def _is_final(cohort: Cohort, n: int, reading: str) -> bool:
    return cohort.cells[n].after_final if reading == "after" else cohort.cells[n].final


def _heat(part: float | None, most: float, final: bool) -> Text:
    if part is None:
        return Text("")
    mark = " " if final else SO_FAR
    if part == 0:
        return Text(f"{'·':>{_CELL - 1}}{mark}", FAINT)
    percent = f"{part:.0%}" if part >= 0.005 else "<1%"
    return Text(f"{percent:>{_CELL - 1}}{mark}", _heat_style(part / most if most else 0.0))


def _heat_style(level: float) -> str:
    """Black or white, whichever is the more legible, on the ramp's colour."""
    position = min(max(level, 0.0), 1.0) * (len(_RAMP) - 1)
    low = min(int(position), len(_RAMP) - 2)
    red, green, blue = (round(a + (b - a) * (position - low)) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return f"{'#000000' if luminance > 120 else '#ffffff'} on #{red:02x}{green:02x}{blue:02x}"


def _legend(most: float) -> Iterable[tuple[str, str]]:
    for i in range(1, 6):
        yield f" {most * i / 5:.0%} ", _heat_style(i / 5)


# --- kpis ---------------------------------------------------------------------------------------------------------------------


def kpi_panel(report: KpiReport, width: int, title: str = "") -> RenderableType:
    """A line a series: the last ended window, its change against the one before, the window that is running, and the trend, newest right."""
    heading = _heading("", f"{title or 'KPIs'} by {_window(report.window)}", _kpi_facts(report), width)
    if not report.series:
        return Group(heading, _nothing("nothing was counted in these windows"))
    last_header = f"last {_window(report.window)}"
    lines = [(_label(series, report), *_numbers(series)) for series in report.series]
    label_width = min(max(len(line[0]) for line in lines), max(14, width // 3))
    widths = [max(len(header), *(len(line[i]) for line in lines)) for i, header in ((1, last_header), (2, "change"), (3, "running"))]
    trend = width - label_width - sum(widths) - 4 * 2
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style=FAINT)
    table.add_column("by " + safe(report.dimension) if report.dimension else "KPI", width=label_width, no_wrap=True, overflow="ellipsis")
    for header, column in zip((last_header, "change", "running"), widths, strict=True):
        table.add_column(header, justify="right", width=column, no_wrap=True)
    if trend >= 6:
        table.add_column("trend", width=trend, no_wrap=True)
    for series, (label, last, changed, running) in zip(report.series, lines, strict=True):
        cells = [Text(label), Text(last, "bold"), Text(changed), Text(running, FAINT)]
        table.add_row(*cells, *([sparkline(series.points, trend)] if trend >= 6 else []))
    return Group(heading, table)


def _kpi_facts(report: KpiReport) -> list[Text]:
    starts = [point.start for series in report.series for point in series.points]
    facts = [Text(f"{moment(min(starts), report.window)} to {moment(max(starts), report.window)}")] if starts else []
    if report.found > len(report.series):
        facts.append(Text(f"largest {len(report.series)} of {report.found}"))
    facts.append(_mark())
    return facts


def _label(series: KpiSeries, report: KpiReport) -> str:
    return _segment(series.dimension_value) if report.dimension else safe(series.name)


def _numbers(series: KpiSeries) -> tuple[str, str, str]:
    percent = as_percent(series)
    last, running = series.last, series.running
    return (
        value(last.value, series.unit, series.currency, percent) + ("" if last.final else SO_FAR) if last else NOTHING,
        change(series.change),
        value(running.value, series.unit, series.currency, percent) + SO_FAR if running else "",
    )


def as_percent(series: KpiSeries) -> bool:
    """A ratio that stays within 1 is shown as a percentage, any other (pages a visit) as a number."""
    return series.unit == "ratio" and not series.currency and all(abs(p.value) <= 1 for p in series.points if p.value is not None)


def sparkline(points: Sequence[KpiPoint], width: int) -> Text:
    """The newest `width` points on a scale from 0; what is not final is faint."""
    shown = points[-width:]
    most = max((float(p.value) for p in shown if p.value is not None), default=0.0)
    line = Text()
    for point in shown:
        line.append(_level(point, most), BAR if point.final else FAINT)
    return line


def _level(point: KpiPoint, most: float) -> str:
    if point.value is None:
        return " "
    if most <= 0:
        return _LEVELS[1]
    return _LEVELS[max(1, min(8, math.ceil(float(point.value) / most * 8)))]


def kpi_chart(series: KpiSeries, report: KpiReport, width: int, height: int = 8) -> RenderableType:
    """One series as columns over its windows, with the scale left and first and last window below; `~` stands under what is not final."""
    percent = as_percent(series)
    title = safe(series.name) + (f", {safe(report.dimension)} {_segment(series.dimension_value)}," if report.dimension else "")
    heading = _heading("", f"{title} by {_window(report.window)}", _kpi_facts(report), width)
    most = max((float(p.value) for p in series.points if p.value is not None), default=0.0)
    labels = [value(Decimal(str(most * part)), series.unit, series.currency, percent) for part in (1.0, 0.5, 0.0)]
    axis = max(map(len, labels))
    room = max(1, width - axis - 2)
    shown = series.points[-room:]
    each = max(1, min(8, room // max(1, len(shown))))
    rows: list[Text] = []
    for row in range(height, 0, -1):
        label = labels[0] if row == height else labels[1] if row == (height + 1) // 2 else ""
        line = Text(f"{label:>{axis}} ", FAINT).append("│", FAINT)
        for point in shown:
            filled = 0.0 if point.value is None or most <= 0 else float(point.value) / most * height - (row - 1)
            glyph = _LEVELS[round(min(max(filled, 0.0), 1.0) * 8)]
            line.append(glyph * max(1, each - 1) + " " * min(1, each - 1), BAR if point.final else FAINT)
        rows.append(line)
    base = Text(f"{labels[2]:>{axis}} └", FAINT)
    for point in shown:
        base.append("─" * each if point.final else SO_FAR * each, FAINT)
    ends = [moment(shown[0].start, report.window), moment(shown[-1].start, report.window)] if shown else ["", ""]
    gap = max(1, each * len(shown) - len(ends[0]) - len(ends[1]))
    below = Text(" " * (axis + 2) + (ends[0] + " " * gap + ends[1] if len(shown) > 1 else ends[1]), FAINT)
    return Group(heading, *rows, base, below)


def kpi_table(series: KpiSeries, report: KpiReport) -> RenderableType:
    """Every window of one series with its value and its change against the one before, newest first."""
    percent = as_percent(series)
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style=FAINT)
    table.add_column("window", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("change", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    before = [None, *series.points]
    for previous, point in reversed(list(zip(before, series.points, strict=False))):
        relative = None
        if previous is not None and previous.value and point.value is not None and point.ended:
            relative = float(point.value / previous.value - 1)
        state = "" if point.final else f"{SO_FAR} so far" if point.ended else f"{SO_FAR} running"
        number = value(point.value, series.unit, series.currency, percent)
        table.add_row(moment(point.start, report.window), number, change(relative), Text(state, FAINT))
    return table


# --- health -------------------------------------------------------------------------------------------------------------------


def health_panel(report: HealthReport, width: int, most: int = 64) -> RenderableType:
    """Per partition how far the warehouse is, and how fresh the reports are; partitions beyond `most` are only in the sums."""
    heading = _heading("health", "", [Text(f"{len(report.partitions)} source partitions"), Text(report.time_zone)], width)
    if not report.partitions:
        return Group(heading, _nothing("no worker has written to this warehouse yet"))
    wide = width >= WIDE_HEALTH
    precision = "1s" if wide else "1m"
    counts = ("applied", "duplicates", "rejected", "too_late", *(("rekeyed",) if wide else ()))
    table = Table(box=None, padding=(0, 0, 0, 2 if wide else 1), pad_edge=False, header_style=FAINT)
    table.add_column("topic", no_wrap=True, overflow="ellipsis", max_width=max(12, width * 7 // 20))
    for header in ("partition" if wide else "part", "next offset"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("watermark", no_wrap=True)
    if wide:
        table.add_column("behind", justify="right", no_wrap=True)
    for count in counts:
        table.add_column({"duplicates": "dupl.", "too_late": "late"}.get(count, count), justify="right", no_wrap=True)
    for p in report.partitions[:most]:
        numbers = [f"{getattr(p, count):,}" for count in counts]
        behind = [duration(report.behind_ms(p) or None)] if wide else []
        table.add_row(safe(p.topic), str(p.partition), f"{p.next_offset:,}", moment(p.watermark, precision), *behind, *numbers)
    sums = [f"{report.total(count):,}" for count in counts]
    table.add_row(Text("all", "bold"), "", "", moment(report.watermark, precision), *([""] if wide else []), *sums)
    age = duration(report.freshness_ms)
    lines = [Text.assemble("newest event in the reports ", (moment(report.watermark, "1s"), "bold"), f", {age} ago")]
    if report.reasons:
        lines.append(reasons_line(report.reasons))
    return Group(heading, table, Text(), *lines)


def reasons_line(reasons: Sequence[tuple[str, int]]) -> Text:
    total = sum(n for _, n in reasons)
    return Text.assemble(
        (f"{total:,} rejected", "bold"), ": " if reasons else "", ", ".join(f"{safe(reason)} {n:,}" for reason, n in reasons)
    )


# --- parts --------------------------------------------------------------------------------------------------------------------


def bar(part: float, width: int) -> str:
    """A bar of `part` (0 to 1) of `width` cells, to an eighth of a cell; something above 0 is never invisible."""
    eighths = round(min(max(part, 0.0), 1.0) * width * 8)
    if part > 0:
        eighths = max(1, eighths)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def _heading(kind: str, name: str, facts: Sequence[Text], width: int) -> Text:
    return _flow([Text(f"{kind} {safe(name)}".strip(), "bold"), *facts], width)


def _flow(parts: Sequence[Text], width: int) -> Text:
    """Parts with dots between them; a line breaks between two parts, not inside one that fits."""
    flowing, used = Text(), 0
    for part in parts:
        if not part.plain:
            continue
        if used and used + 3 + part.cell_len > width:
            flowing.append("\n  ")
            used = 2
        elif used:
            flowing.append(" · ", FAINT)
            used += 3
        flowing.append_text(part)
        used += part.cell_len
    return flowing


def _finality(so_far: int, of: int) -> Text:
    if not of:
        return Text()
    return _mark() if so_far and so_far == of else Text(f"{SO_FAR} {so_far} of {of} so far", "yellow") if so_far else Text("final", "green")


def _mark() -> Text:
    return Text(f"{SO_FAR} so far: may still change", "yellow")


def _span(starts: Sequence[datetime], what: str) -> str:
    days = [f"{start:%Y-%m-%d}" for start in starts]
    count = f"{len(days)} {what}{'s' if len(days) != 1 else ''}"
    if not days:
        return count
    return f"{count} of {days[0]}" if days[0] == days[-1] else f"{count}, {days[0]} to {days[-1]}"


def _window(window: str) -> str:
    return {"1m": "minute", "1h": "hour", "1d": "day", "1w": "week", "1mo": "month"}.get(window, window)


def _segment(text: str) -> str:
    return safe(text) if text else "(none)"


def _nothing(text: str) -> Text:
    return Text(text, FAINT)
