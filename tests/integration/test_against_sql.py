"""The whole pipeline but Kafka against ClickHouse: whatever the number of partitions and the order of arrival, every number of every report.

Messages go through `pipeline.partition` (with a restart from its changelog half way) into the embedded warehouse; the views must show what
`tests.oracle` computes from the same raw JSON: numbers, times to convert, and what is final.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest

from pipeline.definitions import Definitions
from pipeline.definitions_file import DEFAULT_FILE, loads
from pipeline.sinks.catalog import install
from pipeline.sinks.embedded import EmbeddedWarehouse
from schemas.rows import COLUMNS
from tests.integration.driving import arranged, consume, drivers, idle_topics, lanes, reported, reports, same
from tests.oracle import shops
from tests.oracle.finals import funnel_finals, kpi_finals, local_date, retention_finals, watermarks
from tests.oracle.shops import Sent
from tests.oracle.sql import Oracle, bucket_of_quantile

EXTRA = """
[[funnel]]
name = "plain"
conversion_window = "7d"
entry_window = "1w"
[[funnel.step]]
event = "view_item"
[[funnel.step]]
event = "add_to_cart"
[[funnel.step]]
event = "purchase"

[[funnel]]
name = "strict"
conversion_window = "1h"
entry_window = "1h"
order = "strict"
breakdown = "device"
[[funnel.step]]
events = ["page_view", "search"]
[[funnel.step]]
event = "view_item"

[[funnel]]
name = "any"
conversion_window = "2d"
entry_window = "1d"
order = "any"
[[funnel.step]]
event = "search"
[[funnel.step]]
event = "view_item"
where = { price = { gte = 50 }, device = { ne = "tablet" } }

[[funnel]]
name = "optional"
conversion_window = "1d"
entry_window = "1mo"
[[funnel.step]]
event = "order_created"
[[funnel.step]]
event = "payment_failed"
optional = true
[[funnel.step]]
event = "purchase"

[[funnel]]
name = "refunded"
conversion_window = "30d"
entry_window = "1mo"
[[funnel.step]]
event = "purchase"
[[funnel.step]]
event = "refund"

[[retention]]
name = "weekly"
cohort = { event = "add_to_cart", where = { country = ["DE", "AT", "FR"] } }
return = { event = "view_item", where = { price = { lt = 300 } } }
period = "week"
periods = 8
breakdown = "device"
value = "price"

[[kpi]]
name = "units"
aggregate = "sum"
event = "add_to_cart"
field = "quantity"
dimensions = ["item_category", "country"]
windows = ["1h", "1w"]
"""
EXTRA_OF = {
    "rees46": """
[[funnel]]
name = "minutes"
conversion_window = "20m"
entry_window = "1m"
[[funnel.step]]
event = "view_item"
[[funnel.step]]
event = "add_to_cart"
[[funnel.step]]
event = "purchase"

[[funnel]]
name = "categories"
conversion_window = "1h"
entry_window = "1h"
breakdown = "item_category"
hold_constant = "item_id"
[[funnel.step]]
event = "view_item"
[[funnel.step]]
event = "add_to_cart"
[[funnel.step]]
event = "purchase"
""",
    "online_retail": """
[[retention]]
name = "buyers"
cohort = { event = "purchase" }
return = { event = "purchase" }
period = "month"
periods = 12

[[retention]]
name = "cancelled"
cohort = { event = "purchase" }
return = { event = "refund" }
period = "week"
periods = 52
value = "refund_value"
""",
    "helpdesk": """
[[funnel]]
name = "tickets"
conversion_window = "30d"
entry_window = "1mo"
[[funnel.step]]
event = "Take in charge ticket"
[[funnel.step]]
event = "Resolve ticket"
[[funnel.step]]
event = "Closed"

[[funnel]]
name = "by_whom"
conversion_window = "7d"
entry_window = "1w"
breakdown = "channel"
[[funnel.step]]
event = "Assign seriousness"
[[funnel.step]]
event = "Take in charge ticket"
[[funnel.step]]
event = "Wait"
optional = true
[[funnel.step]]
event = "Resolve ticket"
[[funnel.exclusion]]
event = "Require upgrade"

[[retention]]
name = "reopened"
cohort = { event = "Resolve ticket" }
return = { events = ["Take in charge ticket", "Wait"] }
period = "week"
periods = 12
breakdown = "channel"

[[kpi]]
name = "resolved"
aggregate = "users"
event = "Resolve ticket"
dimensions = ["channel"]
windows = ["1h", "1w", "1mo"]
""",
}
ZONES = {
    "generated": "Europe/Berlin",
    "ecom": "Asia/Shanghai",
    "rees46": "UTC",
    "online_retail": "Europe/London",
    "helpdesk": "Europe/Rome",
}
WINDOWS = {
    "generated": '"1m", "1h", "1d"',
    "ecom": '"1h", "1d"',
    "rees46": '"1m", "1h", "1d"',
    "online_retail": '"1d"',
    "helpdesk": '"1d"',
}  # months of minutes are slow
ARRIVALS = ("in_order", "shuffled", "duplicated")
DAY_MS = 86_400_000
WHOLE_SPAN = "SELECT level, count() FROM (SELECT user, windowFunnel({window})(toUInt64(ts), {steps}) AS level FROM oracle.events GROUP BY user) GROUP BY level"


@pytest.fixture(scope="module")
def warehouse() -> Iterator[EmbeddedWarehouse]:
    opened = EmbeddedWarehouse("")
    opened.migrate()
    yield opened
    opened.close()


@dataclass(frozen=True)
class Case:
    definitions: Definitions
    messages: list[Sent]
    idle: frozenset[str]
    funnels: dict[Any, int]
    times: dict[Any, list[int]]
    retentions: dict[Any, Any]
    kpis: dict[Any, Decimal]
    figures: dict[str, Any]


@pytest.fixture(scope="module")
def case_of(warehouse: EmbeddedWarehouse) -> Callable[[str], Case]:
    known: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in known:
            messages = getattr(shops, name)()
            text = DEFAULT_FILE.read_text().replace('time_zone = "UTC"', f'time_zone = "{ZONES[name]}"')
            definitions = loads(text.replace('"1m", "1h", "1d"', WINDOWS[name]) + EXTRA + EXTRA_OF.get(name, ""))
            assert definitions.time_zone == ZONES[name]
            oracle = Oracle(warehouse.query, definitions, [(m.topic, m.value) for m in messages])
            numbers = oracle.funnels(), oracle.times(), oracle.retentions(), oracle.kpis()
            assert all(numbers)
            known[name] = Case(definitions, messages, idle_topics(messages), *numbers, figures(warehouse, name))
        return known[name]

    return make


def empty(warehouse: EmbeddedWarehouse, definitions: Definitions) -> None:
    for table in COLUMNS:
        warehouse.query(f"TRUNCATE TABLE {table}")
    install(warehouse, definitions, 1)


# --- the sets are what is known of them --------------------------------------------------------------------------------


def reached(warehouse: EmbeddedWarehouse, window_ms: int, *events: str) -> list[int]:
    """Users who got to each step or further, over a set's whole span."""
    steps = ", ".join(f"event = '{event}'" for event in events)
    levels = dict(warehouse.query(WHOLE_SPAN.format(window=window_ms, steps=steps)))
    return [sum(int(n) for level, n in levels.items() if level >= step) for step in range(1, len(events) + 1)]


def figures(warehouse: EmbeddedWarehouse, name: str) -> dict[str, Any]:
    """What `facts.json` says of a set, asked of the events as they are compared here."""
    if name == "ecom":
        steps = "view_item", "add_to_cart", "purchase"
        return {"1d": reached(warehouse, DAY_MS, *steps), "7d": reached(warehouse, 7 * DAY_MS, *steps)}
    if name == "rees46":
        paid = warehouse.query("SELECT toString(sum(n_value)) FROM oracle.events WHERE event = 'purchase'")[0][0]
        return {"1d": reached(warehouse, DAY_MS, "view_item", "add_to_cart", "purchase"), "paid": float(paid)}
    if name == "helpdesk":
        activities = warehouse.query("SELECT event, count() FROM oracle.events GROUP BY event")
        return {
            "30d": reached(warehouse, 30 * DAY_MS, "Take in charge ticket", "Resolve ticket", "Closed"),
            "activities": {event: int(n) for event, n in activities},
        }
    return {}


def test_ecom_has_the_known_figures(case_of: Callable[[str], Case]) -> None:
    facts, case = shops.facts("ecom"), case_of("ecom")
    assert len(case.messages) == facts["rows"]
    assert case.figures == {"1d": facts["funnel"]["1d"], "7d": facts["funnel"]["7d"]}


def test_rees46_has_the_known_figures(case_of: Callable[[str], Case]) -> None:
    facts, case = shops.facts("rees46"), case_of("rees46")
    assert len(case.messages) == facts["rows"]
    assert case.figures == {"1d": facts["funnel"]["1d"], "paid": facts["purchase_revenue"]}


def test_helpdesk_has_the_known_figures(case_of: Callable[[str], Case]) -> None:
    facts, case = shops.facts("helpdesk"), case_of("helpdesk")
    assert case.figures == {"30d": facts["funnel_case"]["30d"], "activities": facts["activities"]}


def test_online_retail_has_the_known_cohorts(case_of: Callable[[str], Case]) -> None:
    """A retention of Shopstream's, every cell of it, against figures published for the set."""
    found: dict[str, dict[str, int]] = {}
    for (name, start, _, n), (users, _, _) in case_of("online_retail").retentions.items():
        if name == "buyers" and users:
            found.setdefault(local_date(start, "Europe/London").isoformat()[:7], {})[str(n)] = users
    assert found == shops.facts("online_retail")["monthly_cohorts_customers"]


# --- reports ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrival", ARRIVALS)
@pytest.mark.parametrize("partitions", [1, 4, 7])
@pytest.mark.parametrize("name", ZONES)
def test_reports_equal_sql(case_of: Callable[[str], Case], warehouse: EmbeddedWarehouse, name: str, partitions: int, arrival: str) -> None:
    case = case_of(name)
    empty(warehouse, case.definitions)
    r = random.Random(f"{name} {partitions} {arrival}")
    messages = arranged(case.messages, arrival, case.definitions.lateness_ms, r)
    garbage = consume(drivers(case.definitions, partitions, warehouse, case.idle), messages, r)

    found = reports(warehouse)
    same("funnel_report", found.funnels, case.funnels)
    same("retention_report", found.retentions, case.retentions)
    same("kpi_report", found.kpis, case.kpis)
    same("median_ms and p90_ms of funnel_report", found.times, quantiles(case))
    at = watermarks(lanes(case.messages, partitions), case.idle)
    same("final of funnel_report", found.funnel_finals, funnel_finals(case.definitions, case.funnels, at.smallest))
    same("final of kpi_report", found.kpi_finals, kpi_finals(case.definitions, case.kpis, at.smallest))
    # where both answers are right, what the report says is
    right = retention_finals(case.definitions, case.retentions, at)
    wanted = {
        key: found.retention_finals[key] if found.retention_finals.get(key) in answers else min(answers) for key, answers in right.items()
    }
    same("final of retention_report", found.retention_finals, wanted)
    counts = warehouse.query(
        "SELECT sum(a), sum(d), sum(l) FROM (SELECT argMax(applied, version) AS a, argMax(duplicates, version) AS d, argMax(too_late, version) AS l "
        "FROM progress GROUP BY topic, partition)"
    )
    assert [int(n) for n in counts[0]] == [len(case.messages), len(messages) - len(case.messages), 0]
    assert int(warehouse.query("SELECT count() FROM (SELECT DISTINCT topic, partition, offset FROM rejects)")[0][0]) == garbage


def quantiles(case: Case) -> dict[Any, tuple[int, ...]]:
    """The buckets that hold the exact median and 90th percentile; 0 where nobody stopped."""
    both = Decimal("0.5"), Decimal("0.9")
    return {key: tuple(bucket_of_quantile(q, case.times[key]) if key in case.times else 0 for q in both) for key in case.funnels}


@pytest.mark.parametrize("name", ZONES)
def test_what_is_final_does_not_change_any_more(case_of: Callable[[str], Case], warehouse: EmbeddedWarehouse, name: str) -> None:
    case = case_of(name)
    empty(warehouse, case.definitions)
    r = random.Random(name)
    messages = arranged(case.messages, "shuffled", case.definitions.lateness_ms, r)
    driving = drivers(case.definitions, 4, warehouse, case.idle)
    for until in (len(messages) // 2, len(messages) * 3 // 4):
        consume(driving, messages[len(messages) // 2 if until > len(messages) // 2 else 0 : until], r)
        funnels, retentions, kpis = reported(warehouse, "final = 1")
        assert name == "rees46" or (funnels and retentions and kpis)  # rees46 is three hours long
        same("funnel_report, final", funnels, {key: case.funnels.get(key) for key in funnels})
        same(
            "retention_report, final",
            without_later(retentions),
            without_later({key: case.retentions.get(key, (0, 0, 0)) for key in retentions}),
        )
        same("kpi_report, final", kpis, {key: case.kpis.get(key) for key in kpis})


def without_later(retentions: dict[Any, Any]) -> dict[Any, Any]:
    """`final` is of a period's users and value; users_on_or_after is as final as the last period's row."""
    return {key: (users, value) for key, (users, _, value) in retentions.items()}
