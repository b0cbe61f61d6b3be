"""What every Warehouse must do, on each implementation: chdb in process, Debian's ClickHouse 18.16 over TCP, chdb shared between processes."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.definitions import ORDER_HORIZON_MS, Definitions, Funnel, Kpi, Match, Retention, Step
from pipeline.definitions_version import at_revision, version_at
from pipeline.sinks import revisions
from pipeline.sinks.catalog import install
from pipeline.sinks.open import open_warehouse
from pipeline.sinks.shared import KEY_VARIABLE, SharedWarehouse, new_key
from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable, Warehouse
from pipeline.tables.kernel import HISTOGRAM_UPPER, histogram_bucket
from schemas.rows import COLUMNS, Rows
from tests import clickhouse_server
from tests.clickhouse_server import ClickHouseServer, free_port

DAY = 86_400_000
HOUR = 3_600_000
T0 = 1_700_006_400_000  # 2023-11-15 00:00 UTC
LATER = T0 + 100 * DAY
REPORTS = ("funnel_report", "retention_report", "kpi_report")
TABLES = (*COLUMNS, "catalog_funnels", "catalog_retentions", "catalog_kpis", "revisions")

HOST = """
import sys
from pipeline.sinks.embedded import EmbeddedWarehouse
from pipeline.sinks.shared import serve
server = serve(EmbeddedWarehouse(sys.argv[1]))
print(server.url, flush=True)
sys.stdin.read()
"""


class SharedHost:
    """A process that holds an embedded warehouse and serves it; ends when its standard input does, so with this process."""

    def __init__(self, folder: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOST, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        self.address = ("127.0.0.1", int(self.url.rsplit(":", 1)[1]))

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass
class Implementation:
    name: str
    warehouse: Warehouse
    unmigrated: Callable[[], Warehouse]
    """Opens one more handle on a second, still empty warehouse."""


@pytest.fixture(scope="module")
def key() -> Iterator[str]:
    value = new_key()
    os.environ[KEY_VARIABLE] = value
    yield value
    del os.environ[KEY_VARIABLE]


@pytest.fixture(scope="module", params=["embedded", "server", "shared"])
def implementation(request: pytest.FixtureRequest, key: str) -> Iterator[Implementation]:
    with tempfile.TemporaryDirectory() as folder:
        if request.param == "embedded":
            from pipeline.sinks.embedded import EmbeddedWarehouse
            from pipeline.sinks.migrations import Deployment

            warehouse = open_warehouse(f"chdb://{folder}/it's a folder")
            yield Implementation("embedded", warehouse, lambda: EmbeddedWarehouse(f"{folder}/it's a folder", Deployment("second")))
            warehouse.close()
        elif request.param == "server":
            clickhouse_server.require()
            # A time zone with daylight saving: no number may depend on the server's.
            with ClickHouseServer(("shopstream", "second"), time_zone="America/New_York") as server:
                warehouse = open_warehouse(server.url(), server.password)
                yield Implementation("server", warehouse, lambda: open_warehouse(server.url("second"), server.password))
                warehouse.close()
        else:
            host, second = SharedHost(folder + "/first"), SharedHost(folder + "/second")
            try:
                warehouse = open_warehouse(host.url)
                yield Implementation("shared", warehouse, lambda: open_warehouse(second.url))
                warehouse.close()
            finally:
                host.stop()
                second.stop()


@pytest.fixture
def warehouse(implementation: Implementation) -> Warehouse:
    implementation.warehouse.migrate()
    empty(implementation.warehouse)
    return implementation.warehouse


def empty(warehouse: Warehouse) -> None:
    for table in TABLES:
        warehouse.query(f"TRUNCATE TABLE {table}")


def columns(table: str, rows: list[dict[str, Any]]) -> Rows:
    return {table: {name: [row[name] for row in rows] for name in COLUMNS[table]}}


def funnel_cell(level: int, value: int, partition: int = 0, **other: Any) -> dict[str, Any]:
    return {
        "funnel": "checkout", "definition": "v1", "window_start": T0, "segment": "", "level": level, "bucket": 0, "partition": partition,
        "value": value, "final_at": T0 + 2 * DAY, "version": 1,
    } | other  # fmt: skip


def retention_cell(period: int, measure: str, value: int, partition: int = 0, **other: Any) -> dict[str, Any]:
    return {
        "retention": "weekly", "definition": "v1", "cohort_start": T0, "segment": "", "period": period, "measure": measure,
        "partition": partition, "value": value, "final_at": T0 + (7 * (period + 1) + 1) * DAY, "version": 1,
    } | other  # fmt: skip


def kpi_cell(kpi: str, value: int, partition: int = 0, **other: Any) -> dict[str, Any]:
    return {
        "kpi": kpi, "definition": "v1", "window": "1d", "window_start": T0, "dimension": "", "dimension_value": "", "currency": "",
        "bucket": -1, "partition": partition, "value": value, "final_at": T0 + 2 * DAY, "version": 1,
    } | other  # fmt: skip


def progress(partition: int, watermark: int, topic: str = "clickstream", version: int = 1) -> dict[str, Any]:
    return {
        "topic": topic, "partition": partition, "next_offset": 10, "watermark": watermark, "applied": 9, "duplicates": 0, "rejected": 1,
        "too_late": 0, "rekeyed": 0, "version": version, "revision": 0,
    }  # fmt: skip


def reject(offset: int, raw: bytes, **other: Any) -> dict[str, Any]:
    return {
        "topic": "clickstream", "partition": 0, "offset": offset, "reason": "not_json", "cause": "at byte 0", "key": b"u1", "raw": raw,
        "record_ts": T0, "version": 1,
    } | other  # fmt: skip


def steps(*names: str) -> tuple[Step, ...]:
    return tuple(Step(name, Match((name,))) for name in names)


CHECKOUT = Funnel("checkout", steps("view", "cart", "pay"), HOUR, "1d", version="v1")
WEEKLY = Retention("weekly", Match(("sign_up",)), Match(("*",)), "week", 6, version="v1")


def stored(name: str, aggregate: str = "count", **other: Any) -> Kpi:
    return Kpi(name, "events", aggregate, version="v1", **other)


def formula(name: str, left: str, operator: Any, right: str) -> Kpi:
    return Kpi(name, "formula", left=left, operator=operator, right=right, version="v1")


def at(ms: int) -> datetime:
    return datetime.fromtimestamp(ms // 1000, UTC)


# --- migrations ------------------------------------------------------------------------------------------------------


def test_migrations_run_once_even_from_many_processes_at_a_time(implementation: Implementation) -> None:
    handles = [implementation.unmigrated() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        applied = list(pool.map(lambda handle: handle.migrate(), handles))
    names = [name for (name,) in handles[0].query("SELECT DISTINCT name FROM schema_migrations ORDER BY name")]
    assert names == ["0001_base_tables", "0002_catalog", "0003_reports", "0004_shop", "0005_revisions"]
    assert {name for some in applied for name in some} == set(names)
    assert [handle.migrate() for handle in handles] == [[], [], [], []]
    for handle in handles:
        assert handle.query("SELECT * FROM kpi_report") == []
        handle.close()


def test_histogram_bounds_are_those_of_the_kernels(warehouse: Warehouse) -> None:
    rows = warehouse.query("SELECT DISTINCT bucket, upper_ms FROM histogram_bounds ORDER BY bucket")
    assert rows == list(enumerate(HISTOGRAM_UPPER.tolist()))


# --- base tables -----------------------------------------------------------------------------------------------------

HOSTILE = ["", "a'b\\c", "\0", "tab\tline\nreturn\r", "é 漢字 🛒", "%(x)s %", "{a:String}", "'; DROP TABLE progress; --", "x" * 10_000]


def test_every_base_table_gives_back_what_was_inserted(warehouse: Warehouse) -> None:
    given_rows: dict[str, list[dict[str, Any]]] = {
        "funnel_cells": [funnel_cell(1, i, segment=text, funnel=text) for i, text in enumerate(HOSTILE)],
        "retention_cells": [retention_cell(i, "value", -i, segment=text) for i, text in enumerate(HOSTILE)],
        "kpi_cells": [kpi_cell("n", 2**62 + i, dimension_value=text, dimension=text) for i, text in enumerate(HOSTILE)],
        "rejects": [reject(i, b"{}", cause=text, key=text.encode()) for i, text in enumerate(HOSTILE)],
        "progress": [progress(i, T0 + i, topic=text) for i, text in enumerate(HOSTILE)],
    }
    warehouse.insert({table: columns(table, rows)[table] for table, rows in given_rows.items()})
    for table, rows in given_rows.items():
        names = COLUMNS[table]
        expected = []
        for row in rows:
            row = {name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()}
            expected.append(tuple(at(row[n]) if n in ("window_start", "cohort_start") else row[n] for n in names))
        assert sorted(warehouse.query(f"SELECT {', '.join(names)} FROM {table}")) == sorted(expected)


def test_rejects_keep_any_bytes(warehouse: Warehouse) -> None:
    raws = [b"", b"\0", b"\xff\xfe\0{", bytes(range(256)), "ü".encode("latin-1"), b"'\\n\n", b"z" * 100_000]
    warehouse.insert(columns("rejects", [reject(i, raw, key=raw) for i, raw in enumerate(raws)]))
    rows = warehouse.query("SELECT hex(raw), hex(key) FROM rejects ORDER BY offset")
    assert [(bytes.fromhex(raw), bytes.fromhex(key)) for raw, key in rows] == [(raw, raw) for raw in raws]
    assert warehouse.query("SELECT raw FROM rejects WHERE offset = 2") == [(b"\xff\xfe\0{",)]


def test_a_record_without_key_is_kept_with_an_empty_one(warehouse: Warehouse) -> None:
    warehouse.insert(columns("rejects", [reject(0, b"x", key=None), reject(1, b"y", key=b"k")]))
    assert warehouse.query("SELECT key FROM rejects ORDER BY offset") == [("",), ("k",)]


def test_windows_before_and_after_clock_changes_and_in_2099_are_kept_to_the_second(warehouse: Warehouse) -> None:
    starts = [0, 1_698_541_200_000, 1_699_164_000_000, 1_699_167_600_000, 1_711_846_800_000, 4_102_444_799_000]
    warehouse.insert(columns("kpi_cells", [kpi_cell("n", 1, window_start=start) for start in starts]))
    assert [
        ms for (ms,) in warehouse.query("SELECT toInt64(toUnixTimestamp(window_start)) * 1000 FROM kpi_cells ORDER BY window_start")
    ] == starts


def test_nothing_to_insert_is_no_error(warehouse: Warehouse) -> None:
    warehouse.insert({})
    warehouse.insert({"progress": {name: [] for name in COLUMNS["progress"]}})
    assert warehouse.query("SELECT count() FROM progress") == [(0,)]


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("progress", {"next_offset": ["ten"]}),
        ("progress", {"watermark": [1.5]}),
        ("progress", {"topic": [7]}),
        ("progress", {"version": [-1]}),
        ("progress", {"partition": [2**31]}),
        ("progress", {"surprise": [1]}),
        ("progress", {"applied": [1, 2]}),
        ("kpi_cells", {"window_start": [-DAY]}),
        ("kpi_cells", {"dimension_value": ["\ud800"]}),
        ("kpi_cells", {"value": [2**63]}),
    ],
)
def test_a_row_of_the_wrong_type_is_refused_and_leaves_nothing(warehouse: Warehouse, table: str, change: dict[str, Any]) -> None:
    row = progress(0, T0) if table == "progress" else kpi_cell("n", 1)
    rows = columns(table, [row])
    rows[table].update(change)
    with pytest.raises(SinkRefused):
        warehouse.insert(rows)
    assert warehouse.query(f"SELECT count() FROM {table}") == [(0,)]
    warehouse.insert(columns(table, [row]))
    assert warehouse.query(f"SELECT count() FROM {table}") == [(1,)]


def test_an_unknown_table_or_column_is_refused(warehouse: Warehouse) -> None:
    for sql in ("SELECT * FROM nowhere", "SELECT nothing FROM progress", "SELEC 1"):
        with pytest.raises(SinkRefused):
            warehouse.query(sql)
    with pytest.raises(SinkRefused):
        warehouse.insert({"nowhere": {"a": [1]}})
    assert warehouse.query("SELECT 1") == [(1,)]


@pytest.mark.parametrize("text", HOSTILE)
def test_parameters_are_bound_not_interpreted(warehouse: Warehouse, text: str) -> None:
    sql = "SELECT %(text)s, %(text)s = %(same)s, '%%', 2 IN %(numbers)s"
    assert warehouse.query(sql, {"text": text, "same": text, "numbers": [1, 2]}) == [(text, 1, "%", 1)]


# --- newest version ----------------------------------------------------------------------------------------------------

CELLS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 4), st.integers(0, 50)), min_size=1, max_size=25
)  # partition, dimension value, version, value


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=CELLS, seed=st.integers(0, 1000), repeats=st.integers(1, 3))
def test_newest_version_wins_in_any_order_and_repetition_changes_nothing(
    warehouse: Warehouse, cells: list[tuple[int, int, int, int]], seed: int, repeats: int
) -> None:
    empty(warehouse)
    install(warehouse, Definitions(kpis=(stored("n"),)), 1)
    of_version = {(partition, dimension, version): value for partition, dimension, version, value in cells}
    newest: dict[tuple[int, int], int] = {}
    for partition, dimension, version in sorted(of_version, key=lambda cell: cell[2]):
        newest[partition, dimension] = of_version[partition, dimension, version]
    sums: dict[str, int] = {}
    for (_, dimension), value in newest.items():
        sums[str(dimension)] = sums.get(str(dimension), 0) + value
    rows = [
        kpi_cell("n", value, partition, dimension="d", dimension_value=str(dimension), version=version)
        for (partition, dimension, version), value in of_version.items()
    ] * repeats
    random.Random(seed).shuffle(rows)
    for i in range(0, len(rows), 7):
        warehouse.insert(columns("kpi_cells", rows[i : i + 7]))
    report = warehouse.query("SELECT dimension_value, value FROM kpi_report")
    assert sorted(report) == sorted((dimension, Decimal(total)) for dimension, total in sums.items() if total)


# --- funnels -----------------------------------------------------------------------------------------------------------


def funnel_users(warehouse: Warehouse) -> list[tuple[Any, ...]]:
    return warehouse.query("SELECT segment, step, step_name, users FROM funnel_report ORDER BY funnel, window_start, segment, step")


def test_funnel_report_adds_partitions_and_counts_who_reached_at_least_each_step(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(funnels=(CHECKOUT,)), 1)
    cells = [
        funnel_cell(1, 5),
        funnel_cell(2, 3, bucket=4),
        funnel_cell(2, 1, bucket=9),
        funnel_cell(1, 2, 1),
        funnel_cell(3, 4, 1),
        funnel_cell(1, 1, segment="ads"),
    ]
    warehouse.insert(columns("funnel_cells", cells))
    assert funnel_users(warehouse) == [
        ("", 1, "view", 15), ("", 2, "cart", 8), ("", 3, "pay", 4),
        ("ads", 1, "view", 1), ("ads", 2, "cart", 0), ("ads", 3, "pay", 0),
    ]  # fmt: skip
    assert warehouse.query("SELECT DISTINCT funnel, window_start FROM funnel_report") == [("checkout", at(T0))]


def test_zombies_older_rows_change_no_report(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(funnels=(CHECKOUT,)), 1)
    warehouse.insert(columns("funnel_cells", [funnel_cell(1, 5, version=7), funnel_cell(2, 0, version=7)]))
    warehouse.insert(columns("funnel_cells", [funnel_cell(1, 4, version=6), funnel_cell(2, 1, version=6)] * 2))
    assert [users for *_, users in funnel_users(warehouse)] == [5, 0, 0]
    warehouse.query("OPTIMIZE TABLE funnel_cells FINAL")
    assert [users for *_, users in funnel_users(warehouse)] == [5, 0, 0]


def test_a_window_whose_users_were_all_retracted_leaves_the_report(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(funnels=(CHECKOUT,)), 1)
    warehouse.insert(columns("funnel_cells", [funnel_cell(1, 5)]))
    warehouse.insert(columns("funnel_cells", [funnel_cell(1, 0, version=2)]))
    assert funnel_users(warehouse) == []


def test_time_to_convert_is_the_nearest_rank_of_the_last_steps_histogram(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(funnels=(CHECKOUT,)), 1)
    times = [1000, 2000, 3000, 50_000, 3_600_000]
    buckets = [histogram_bucket(HISTOGRAM_UPPER, ms) for ms in times]
    warehouse.insert(columns("funnel_cells", [funnel_cell(3, 1, i % 2, bucket=bucket) for i, bucket in enumerate(buckets)]))
    upper = [int(HISTOGRAM_UPPER[bucket]) for bucket in buckets]
    assert warehouse.query("SELECT median_ms, p90_ms FROM funnel_report WHERE step = 3") == [(upper[2], upper[4])]


def test_final_waits_for_the_slowest_partition_and_ignores_those_without_events(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(funnels=(CHECKOUT,), retentions=(WEEKLY,), kpis=(stored("n"),)), 1)
    warehouse.insert({
        **columns("funnel_cells", [funnel_cell(1, 5)]),
        **columns("retention_cells", [retention_cell(0, "users", 1, final_at=T0 + 2 * DAY)]),
        **columns("kpi_cells", [kpi_cell("n", 5)]),
    })  # fmt: skip

    def final() -> set[tuple[int]]:
        return {
            row
            for report in REPORTS
            for row in warehouse.query(f"SELECT DISTINCT final FROM {report}{' WHERE period = 0' if 'ret' in report else ''}")
        }

    assert final() == {(0,)}
    warehouse.insert(columns("progress", [progress(0, T0 + 2 * DAY), progress(1, T0 + 2 * DAY - 1), progress(1, 0, "orders")]))
    assert final() == {(0,)}
    warehouse.insert(columns("progress", [progress(1, T0 + 2 * DAY, version=2)]))
    assert final() == {(1,)}


def test_ratio_is_final_with_its_slower_side_also_before_that_has_a_row(warehouse: Warehouse) -> None:
    paid, refunded = Kpi("paid", "orders", "paid", version="v1"), Kpi("refunded", "orders", "refunded_of_paid", version="v1")
    install(warehouse, Definitions(kpis=(paid, refunded, formula("refund_rate", "refunded", "/", "paid"))), 1)
    warehouse.insert(columns("kpi_cells", [kpi_cell("paid", 5)]) | columns("progress", [progress(0, T0 + 2 * DAY)]))
    report = "SELECT kpi, value, final FROM kpi_report ORDER BY kpi"
    assert warehouse.query(report) == [("paid", Decimal(5), 1), ("refund_rate", Decimal(0), 0)]
    warehouse.insert(columns("progress", [progress(0, T0 + 2 * DAY + ORDER_HORIZON_MS, version=2)]))
    assert warehouse.query(report) == [("paid", Decimal(5), 1), ("refund_rate", Decimal(0), 1)]


# --- retention -----------------------------------------------------------------------------------------------------------


def test_retention_report_shows_periods_that_have_begun_also_with_nobody(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(retentions=(WEEKLY,)), 1)
    cells = [
        retention_cell(0, "users", 6), retention_cell(0, "users", 4, 1), retention_cell(1, "users", 3), retention_cell(3, "users", 2, 1),
        retention_cell(0, "last", 5), retention_cell(0, "last", 2, 1), retention_cell(1, "last", 1), retention_cell(3, "last", 2, 1),
        retention_cell(3, "value", 123_456, 1), retention_cell(0, "value", 10_000),
    ]  # fmt: skip
    warehouse.insert(columns("retention_cells", cells) | columns("progress", [progress(0, T0 + 29 * DAY), progress(1, T0 + 20 * DAY)]))
    sql = "SELECT period, users, final, users_on_or_after, value FROM retention_report WHERE cohort_start = %(start)s ORDER BY period"
    assert warehouse.query(sql, {"start": at(T0)}) == [
        (0, 10, 1, 10, Decimal(1)), (1, 3, 1, 3, Decimal(0)), (2, 0, 0, 2, Decimal(0)), (3, 2, 0, 2, Decimal("12.3456")), (4, 0, 0, 0, Decimal(0)),
    ]  # fmt: skip


@pytest.mark.parametrize(("period", "begun"), [("day", 5), ("week", 5), ("month", 2)])
def test_a_period_begins_by_the_cohorts_own_midnight(warehouse: Warehouse, period: Any, begun: int) -> None:
    # 2023-12-31 16:00 UTC: the first of January in Shanghai. The watermark is 2024-02-29 16:00 UTC: the first of March there.
    start, march = 1_704_038_400_000, 1_709_222_400_000
    install(warehouse, Definitions(retentions=(Retention("r", Match(("a",)), Match(("b",)), period, 5, version="v1"),)), 1)
    warehouse.insert(columns("retention_cells", [retention_cell(0, "users", 1, retention="r", cohort_start=start)]))
    warehouse.insert(columns("progress", [progress(0, march)]))
    assert warehouse.query("SELECT max(period) FROM retention_report") == [(begun,)]
    warehouse.insert(columns("progress", [progress(0, march - 1, version=2)]))
    assert warehouse.query("SELECT max(period) FROM retention_report") == [(begun - (period == "month"),)]


def test_period_is_final_though_users_on_or_after_it_may_still_grow(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(retentions=(WEEKLY,)), 1)
    end = T0 + 8 * DAY
    cells = [retention_cell(0, "users", 6), retention_cell(0, "last", 6, final_at=T0 + 100 * DAY)]
    warehouse.insert(columns("retention_cells", cells) | columns("progress", [progress(0, end - 1)]))
    assert warehouse.query("SELECT users, final FROM retention_report WHERE period = 0") == [(6, 0)]
    warehouse.insert(columns("progress", [progress(0, end, version=2)]))
    assert warehouse.query("SELECT users, final FROM retention_report WHERE period = 0") == [(6, 1)]


def test_long_month_without_users_after_a_short_one_is_final_at_its_own_end(warehouse: Warehouse) -> None:
    february, april = 1_706_745_600_000, 1_711_929_600_000  # 2024, UTC
    march = 1_709_251_200_000
    install(warehouse, Definitions(retentions=(Retention("r", Match(("a",)), Match(("b",)), "month", 2, version="v1"),)), 1)
    cell = retention_cell(0, "users", 1, retention="r", cohort_start=february, final_at=march + DAY)
    warehouse.insert(columns("retention_cells", [cell]) | columns("progress", [progress(0, april + DAY - 1)]))
    assert warehouse.query("SELECT period, final FROM retention_report WHERE period < 2 ORDER BY period") == [(0, 1), (1, 0)]
    warehouse.insert(columns("progress", [progress(0, april + DAY + 3_600_000, version=2)]))
    assert warehouse.query("SELECT period, final FROM retention_report WHERE period < 2 ORDER BY period") == [(0, 1), (1, 1)]


# --- KPIs ------------------------------------------------------------------------------------------------------------------

BOARD = (
    stored("gmv", "sum", field="value", money=True),
    stored("refunds", "sum", field="refund_value", money=True),
    stored("buyers", "users"),
    stored("created"),
    stored("paid"),
    stored("load", "sum", field="load_ms"),
    Kpi("dwell_p90", "sessions", "dwell_quantile", quantile=0.9, version="v1"),
    formula("net_sales", "gmv", "-", "refunds"),
    formula("aov", "gmv", "/", "buyers"),
    formula("close_rate", "paid", "/", "created"),
    formula("refund_share", "refunds", "/", "gmv"),
    formula("created_and_paid", "created", "+", "paid"),
    formula("gmv_and_paid", "paid", "+", "load"),
)


def kpis(warehouse: Warehouse) -> dict[tuple[str, str], Decimal]:
    rows = warehouse.query("SELECT kpi, currency, value FROM kpi_report WHERE window = '1d' AND dimension = ''")
    assert len({(kpi, currency) for kpi, currency, _ in rows}) == len(rows)
    return {(kpi, currency): value for kpi, currency, value in rows}


def test_kpi_report_adds_partitions_and_computes_formulas_exactly(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(kpis=BOARD), 1)
    cells = [
        kpi_cell("gmv", 1_000_001, currency="EUR"), kpi_cell("gmv", 2_000_002, 1, currency="EUR"), kpi_cell("gmv", 70_000, currency="USD"),
        kpi_cell("refunds", 500_000, currency="EUR"), kpi_cell("refunds", 10_000, currency="GBP"),
        kpi_cell("buyers", 2), kpi_cell("buyers", 5, 1), kpi_cell("created", 8), kpi_cell("load", 15_000),
        kpi_cell("paid", 3, dimension="channel", dimension_value="ads"),
    ]  # fmt: skip
    warehouse.insert(columns("kpi_cells", cells))
    assert kpis(warehouse) == {
        ("gmv", "EUR"): Decimal("300.0003"), ("gmv", "USD"): Decimal(7), ("refunds", "EUR"): Decimal(50), ("refunds", "GBP"): Decimal(1),
        ("buyers", ""): Decimal(7), ("created", ""): Decimal(8), ("load", ""): Decimal("1.5"),
        ("net_sales", "EUR"): Decimal("250.0003"), ("net_sales", "USD"): Decimal(7), ("net_sales", "GBP"): Decimal(-1),
        ("aov", "EUR"): Decimal("42.85718571"), ("aov", "USD"): Decimal(1),
        ("close_rate", ""): Decimal(0), ("refund_share", "EUR"): Decimal("0.16666650"), ("refund_share", "USD"): Decimal(0),
        ("created_and_paid", ""): Decimal(8), ("gmv_and_paid", ""): Decimal("1.5"),
    }  # fmt: skip
    assert warehouse.query("SELECT kpi, dimension_value, value FROM kpi_report WHERE dimension = 'channel' ORDER BY kpi") == [
        ("created_and_paid", "ads", Decimal(3)), ("gmv_and_paid", "ads", Decimal(3)), ("paid", "ads", Decimal(3)),
    ]  # fmt: skip


def test_a_sum_beyond_a_floats_precision_stays_exact(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(kpis=BOARD), 1)
    cells = [kpi_cell("gmv", 4_000_000_000_000_000_001, partition, currency="EUR") for partition in (0, 1)]
    warehouse.insert(columns("kpi_cells", cells))
    assert kpis(warehouse)["gmv", "EUR"] == Decimal("800000000000000.0002")


def test_quantile_kpi_is_the_nearest_rank_over_all_partitions(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(kpis=BOARD), 1)
    cells = [
        kpi_cell("dwell_p90", 4, bucket=10),
        kpi_cell("dwell_p90", 5, 1, bucket=80),
        kpi_cell("dwell_p90", 1, bucket=200),
        kpi_cell("dwell_p90", 0, bucket=3),
    ]
    warehouse.insert(columns("kpi_cells", cells))
    assert kpis(warehouse)["dwell_p90", ""] == int(HISTOGRAM_UPPER[80])
    warehouse.insert(columns("kpi_cells", [kpi_cell("dwell_p90", 2, bucket=200, version=2)]))
    assert kpis(warehouse)["dwell_p90", ""] == int(HISTOGRAM_UPPER[200])


def test_every_column_of_a_report_can_be_asked_for_alone(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(funnels=(CHECKOUT,), retentions=(WEEKLY,), kpis=BOARD), 1)
    warehouse.insert({
        **columns("funnel_cells", [funnel_cell(1, 5)]),
        **columns("retention_cells", [retention_cell(0, "users", 1)]),
        **columns("kpi_cells", [kpi_cell("created", 5), kpi_cell("gmv", 1, currency="EUR")]),
    })  # fmt: skip
    expected = {
        "funnel_report": ["funnel", "window_start", "segment", "step", "step_name", "users", "final", "median_ms", "p90_ms"],
        "retention_report": ["retention", "cohort_start", "segment", "period", "users", "final", "users_on_or_after", "value"],
        "kpi_report": ["kpi", "window", "window_start", "dimension", "dimension_value", "value", "currency", "final"],
    }
    for report, names in expected.items():
        all_rows = warehouse.query(f"SELECT * FROM {report}")
        assert {len(row) for row in all_rows} == {len(names)}
        for i, name in enumerate(names):
            alone = warehouse.query(f"SELECT {name} FROM {report}")
            assert sorted(map(str, alone)) == sorted(str((row[i],)) for row in all_rows)
            assert warehouse.query(f"SELECT count() FROM {report} WHERE final = 0 AND toString({name}) != '~'") == [(len(all_rows),)]


def shop_of_cells(rng: random.Random) -> Rows:
    """Two definitions' cells of every family, in some windows, segments, currencies and partitions, each in two versions."""
    keys = [
        {
            "window_start": T0 + rng.randrange(5) * DAY,
            "partition": rng.randrange(3),
            "version": version,
            "definition": rng.choice(("v0", "v1")),
        }
        for _ in range(60)
        for version in (1, 2)
    ]
    funnel = [funnel_cell(rng.randint(1, 3), rng.randrange(4), segment=rng.choice("ab"), bucket=rng.randint(-1, 90), **key) for key in keys]
    kpi = [
        kpi_cell(
            rng.choice(("gmv", "refunds", "buyers", "created", "paid", "dwell_p90")), rng.randrange(4), currency=rng.choice(("", "EUR", "CHF")),
            bucket=rng.randint(-1, 90), window=rng.choice(("1h", "1d")), dimension=rng.choice(("", "channel")), dimension_value=rng.choice("ab"), **key,
        )
        for key in keys
    ]  # fmt: skip
    retention = [
        retention_cell(
            rng.randrange(4), rng.choice(("users", "last", "value")), rng.randrange(4), segment=rng.choice("ab"), partition=key["partition"],
            version=key["version"], definition=key["definition"], cohort_start=key["window_start"],
        )
        for key in keys
    ]  # fmt: skip
    return {
        **columns("funnel_cells", funnel), **columns("kpi_cells", kpi), **columns("retention_cells", retention),
        **columns("progress", [progress(0, T0 + 4 * DAY)]),
    }  # fmt: skip


def test_a_filter_of_a_report_leaves_the_rows_that_filtering_all_of_it_leaves(warehouse: Warehouse) -> None:
    """Servers move filters into the views, through joins and groups: that may make them quick, never other."""
    install(warehouse, Definitions(funnels=(CHECKOUT,), retentions=(WEEKLY,), kpis=BOARD), 1)
    warehouse.insert(shop_of_cells(random.Random(3)))
    for report in REPORTS:
        names = [
            name
            for (name,) in warehouse.query(
                "SELECT name FROM system.columns WHERE table = %(t)s AND database = currentDatabase()", {"t": report}
            )
        ]
        rows = warehouse.query(f"SELECT {', '.join(names)} FROM {report}")
        assert len(rows) > 20
        for i, name in enumerate(names):
            for value in sorted({row[i] for row in rows}, key=str)[:3]:
                found = warehouse.query(f"SELECT {', '.join(names)} FROM {report} WHERE {name} = %(value)s", {"value": value})
                assert sorted(map(str, found)) == sorted(str(row) for row in rows if row[i] == value), (report, name, value)
        both = f"({names[0]} = %(a)s AND {names[1]} = %(b)s OR {names[0]} = %(c)s AND {names[1]} = %(d)s)"
        one, two = rows[0], rows[-1]
        found = warehouse.query(
            f"SELECT {', '.join(names)} FROM {report} WHERE {both}", {"a": one[0], "b": one[1], "c": two[0], "d": two[1]}
        )
        assert sorted(map(str, found)) == sorted(str(row) for row in rows if row[:2] in (one[:2], two[:2]))


# --- catalog ------------------------------------------------------------------------------------------------------------------


def test_reports_show_only_the_definition_installed_last(warehouse: Warehouse) -> None:
    old = Definitions(funnels=(CHECKOUT,))
    new = Definitions(funnels=(Funnel("checkout", steps("see", "buy"), HOUR, "1d", version="v2"),))
    warehouse.insert(columns("funnel_cells", [funnel_cell(1, 5), funnel_cell(1, 9, definition="v2")]))
    assert funnel_users(warehouse) == []
    assert install(warehouse, old, 1000) == 1
    assert [row[2:] for row in funnel_users(warehouse)] == [("view", 5), ("cart", 0), ("pay", 0)]
    assert install(warehouse, new, 2000) == 1
    assert [row[2:] for row in funnel_users(warehouse)] == [("see", 9), ("buy", 0)]
    assert install(warehouse, old, 500) == 1  # a clock that went back
    assert [row[2:] for row in funnel_users(warehouse)] == [("view", 5), ("cart", 0), ("pay", 0)]


def test_installing_the_newest_again_writes_nothing(warehouse: Warehouse) -> None:
    definitions = Definitions(funnels=(CHECKOUT,), retentions=(WEEKLY,), kpis=BOARD)
    assert install(warehouse, definitions, 1000) == 2 + len(BOARD)
    counts = (
        "SELECT count() FROM catalog_funnels UNION ALL SELECT count() FROM catalog_retentions UNION ALL SELECT count() FROM catalog_kpis"
    )
    before = sorted(warehouse.query(counts))
    assert install(warehouse, definitions, 2000) == 0
    assert sorted(warehouse.query(counts)) == before


def test_a_removed_definition_leaves_the_reports_and_can_come_back(warehouse: Warehouse) -> None:
    everything = Definitions(funnels=(CHECKOUT,), retentions=(WEEKLY,), kpis=BOARD)
    warehouse.insert({
        **columns("funnel_cells", [funnel_cell(1, 5)]),
        **columns("retention_cells", [retention_cell(0, "users", 1)]),
        **columns("kpi_cells", [kpi_cell("created", 5)]),
    })  # fmt: skip
    for now, definitions, shown in ((1, everything, True), (2, Definitions(), False), (2, Definitions(), False), (3, everything, True)):
        install(warehouse, definitions, now)
        assert [bool(warehouse.query(f"SELECT * FROM {report}")) for report in REPORTS] == [shown] * 3
    assert install(warehouse, everything, 9) == 0


def test_the_zone_and_currency_installed_last_are_the_shops(warehouse: Warehouse) -> None:
    install(warehouse, Definitions(time_zone="Europe/Berlin", currency="EUR"), 1)
    install(warehouse, Definitions(time_zone="Asia/Shanghai", currency="EUR"), 1)
    assert sorted(warehouse.query("SELECT setting, value FROM current_shop")) == [("currency", "EUR"), ("time_zone", "Asia/Shanghai")]


def test_names_in_the_catalog_may_hold_anything(warehouse: Warehouse) -> None:
    funnels = tuple(Funnel(f"f{text}", steps(f"s{text}", "end"), HOUR, "1d", version="v1") for text in HOSTILE[:-1])
    install(warehouse, Definitions(funnels=funnels), 1)
    assert install(warehouse, Definitions(funnels=funnels), 2) == 0
    warehouse.insert(columns("funnel_cells", [funnel_cell(1, 1, funnel=funnel.name) for funnel in funnels]))
    rows = warehouse.query("SELECT funnel, step_name FROM funnel_report WHERE step = 1")
    assert sorted(rows) == sorted((funnel.name, funnel.steps[0].name) for funnel in funnels)


# --- revisions ----------------------------------------------------------------------------------------------------------------


def made(revision: int) -> Definitions:
    return at_revision(Definitions(funnels=(CHECKOUT,), retentions=(WEEKLY,), kpis=(stored("n"),)), revision)


def cells_of(revision: int, value: int, start: int = T0, **other: Any) -> Rows:
    version = version_at("v1", revision)
    return {
        **columns("funnel_cells", [funnel_cell(1, value, definition=version, window_start=start, **other)]),
        **columns("retention_cells", [retention_cell(0, "users", value, definition=version, cohort_start=start, **other)]),
        **columns("kpi_cells", [kpi_cell("n", value, definition=version, window_start=start, **other)]),
    }


def shown(warehouse: Warehouse) -> set[tuple[Any, ...]]:
    """(report, start, value) of what readers see."""
    funnels = warehouse.query("SELECT 'funnel', window_start, users FROM funnel_report WHERE step = 1")
    retentions = warehouse.query("SELECT 'retention', cohort_start, users FROM retention_report WHERE period = 0")
    return {
        (name, int(start.timestamp()) * 1000, int(value))
        for name, start, value in funnels + retentions + warehouse.query("SELECT 'kpi', window_start, value FROM kpi_report")
    }


def all_three(start: int, value: int) -> set[tuple[Any, ...]]:
    return {(name, start, value) for name in ("funnel", "retention", "kpi")}


def test_one_row_shows_another_revision_in_every_report(warehouse: Warehouse) -> None:
    assert revisions.in_force(warehouse) == 0
    install(warehouse, made(0), 1)
    warehouse.insert(cells_of(0, 5) | columns("progress", [progress(0, T0 + 2 * DAY)]))
    begun = revisions.Revision(1, 0, "plan")
    revisions.write(warehouse, begun)
    assert install(warehouse, made(1), 1, revision=1) == 3
    warehouse.insert(cells_of(1, 7) | columns("progress", [progress(0, T0) | {"revision": 1, "next_offset": 3}]))
    assert shown(warehouse) == all_three(T0, 5)
    assert warehouse.query("SELECT next_offset FROM current_progress") == [(10,)]
    assert warehouse.query("SELECT smallest FROM watermarks") == [(T0 + 2 * DAY,)]
    assert revisions.positions(warehouse, 1) == {0: {"clickstream": 3}}
    assert [one.revision for one in revisions.ancestry(warehouse, 1)] == [1, 0]

    revisions.write(warehouse, begun._replace(shown_at=17))
    assert revisions.in_force(warehouse) == 1
    assert revisions.known(warehouse) == [begun._replace(shown_at=17)]
    assert shown(warehouse) == all_three(T0, 7)
    assert warehouse.query("SELECT next_offset FROM current_progress") == [(3,)]
    assert warehouse.query("SELECT smallest FROM watermarks") == [(T0,)]
    install(warehouse, Definitions(), 10**15)  # a worker of revision 0 that starts late
    assert shown(warehouse) == all_three(T0, 7)


def test_windows_before_a_rebuild_keep_their_rows(warehouse: Warehouse) -> None:
    install(warehouse, made(0), 1)
    for start in (T0, T0 + DAY):
        warehouse.insert(cells_of(0, 5, start, version=3))
    one = revisions.Revision(1, 0, "plan", since=T0 + DAY)
    install(warehouse, made(1), 1, revision=1)
    warehouse.insert(cells_of(1, 7, T0 + DAY))
    for _ in range(2):
        revisions.keep_before(warehouse, made(0), one)
    revisions.write(warehouse, one._replace(shown_at=1))
    assert shown(warehouse) == all_three(T0, 5) | all_three(T0 + DAY, 7)


def test_what_was_replaced_can_be_dropped(warehouse: Warehouse) -> None:
    for revision in (0, 1, 2):
        install(warehouse, made(revision), 1, revision=revision)
        warehouse.insert(cells_of(revision, revision + 5) | columns("progress", [progress(0, T0) | {"revision": revision}]))
    revisions.write(warehouse, revisions.Revision(1, 0, "plan", shown_at=1))
    revisions.drop_others(warehouse, 1)
    deadline = time.monotonic() + 20
    left = [f"SELECT count() FROM {table}" for table in ("funnel_cells", "retention_cells", "kpi_cells", "progress", "catalog_retentions")]
    while any(warehouse.query(sql) != [(1,)] for sql in left):
        assert time.monotonic() < deadline, [warehouse.query(sql) for sql in left]
        time.sleep(0.1)
    assert shown(warehouse) == all_three(T0, 6)


def test_what_was_dropped_is_made_again_when_asked_for(implementation: Implementation, warehouse: Warehouse) -> None:
    install(warehouse, made(0), 1)
    warehouse.insert(cells_of(0, 5))
    warehouse.query("DROP TABLE kpi_cells")
    assert warehouse.migrate() == []
    with pytest.raises(SinkRefused, match="kpi_cells"):
        warehouse.insert(cells_of(0, 5))
    assert len(warehouse.migrate(again=True)) == 5
    warehouse.insert(cells_of(0, 6, version=2))
    assert shown(warehouse) == all_three(T0, 6)


# --- many clients, and faults ----------------------------------------------------------------------------------------------------


def test_many_threads_may_use_one_warehouse(warehouse: Warehouse) -> None:
    def work(partition: int) -> None:
        for version in range(1, 6):
            warehouse.insert(columns("kpi_cells", [kpi_cell("n", version, partition, version=version)]))
            warehouse.query("SELECT count() FROM kpi_cells")

    install(warehouse, Definitions(kpis=(stored("n"),)), 1)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert kpis(warehouse) == {("n", ""): Decimal(30)}


def test_many_clients_share_one_embedded_warehouse(key: str, tmp_path: Path) -> None:
    host = SharedHost(str(tmp_path / "warehouse"))
    try:
        clients = [SharedWarehouse(host.address, key.encode()) for _ in range(8)]
        clients[0].migrate()
        install(clients[0], Definitions(kpis=(stored("n"),)), 1)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: clients[i].insert(columns("kpi_cells", [kpi_cell("n", 1, i)])), range(8)))
        assert kpis(clients[3]) == {("n", ""): Decimal(8)}
    finally:
        host.stop()


def test_another_key_is_refused_and_a_silent_client_holds_up_nobody(key: str, tmp_path: Path) -> None:
    host = SharedHost(str(tmp_path / "warehouse"))
    try:
        silent = socket.create_connection(host.address)
        with pytest.raises(SinkRefused, match="another key"):
            SharedWarehouse(host.address, b"guess").query("SELECT 1")
        assert SharedWarehouse(host.address, key.encode()).query("SELECT 1") == [(1,)]
        silent.close()
    finally:
        host.stop()


def test_a_shared_warehouse_that_died_is_unavailable_and_one_on_its_port_is_found_again(key: str, tmp_path: Path) -> None:
    host = SharedHost(str(tmp_path / "warehouse"))
    client = SharedWarehouse(host.address, key.encode())
    assert client.query("SELECT 1") == [(1,)]
    host.stop()
    for _ in range(2):
        with pytest.raises(SinkUnavailable):
            client.query("SELECT 1")


def test_a_folder_held_by_another_process_is_refused_with_the_reason(key: str, tmp_path: Path) -> None:
    host = SharedHost(str(tmp_path / "warehouse"))
    try:
        script = "import sys; from pipeline.sinks.embedded import EmbeddedWarehouse; EmbeddedWarehouse(sys.argv[1])"
        command = [sys.executable, "-c", script, str(tmp_path / "warehouse")]
        second = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=60
        )
        assert second.returncode != 0
        assert "one process at a time" in second.stderr
    finally:
        host.stop()


def test_an_embedded_warehouse_outlives_its_process(key: str, tmp_path: Path) -> None:
    first = SharedHost(str(tmp_path / "warehouse"))
    client = open_warehouse(first.url)
    client.migrate()
    client.insert(columns("progress", [progress(0, T0)]))
    first.stop()  # SIGKILL: what was acknowledged is on disk
    again = SharedHost(str(tmp_path / "warehouse"))
    try:
        assert open_warehouse(again.url).query("SELECT watermark FROM progress") == [(T0,)]
    finally:
        again.stop()


def test_every_table_of_an_embedded_warehouse_removes_merged_parts_without_more_threads(key: str, tmp_path: Path) -> None:
    host = SharedHost(str(tmp_path / "warehouse"))
    try:
        client = open_warehouse(host.url)
        client.migrate()
        tables = client.query("SELECT name, engine_full FROM system.tables WHERE database = currentDatabase() AND engine LIKE '%MergeTree'")
        assert {name for name, _ in tables} >= set(TABLES)
        assert [name for name, engine in tables if "concurrent_part_removal_threshold = 1000000" not in engine] == []
    finally:
        host.stop()


@pytest.fixture
def server() -> Iterator[ClickHouseServer]:
    clickhouse_server.require()
    with ClickHouseServer() as running:
        yield running


def test_wrong_password_is_refused_without_showing_it(server: ClickHouseServer) -> None:
    warehouse = open_warehouse(server.url(), "not-the-password")
    with pytest.raises(SinkRefused) as caught:
        warehouse.query("SELECT 1")
    assert "not-the-password" not in str(caught.value) + repr(warehouse)


def test_the_limited_user_reaches_no_other_database_and_a_reader_writes_nothing(server: ClickHouseServer) -> None:
    with pytest.raises(SinkRefused):
        open_warehouse(server.url("other"), server.password).migrate()
    open_warehouse(server.url(), server.password).migrate()
    reader = open_warehouse(server.url(user="reader"), server.password)
    assert reader.query("SELECT * FROM kpi_report") == []
    with pytest.raises(SinkRefused):
        reader.insert(columns("progress", [progress(0, T0)]))


def test_a_database_before_its_migrations_is_refused_with_the_remedy(server: ClickHouseServer) -> None:
    with pytest.raises(SinkRefused, match="run the migrations"):
        open_warehouse(server.url(), server.password).query("SELECT 1")


def test_a_server_that_stopped_is_unavailable_and_back_after_its_restart(server: ClickHouseServer) -> None:
    warehouse = open_warehouse(server.url(), server.password)
    warehouse.migrate()
    warehouse.insert(columns("progress", [progress(0, T0)]))
    server.kill()
    for _ in range(2):
        with pytest.raises(SinkUnavailable):
            warehouse.insert(columns("progress", [progress(1, T0)]))
    server.start()
    warehouse.insert(columns("progress", [progress(1, T0)]))
    assert warehouse.query("SELECT partition, watermark FROM progress ORDER BY partition") == [(0, T0), (1, T0)]


def test_the_server_ends_with_the_process_that_started_it() -> None:
    clickhouse_server.require()
    script = (
        "import sys, time; from tests.clickhouse_server import ClickHouseServer; s = ClickHouseServer(); s.start();"
        "print(s.port, s.folder, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert owner.stdout is not None
    port, folder = owner.stdout.readline().split()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(port))) != 0:
                break
        time.sleep(0.05)
    else:
        pytest.fail("the server outlived its owner")
    shutil.rmtree(folder)


def test_nobody_listening_is_unavailable_and_soon() -> None:
    began = time.monotonic()
    with pytest.raises(SinkUnavailable):
        open_warehouse(f"clickhouse://worker@127.0.0.1:{free_port()}/shopstream?connect_timeout=2", "x").migrate()
    assert time.monotonic() - began < 10
