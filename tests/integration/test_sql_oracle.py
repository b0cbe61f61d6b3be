"""The SQL oracle itself, on cases small enough to count by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest

from pipeline.definitions_file import loads
from pipeline.sinks.embedded import EmbeddedWarehouse
from tests.oracle.shops import Sent, sent
from tests.oracle.sql import Oracle

DAY = 86_400_000
HOUR = 3_600_000
MINUTE = 60_000
T0 = 1_772_323_200_000  # 2026-03-01, a Sunday
FUNNEL = '[[funnel]]\nname = "f"\nconversion_window = "1d"\n[[funnel.step]]\nevent = "view_item"\n[[funnel.step]]\nevent = "purchase"\n'


@pytest.fixture(scope="module")
def oracle() -> Iterator[Callable[[str, list[Sent]], Oracle]]:
    warehouse = EmbeddedWarehouse("")
    yield lambda text, messages: Oracle(warehouse.query, loads(text), [(m.topic, m.value) for m in messages])
    warehouse.close()


Make = Callable[[str, list[Sent]], Oracle]


def view(event_id: str, ts: int, user: str = "u", **fields: Any) -> Sent:
    return sent("clickstream", event_id, "view_item", ts, user, **fields)


def page(event_id: str, ts: int, user: str = "u", **fields: Any) -> Sent:
    return sent("clickstream", event_id, "page_view", ts, user, **fields)


def order(event_id: str, event: str, ts: int, user: str = "u", **fields: Any) -> Sent:
    return sent("orders", event_id, event, ts, user, **fields)


def kpi(text: str) -> str:
    return f'[[kpi]]\nname = "k"\nwindows = ["1d"]\n{text}'


def test_purchase_of_the_next_day_counts_for_the_day_of_the_view(oracle: Make) -> None:
    events = [view("a", T0 + 23 * HOUR), order("b", "purchase", T0 + 25 * HOUR), view("c", T0 + 26 * HOUR)]
    assert oracle(FUNNEL, events).funnels() == {
        ("f", T0, "", 1): 1,
        ("f", T0, "", 2): 1,
        ("f", T0 + DAY, "", 1): 1,
        ("f", T0 + DAY, "", 2): 0,
    }


def test_conversion_window_includes_its_end(oracle: Make) -> None:
    events = [view("a", T0), order("b", "purchase", T0 + DAY), view("c", T0, "v"), order("d", "purchase", T0 + DAY + 1, "v")]
    assert oracle(FUNNEL, events).funnels() == {("f", T0, "", 1): 2, ("f", T0, "", 2): 1}


def test_segment_is_that_of_the_best_attempt(oracle: Make) -> None:
    text = FUNNEL.replace("[[funnel]]", '[[funnel]]\nbreakdown = "channel"')
    events = [view("a", T0, channel="email"), view("b", T0 + 1, channel="social"), order("c", "purchase", T0 + 2)]
    assert oracle(text, events).funnels() == {("f", T0, "social", 1): 1, ("f", T0, "social", 2): 1}


def test_same_event_id_counts_once(oracle: Make) -> None:
    assert oracle(kpi('aggregate = "count"\nevent = "view_item"'), [view("a", T0), view("a", T0)]).kpis() == {
        ("k", "1d", T0, "", "", ""): Decimal(1)
    }


def test_retention_counts_later_days_and_sums_the_cohorts_own_day(oracle: Make) -> None:
    text = '[[retention]]\nname = "r"\ncohort = { event = "purchase" }\nreturn = { event = "purchase" }\nperiods = 3\nvalue = "value"\n'
    events = [
        order("a", "purchase", T0, value=10.1),
        order("b", "purchase", T0 + HOUR, value=0.2),
        order("c", "purchase", T0 + 2 * DAY, value=5),
        order("d", "purchase", T0 + 4 * DAY, value=7),
        order("e", "purchase", T0 + 1, "v", value=1),
    ]
    assert oracle(text, events).retentions() == {
        ("r", T0, "", 0): (2, 2, Decimal("11.3")),
        ("r", T0, "", 1): (0, 1, Decimal(0)),
        ("r", T0, "", 2): (1, 1, Decimal(5)),
    }


def test_day_of_retention_is_the_shops(oracle: Make) -> None:
    text = '[shop]\ntime_zone = "Asia/Shanghai"\n[[retention]]\nname = "r"\ncohort = { event = "*" }\nperiods = 1\n'
    events = [view("a", T0 + 15 * HOUR), view("b", T0 + 17 * HOUR)]
    assert oracle(text, events).retentions() == {
        ("r", T0 - 8 * HOUR, "", 0): (1, 1, Decimal(0)),
        ("r", T0 - 8 * HOUR, "", 1): (1, 1, Decimal(0)),
    }


def test_a_gap_of_exactly_thirty_minutes_does_not_end_a_session(oracle: Make) -> None:
    events = [page("a", T0), page("b", T0 + 30 * MINUTE), page("c", T0 + 60 * MINUTE + 1)]
    for aggregate, value in (("count", 2), ("bounces", 1), ("pages", 3), ("dwell", 30 * MINUTE)):
        found = oracle(kpi(f'source = "sessions"\naggregate = "{aggregate}"'), events).kpis()
        assert found == {("k", "1d", T0, "", "", ""): Decimal(value)}


def test_quantile_is_the_bucket_of_the_nearest_rank(oracle: Make) -> None:
    events = [page(f"{user}{i}", T0 + i * dwell, user) for user, dwell in (("u", 10), ("v", 20), ("w", 1000)) for i in (0, 1)]
    for quantile, upper in ((0.3, 10), (0.34, 20), (0.5, 20), (0.6, 20), (0.67, 1024)):
        found = oracle(kpi(f'source = "sessions"\naggregate = "dwell_quantile"\nquantile = {quantile}'), events).kpis()
        assert found == {("k", "1d", T0, "", "", ""): Decimal(upper)}


def test_a_session_without_a_page_is_no_bounce(oracle: Make) -> None:
    assert oracle(kpi('source = "sessions"\naggregate = "bounces"'), [order("a", "order_shipped", T0)]).kpis() == {}


def test_money_is_exact_and_kept_a_currency_at_a_time(oracle: Make) -> None:
    text = kpi('aggregate = "sum"\nevent = "purchase"\nfield = "value"')
    events = [
        order("a", "purchase", T0, value=0.1),
        order("b", "purchase", T0, value=0.2),
        order("c", "purchase", T0, value=3, currency="CHF"),
    ]
    assert oracle(text, events).kpis() == {("k", "1d", T0, "", "", "EUR"): Decimal("0.3"), ("k", "1d", T0, "", "", "CHF"): Decimal(3)}


def test_filters_on_absent_fields_fail_unless_they_are_ne(oracle: Make) -> None:
    events = [view("a", T0), view("b", T0, price=10, device="tablet"), view("c", T0, price=9.99, device="mobile")]
    for where, count in (
        ("price = { gte = 10 }", 1),
        ("price = { ne = 10 }", 2),
        ('device = { ne = "tablet" }', 2),
        ('device = ["mobile", "tv"]', 1),
    ):
        found = oracle(kpi(f'aggregate = "count"\nevent = "view_item"\nwhere = {{ {where} }}'), events).kpis()
        assert found == {("k", "1d", T0, "", "", ""): Decimal(count)}


def test_repeat_counts_in_the_window_of_the_first(oracle: Make) -> None:
    text = kpi('source = "repeat"\nevent = "purchase"\nwithin = "30d"')
    events = [
        order("a", "purchase", T0),
        order("b", "purchase", T0 + 30 * DAY),
        order("c", "purchase", T0, "v"),
        order("d", "purchase", T0 + 30 * DAY + 1, "v"),
    ]
    assert oracle(text, events).kpis() == {("k", "1d", T0, "", "", ""): Decimal(1)}


def test_refund_counts_in_the_window_of_the_payment(oracle: Make) -> None:
    events = [
        order("a", "order_created", T0, order_id="1", channel="email"),
        order("b", "purchase", T0 + DAY, order_id="1", channel="social"),
        order("c", "refund", T0 + 3 * DAY, order_id="1"),
        order("d", "order_created", T0, order_id="2", channel="email"),
    ]
    wanted = {
        "created": (T0, 2, "email"),
        "paid_of_created": (T0, 1, "email"),
        "paid": (T0 + DAY, 1, "social"),
        "refunded_of_paid": (T0 + DAY, 1, "social"),
    }
    for aggregate, (start, count, channel) in wanted.items():
        found = oracle(kpi(f'source = "orders"\naggregate = "{aggregate}"\ndimensions = ["channel"]'), events).kpis()
        assert found == {("k", "1d", start, "", "", ""): count, ("k", "1d", start, "channel", channel, ""): count}


def test_ratio_goes_with_each_currency_and_is_cut_off_after_eight_digits(oracle: Make) -> None:
    text = (
        '[[kpi]]\nname = "gmv"\nwindows = ["1d"]\naggregate = "sum"\nevent = "purchase"\nfield = "value"\n'
        '[[kpi]]\nname = "buyers"\nwindows = ["1d"]\naggregate = "users"\nevent = "purchase"\n[[kpi]]\nname = "aov"\nformula = "gmv / buyers"\n'
    )
    events = [order(u, "purchase", T0, u, value=2, currency=c) for u, c in (("u", "EUR"), ("v", "CHF"), ("w", "CHF"))]
    found = oracle(text, events).kpis()
    assert found["aov", "1d", T0, "", "", "EUR"] == Decimal("0.66666666")
    assert found["aov", "1d", T0, "", "", "CHF"] == Decimal("1.33333333")
