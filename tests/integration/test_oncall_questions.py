"""What on-call's gauges ask of a large warehouse is bounded: few cells are read of millions, and the worker's sink thread is soon free again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from pipeline.definitions_file import load
from pipeline.sinks.catalog import install
from pipeline.sinks.embedded import EmbeddedWarehouse
from pipeline.sinks.server import Endpoint, ServerWarehouse
from pipeline.telemetry.metrics import FUNNEL_USERS, KPI_VALUE
from pipeline.telemetry.watched import questions
from tests import clickhouse_server
from tests.clickhouse_server import ClickHouseServer
from tests.sample_warehouse import fill, sample_records

DAY, HOUR, MINUTE = 86_400, 3600, 60
END = int(datetime(2026, 3, 1, tzinfo=UTC).timestamp())
DAYS = 40
MOST_READ = 500_000  # a granule of 8192 cells for each KPI, window and age, whatever else there is
MOST_SECONDS = 2.0  # measured: 0.1 s, of 10 million cells too; the machines of CI are busy


@pytest.fixture(scope="module")
def server() -> Iterator[ClickHouseServer]:
    clickhouse_server.require()
    with ClickHouseServer() as started:
        yield started


def cells(warehouse: ServerWarehouse, kpi: str, definition: str, window: str, seconds: int, dimension: str, currency: str) -> None:
    """One a window of the last DAYS; the n-th before the end counts n."""
    warehouse.query(
        "INSERT INTO kpi_cells SELECT %(kpi)s, %(definition)s, %(window)s, toDateTime(%(end)s - %(seconds)s * (1 + number)), %(dimension)s, "
        "%(dimension)s, %(currency)s, -1, 0, toInt64(1 + number), 0, 1 FROM system.numbers LIMIT %(n)s",
        {
            "kpi": kpi, "definition": definition, "window": window, "end": END, "seconds": seconds, "dimension": dimension,
            "currency": currency, "n": DAYS * DAY // seconds,
        },
    )  # fmt: skip


def test_few_cells_are_read_of_millions(server: ClickHouseServer) -> None:
    definitions = load(None)
    endpoint = Endpoint("127.0.0.1", server.port, "worker", server.password)
    warehouse = ServerWarehouse(endpoint)
    warehouse.migrate()
    install(warehouse, definitions, 1)
    versions = {
        str(kpi): str(version) for kpi, version in warehouse.query("SELECT kpi, definition FROM current_kpis WHERE kind != 'formula'")
    }
    for kpi in definitions.kpis:
        for window, seconds in (("1m", MINUTE), ("1h", HOUR), ("1d", DAY)):
            if kpi.name in versions and window in kpi.windows:
                for dimension in ("", *kpi.dimensions):
                    cells(warehouse, kpi.name, versions[kpi.name], window, seconds, dimension, "EUR" if kpi.money else "")
    warehouse.query(
        "INSERT INTO funnel_cells SELECT 'checkout', %(version)s, toDateTime(%(end)s - 86400 * (1 + intDiv(number, 40000))), '', "
        "toUInt8(1 + number %% 2), toInt32(intDiv(number, 2) %% 100), toInt32(intDiv(number, 200)), 3, 0, 1 FROM system.numbers LIMIT 560000",
        {"version": definitions.funnels[0].version, "end": END},
    )
    warehouse.query("INSERT INTO progress SELECT 'clickstream', 0, 1, %(end)s * toInt64(1000), 1, 0, 0, 0, 0, 1, 0", {"end": END})
    stored = [int(warehouse.query(f"SELECT count() FROM {table}")[0][0]) for table in ("kpi_cells", "funnel_cells")]
    assert sum(stored) > 2_500_000
    warehouse.close()

    bounded = ServerWarehouse(endpoint, settings={"max_rows_to_read": MOST_READ})
    questions(bounded, definitions)
    began = time.perf_counter()
    found: dict[tuple[Any, ...], float] = {(r.metric, *r.labels): r.value for r in questions(bounded, definitions)}
    assert time.perf_counter() - began < MOST_SECONDS
    bounded.close()
    for window, a_week in (("1m", 7 * 1440), ("1h", 7 * 24), ("1d", 7)):
        for kpi in ("payment_failures", "page_errors", "paid_orders"):
            assert found[KPI_VALUE, kpi, window, "newest"] == 1
            assert found[KPI_VALUE, kpi, window, "week_before"] == 1 + a_week
        assert found[KPI_VALUE, "close_rate", window, "newest"] == 1
    assert found[FUNNEL_USERS, "checkout", "1", "newest"] == 3 * 40_000
    assert found[FUNNEL_USERS, "checkout", "2", "week_before"] == 3 * 20_000


def test_the_embedded_warehouse_answers_them_too() -> None:
    definitions = load(None)
    warehouse = EmbeddedWarehouse("")
    fill(warehouse, definitions, sample_records())
    found = {(r.metric, *r.labels): r.value for r in questions(warehouse, definitions)}
    largest = int(warehouse.query("SELECT largest FROM watermarks")[0][0])
    start = (largest // 1000 // DAY - 1) * DAY
    rows = warehouse.query(
        "SELECT kpi, value FROM kpi_report WHERE window = '1d' AND dimension = '' AND currency IN ('', 'EUR') AND toUnixTimestamp(window_start) = %(start)s",
        {"start": start},
    )
    warehouse.close()
    assert len(rows) > 10
    for kpi, value in rows:
        assert found[KPI_VALUE, str(kpi), "1d", "newest"] == pytest.approx(float(value), rel=1e-12)
    assert found[FUNNEL_USERS, "checkout", "1", "newest"] > 0
