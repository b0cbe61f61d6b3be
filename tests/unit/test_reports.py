"""Reports shaped from rows and drawn: what the numbers mean, what is marked, and that it fits, in colour and in plain text."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from pipeline.reports import export, render, text
from pipeline.reports.model import (
    FunnelReport,
    HealthReport,
    KpiReport,
    KpiSeries,
    PartitionHealth,
    RetentionReport,
    funnel_report,
    kpi_series,
    retention_report,
)

MONDAY = datetime(2026, 3, 1, 23, tzinfo=UTC)  # midnight of March 2nd in Berlin
WEEK = timedelta(days=7)
BERLIN = "Europe/Berlin"


def plain(drawn: RenderableType, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO(), color_system=None)
    console.print(drawn)
    return console.export_text(styles=False).splitlines()


def funnel(limit: int | None = None, segment: str | None = None) -> FunnelReport:
    """Two weeks, two channels; the second week may still change."""
    rows = [
        (MONDAY + week * WEEK, channel, step, users, final)
        for week, channel, final, counts in (
            (0, "email", 1, (100, 50, 10)),
            (0, "social", 1, (20, 10, 0)),
            (1, "email", 0, (60, 30, 30)),
        )
        for step, users in enumerate(counts, 1)
    ]
    times = [(3, 1000, 4), (3, 5000, 6), (3, 9000, 1), (2, 10, 1)]
    return funnel_report("checkout", BERLIN, segment, rows, times, ["View", "Cart", "Paid"], [False] * 3, limit)


# --- funnels ------------------------------------------------------------------------------------------------------------------


def test_entry_windows_and_segments_add_up() -> None:
    report = funnel()
    assert [step.users for step in report.steps] == [180, 90, 40]
    assert [step.of_first for step in report.steps] == [1, 0.5, pytest.approx(40 / 180)]
    assert [step.of_previous for step in report.steps] == [None, 0.5, pytest.approx(40 / 90)]
    assert report.segments == (("email", (160, 80, 40)), ("social", (20, 10, 0)))


def test_the_median_is_the_bucket_of_the_middle_user() -> None:
    assert [step.median_ms for step in funnel().steps] == [None, 10, 5000]


def test_limit_keeps_the_newest_entry_windows() -> None:
    report = funnel(limit=1)
    assert [window.start.date().isoformat() for window in report.windows] == ["2026-03-09"]
    assert [step.users for step in report.steps] == [60, 30, 30]


def test_only_windows_that_may_change_are_so_far() -> None:
    assert [window.final for window in funnel().windows] == [True, False]
    assert funnel().so_far == 1
    assert "~ 1 of 2 so far" in " ".join(plain(render.funnel_panel(funnel(), 80)))


def test_the_funnel_says_its_conversions_and_where_most_are_lost() -> None:
    lines = plain(render.funnel_panel(funnel(), 80))
    (cart,) = (line for line in lines if line.startswith("2 Cart"))
    (paid,) = (line for line in lines if line.startswith("3 Paid"))
    assert "90" in cart
    assert "50.0%" in cart
    assert "▼" not in cart
    assert "44.4% ▼" in paid
    assert cart.count("█") > paid.count("█") > 0


def test_a_funnel_without_windows_says_so() -> None:
    empty = funnel_report("checkout", "UTC", None, [], [], ["View", "Paid"], [False, False], None)
    assert "nobody entered" in " ".join(plain(render.funnel_panel(empty, 80)))


def test_an_optional_step_is_marked() -> None:
    report = funnel_report("x", "UTC", None, [(MONDAY, "", 1, 5, 1)], [], ["A", "B", "C"], [False, True, False], None)
    assert any("B (optional)" in line for line in plain(render.funnel_panel(report, 80)))


# --- retention ----------------------------------------------------------------------------------------------------------------


def retention() -> RetentionReport:
    rows = [
        (MONDAY, 0, 200, 200, 0, 1, 0),
        (MONDAY, 1, 50, 60, "12.5", 1, 0),
        (MONDAY, 2, 0, 20, 0, 1, 0),
        (MONDAY + WEEK, 0, 100, 100, 0, 1, 0),
        (MONDAY + WEEK, 1, 40, 40, 0, 0, 0),
    ]
    return retention_report("weekly", BERLIN, None, "week", rows, None)


def test_segments_of_a_cohort_add_up_and_are_final_together() -> None:
    rows = [(MONDAY, 0, 7, 7, "1.5", 1, 1), (MONDAY, 0, 5, 5, "2.5", 0, 1)]
    (cohort,) = retention_report("x", "UTC", None, "day", rows, None).cohorts
    assert (cohort.size, cohort.cells[0].value, cohort.cells[0].final, cohort.cells[0].after_final) == (12, Decimal(4), False, True)


def test_the_line_over_all_cohorts_counts_only_final_periods() -> None:
    assert retention().share(1) == 50 / 200
    assert retention().share(2) == 0
    assert retention().share(3) is None


def test_the_heat_map_reads_without_colour() -> None:
    first, second, everyone = (line.split() for line in plain(render.retention_heatmap(retention(), 80))[2:5])
    assert first == ["2026-03-02", "200", "25%", "·"]
    assert second == ["2026-03-09", "100", "40%~"]
    assert everyone == ["all", "300", "25%", "·"]


def test_on_or_after_is_another_reading() -> None:
    assert any(
        line.split()[:4] == ["2026-03-02", "200", "30%~", "10%~"] for line in plain(render.retention_heatmap(retention(), 80, "after"))
    )


@pytest.mark.parametrize("level", [0, 0.1, 0.3, 0.5, 0.7, 0.9, 1])
def test_text_on_the_heat_map_is_legible(level: float) -> None:
    """WCAG's contrast of text and ground, at least 3 to 1 (large text and graphics)."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    ink, ground = (luminance(colour) for colour in render._heat_style(level).split(" on "))
    assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 3


# --- KPIs ---------------------------------------------------------------------------------------------------------------------


def series(values: dict[int, tuple[str, bool]], days: int = 4, fill: bool = True, unit: str = "count", currency: str = "") -> KpiSeries:
    starts = [MONDAY + timedelta(days=i) for i in range(days)]
    known = {starts[i]: (Decimal(value), final) for i, (value, final) in values.items()}
    return kpi_series("k", unit, currency, "", known, [(start, i < days - 1) for i, start in enumerate(starts)], fill)  # type: ignore[arg-type]


def report(*lines: KpiSeries, dimension: str = "") -> KpiReport:
    return KpiReport("UTC", "1d", dimension, lines, len(lines))


def test_a_window_without_events_counts_zero_and_is_final_when_a_later_one_is() -> None:
    points = series({0: ("5", True), 2: ("8", True)}).points
    assert [(point.value, point.final) for point in points] == [(5, True), (0, True), (8, True), (0, False)]


def test_a_ratio_without_denominator_has_no_value() -> None:
    assert [point.value for point in series({0: ("0.5", True)}, fill=False).points] == [Decimal("0.5"), None, None, None]


def test_change_is_of_the_last_ended_window_and_not_of_the_running_one() -> None:
    line = series({0: ("5", True), 1: ("10", True), 2: ("15", False), 3: ("1", False)})
    assert line.last is not None
    assert (line.last.value, line.change) == (15, 0.5)
    assert line.running is not None
    assert line.running.value == 1


def test_the_board_marks_what_may_change() -> None:
    (row,) = plain(render.kpi_panel(report(series({1: ("10", True), 2: ("15", False), 3: ("1", False)})), 80))[2:]
    assert row.split()[:4] == ["k", "15~", "+50.0%", "1~"]


@pytest.mark.parametrize(("values", "shown"), [(("0.5", "1"), "100.0%"), (("3.25", "2.5"), "2.50")])
def test_a_ratio_within_one_is_a_percentage(values: tuple[str, str], shown: str) -> None:
    line = series({1: (values[0], True), 2: (values[1], True)}, fill=False, unit="ratio")
    assert shown in " ".join(plain(render.kpi_panel(report(line), 80)))


def test_the_chart_has_its_scale_its_ends_and_marks_what_may_change() -> None:
    lines = plain(render.kpi_chart(series({0: ("50", True), 1: ("100", True)}), report(), 60))
    assert lines[1].startswith("100 │")
    assert "0 └" in lines[-2]
    assert "~" in lines[-2]
    assert "2026-03-01" in lines[-1]
    assert "2026-03-04" in lines[-1]


def test_a_chart_of_nothing_but_zeros_is_drawn() -> None:
    assert plain(render.kpi_chart(series({0: ("0", True)}), report(), 60))


# --- health -------------------------------------------------------------------------------------------------------------------


def health() -> HealthReport:
    partitions = (
        PartitionHealth("clickstream", 0, 120, MONDAY, 100, 10, 7, 3, 0),
        PartitionHealth("clickstream", 1, 80, MONDAY - timedelta(minutes=5), 80, 0, 0, 0, 0),
        PartitionHealth("orders", 0, 0, None, 0, 0, 0, 0, 0),
    )
    return HealthReport("UTC", partitions, MONDAY + timedelta(seconds=90), (("malformed_json", 7),))


def test_freshness_is_the_age_of_the_newest_event() -> None:
    assert health().freshness_ms == 90_000
    assert health().behind_ms(health().partitions[1]) == 300_000
    assert "1m 30s ago" in " ".join(plain(render.health_panel(health(), 80)))


def test_no_event_yet_is_no_freshness() -> None:
    assert HealthReport("UTC", (), MONDAY).freshness_ms is None
    assert "no worker has written" in " ".join(plain(render.health_panel(HealthReport("UTC", (), MONDAY), 80)))


# --- all of them --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [30, 60, 80, 100, 160])
def test_everything_fits_its_width(width: int) -> None:
    """Measured on a console with room to spare: nothing relies on being wrapped or cut off. Very narrow ones are only drawn."""
    long = funnel_report(
        "a funnel with quite a long name", "UTC", None, [(MONDAY, "segment " * 8, s, 10**7, 0) for s in range(1, 17)], [],
        [f"step number {i}" for i in range(16)], [True] * 16, None,
    )  # fmt: skip
    wide = retention_report("weekly", "UTC", None, "week", [(MONDAY, n, 100, 9, 0, 0, 0) for n in range(60)], None)
    money = series({0: ("123456789.12", True), 2: ("-98765432.1", False)}, days=90, unit="money", currency="EUR")
    drawn = [
        render.funnel_panel(funnel(), width),
        render.funnel_panel(long, width),
        render.retention_heatmap(wide, width),
        render.kpi_panel(report(money), width),
        render.kpi_chart(money, report(), width),
        render.health_panel(health(), width),
    ]
    for one in drawn:
        assert plain(one, width)
        assert width < 80 or Console(width=1000).measure(one).maximum <= width


def test_what_came_from_outside_is_never_obeyed_by_the_terminal() -> None:
    evil = "\x1b[2J\x07\u202eevil\n"
    report_ = funnel_report(evil, "UTC", None, [(MONDAY, evil, 1, 1, 1)], [], [evil, evil], [False, False], None)
    health_ = HealthReport("UTC", (PartitionHealth(evil, 0, 1, MONDAY, 1, 0, 0, 0, 0),), MONDAY, ((evil, 1),))
    for drawn in (render.funnel_panel(report_, 80), render.health_panel(health_, 80)):
        lines = "".join(plain(drawn))
        assert "\x1b" not in lines
        assert "\u202e" not in lines
        assert "\\x1b" in lines


@given(st.text() | st.binary())
def test_safe_text_is_printable_and_plain_text_stays(foreign: str | bytes) -> None:
    assert text.safe(foreign).isprintable()
    if isinstance(foreign, str) and foreign.isprintable():
        assert text.safe(foreign) == foreign


@pytest.mark.parametrize(
    ("ms", "shown"),
    [(0, "0ms"), (999, "999ms"), (1000, "1s"), (220_000, "3m 40s"), (3_600_000, "1h"), (90_061_000, "1d 1h"), (86_400_500, "1d")],
)
def test_durations_have_two_units(ms: int, shown: str) -> None:
    assert text.duration(ms) == shown


@given(st.floats(0, 1), st.integers(1, 200))
def test_a_bar_is_as_long_as_its_part_and_never_invisible(part: float, width: int) -> None:
    drawn = render.bar(part, width)
    assert len(drawn) <= width
    assert bool(drawn) == (part > 0)
    assert abs(len(drawn) - part * width) <= 1


def test_json_has_exact_numbers_and_says_what_may_change() -> None:
    money = series({0: ("0.10000001", True)}, unit="money", currency="EUR")
    written = export.to_json(export.document([funnel(), retention(), report(money), health()]))
    assert "0.10000001" in written
    document = json.loads(written)
    assert (document["funnels"][0]["so_far"], document["funnels"][0]["final"]) == (1, False)
    assert document["funnels"][0]["windows"][0]["start"] == "2026-03-02T00:00:00+01:00"
    assert document["health"][0]["freshness_ms"] == 90_000


def test_csv_has_a_row_a_window_and_survives_hostile_names() -> None:
    hostile = funnel_report('a"b,\nc', "UTC", None, [(MONDAY, "", 1, 4, 1), (MONDAY, "", 2, 1, 1)], [], ["x", "y"], [False] * 2, None)
    header, *rows = csv.reader(io.StringIO(export.to_csv(FunnelReport, [hostile])))
    assert tuple(header) == export.HEADERS[FunnelReport]
    assert [(row[0], row[3], row[5], row[6], row[8]) for row in rows] == [
        ('a"b,\nc', "1", "4", "1.000000", "1"),
        ('a"b,\nc', "2", "1", "0.250000", "1"),
    ]


def test_times_are_the_shops() -> None:
    assert funnel().windows[0].start == datetime(2026, 3, 2, tzinfo=ZoneInfo(BERLIN))
