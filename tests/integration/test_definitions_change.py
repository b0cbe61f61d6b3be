"""A definition that is changed, and changed back, while the state lives on: what the reports show, against SQL over the events each version saw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.definitions import Definitions
from pipeline.definitions_file import loads
from pipeline.sinks.catalog import install
from pipeline.sinks.embedded import EmbeddedWarehouse
from tests.integration.driving import Driver, consume, drivers, reported, same
from tests.oracle import shops
from tests.oracle.shops import Sent
from tests.oracle.sql import Oracle

PARTITIONS = 2


def definitions(conversion_window: str) -> Definitions:
    return loads(f"""
        [[funnel]]
        name = "checkout"
        conversion_window = "{conversion_window}"
        [[funnel.step]]
        event = "view_item"
        [[funnel.step]]
        event = "purchase"

        [[retention]]
        name = "visits"
        cohort = {{ event = "*" }}
        period = "{"week" if conversion_window == "1h" else "day"}"

        [[kpi]]
        name = "views"
        aggregate = "users"
        event = "view_item"
        windows = ["1d"]
        dimensions = ["{"device" if conversion_window == "1h" else "channel"}"]
    """)


@pytest.fixture
def warehouse() -> Iterator[EmbeddedWarehouse]:
    opened = EmbeddedWarehouse("")
    opened.migrate()
    yield opened
    opened.close()


def equal_to_sql(warehouse: EmbeddedWarehouse, wanted: Definitions, events: list[Sent]) -> None:
    oracle = Oracle(warehouse.query, wanted, [(m.topic, m.value) for m in events])
    truth: tuple[Any, ...] = oracle.funnels(), oracle.retentions(), oracle.kpis()
    for kind, found, true in zip(("funnel_report", "retention_report", "kpi_report"), reported(warehouse), truth, strict=True):
        assert true
        same(kind, found, true)


def change(driving: list[Driver], warehouse: EmbeddedWarehouse, to: Definitions, now_ms: int) -> None:
    install(warehouse, to, now_ms)
    for driver in driving:
        driver.restart(to)


def test_version_that_comes_back_has_counted_on_all_the_time(warehouse: EmbeddedWarehouse) -> None:
    first, second = definitions("1d"), definitions("1h")
    messages = shops.generated()
    third = len(messages) // 3
    parts = messages[:third], messages[third : 2 * third], messages[2 * third :]
    r = random.Random(1)
    install(warehouse, first, 1)
    driving = drivers(first, PARTITIONS, warehouse, frozenset())
    consume(driving, parts[0], r)
    equal_to_sql(warehouse, first, parts[0])

    change(driving, warehouse, second, 2)
    consume(driving, parts[1], r)
    equal_to_sql(warehouse, second, parts[1])  # a new version sees the events from then on

    change(driving, warehouse, first, 3)
    consume(driving, parts[2], r)
    equal_to_sql(warehouse, first, messages)

    change(driving, warehouse, second, 4)
    equal_to_sql(warehouse, second, parts[1] + parts[2])
