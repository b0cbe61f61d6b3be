"""The demo's screen fills its terminal exactly, whatever the size, and says in words what it says in colour."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from rich.console import Console

from pipeline.cli.demo_look import KPIS, Number, Snapshot
from pipeline.cli.demo_view import plain_line, plain_reports, screen
from pipeline.reports.model import Cohort, CohortCell, FunnelReport, FunnelStep, FunnelWindow, KpiPoint, RetentionReport

NOW = datetime(2024, 1, 18, 17, 33, tzinfo=UTC)
MIDNIGHT = NOW.replace(hour=0, minute=0)


def numbers(**recent: int) -> dict[str, Number]:
    hours = tuple(KpiPoint(MIDNIGHT + timedelta(hours=i - 30), Decimal(i % 24), i < 47, i < 10) for i in range(48))
    return {kpi: Number(Decimal("1234.5"), Decimal(recent.get(kpi, 100)), hours) for kpi in KPIS}


def retention(name: str, cohorts: int) -> RetentionReport:
    def cells(age: int) -> tuple[CohortCell, ...]:
        return tuple(CohortCell(400 // (n + 1), 400 // (n + 1), Decimal(0), n < age - 1, False) for n in range(min(age, 14) + 1))

    made = tuple(Cohort(MIDNIGHT - timedelta(days=age), cells(age)) for age in range(cohorts - 1, -1, -1))
    return RetentionReport(name, "UTC", None, "day", made, len(made))


def snapshot(cohorts: int = 19, **recent: int) -> Snapshot:
    users = (4419, 2294, 1276, 1050)
    steps = tuple(
        FunnelStep(i + 1, name, n, n / users[0], n / users[i - 1] if i else None, 60_000)
        for i, (name, n) in enumerate(zip(("View", "Cart", "Checkout", "Purchase"), users, strict=True))
    )
    windows = tuple(FunnelWindow(MIDNIGHT - timedelta(days=d), users, d > 2) for d in range(6, -1, -1))
    segments = tuple((channel, users) for channel in ("organic", "direct", "paid_search", "social", "email", "affiliate"))
    funnel = FunnelReport("checkout", "UTC", None, steps, windows, segments)
    recent = {"payment_failures": 5, "page_errors": 1} | recent
    return Snapshot(
        NOW, 10.0, 154_433, 984.0, 913, 0.5, 3107, 1207, 129, 46, numbers(**recent), funnel,
        retention("visitors", cohorts), retention("buyers", cohorts),
    )  # fmt: skip


def drawn(of: Snapshot, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height + 50, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(screen(of, width, height), end="")
    return capture.get().split("\n")


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (129, 40), (130, 24), (160, 48), (220, 70)])
@pytest.mark.parametrize("cohorts", [1, 4, 19, 40])
def test_the_screen_is_as_large_as_the_terminal(size: tuple[int, int], cohorts: int) -> None:
    lines = drawn(snapshot(cohorts), *size)
    assert len(lines) in (size[1], size[1] + 1)
    assert lines[size[1] :] in ([], [""])
    assert all(len(line.rstrip()) <= size[0] for line in lines)


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_screen_says_how_to_end_also_after_hours(width: int) -> None:
    after_hours = replace(snapshot(), late=1_234_567, duplicates=567_890, rejected=56_789, too_late=23_456)
    footer = drawn(after_hours, width, 24)[23]
    assert footer.startswith("Ctrl-C ends · late")
    assert "rejected 56,789" in footer


def test_eighty_columns_hold_all_that_became_of_the_events() -> None:
    assert drawn(snapshot(), 80, 24)[23].rstrip() == "Ctrl-C ends · late 3,107 · duplicates 1,207 · rejected 129 · too late 46"


def test_eighty_columns_hold_six_kpis_the_funnel_and_two_weeks_of_cohorts() -> None:
    text = "\n".join(drawn(snapshot(), 80, 24))
    for part in (
        "GMV today",
        "orders",
        "active users",
        "sessions",
        "pay failures",
        "page errors",
        "lag 913",
        "fresh 0.5 s",
        "duplicates 1,207",
    ):
        assert part in text
    for step in ("View", "Cart", "Checkout", "Purchase"):
        assert step in text
    assert "2024-01-18" in text
    assert "every" in text
    assert sum(line.startswith("2024-01-") for line in text.split("\n")) >= 4


def test_a_wide_screen_adds_segments_charts_and_the_buyers() -> None:
    text = "\n".join(drawn(snapshot(), 160, 48))
    for part in ("paid_search", "gmv by hour", "payment_failures by hour", "retention visitors", "retention buyers", "conversion"):
        assert part in text


def test_a_terminal_too_small_for_all_still_shows_the_numbers() -> None:
    lines = drawn(snapshot(), 40, 12)
    assert any("GMV" in line for line in lines)


def test_failing_payments_are_told_in_words() -> None:
    calm, failing = snapshot(), snapshot(payment_failures=61)
    assert "payments fail" not in "\n".join(drawn(calm, 80, 24))
    assert "▲ payments fail: 61% in the last 3 h" in "\n".join(drawn(failing, 80, 24))
    assert "▲ payments fail: 61% in the last 3 h" in plain_line(failing)
    assert "pages fail" in plain_line(snapshot(page_errors=9))


def test_while_nothing_is_wrong_the_screen_says_where_the_metrics_are() -> None:
    address = "http://127.0.0.1:9464/metrics"
    assert any(address in line for line in drawn(replace(snapshot(), metrics=(address,)), 80, 24))
    assert not any(address in line for line in drawn(replace(snapshot(payment_failures=900), metrics=(address,)), 80, 24))


def test_few_attempts_are_no_alert() -> None:
    assert "payments fail" not in plain_line(snapshot(payment_failures=3, payment_attempts=4))


def test_plain_lines_name_time_rate_and_numbers() -> None:
    assert plain_line(snapshot()).startswith("2024-01-18 17:33 · 154,433 events (984/s, lag 913) · today: GMV 1,234.50 EUR")
    funnel, back = plain_reports(snapshot())
    assert funnel == "funnel of 7 days: View 4,419 → Cart 2,294 (52%) → Checkout 1,276 (56%) → Purchase 1,050 (82%)"
    assert back.startswith("back after their first visit: day 1 50.0%")
