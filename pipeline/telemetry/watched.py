"""What on-call watches, asked of the warehouse's own views: KPIs and funnels of comparable windows, size of the tables.

In: an open warehouse and the definitions. Out: readings that a scrape finds ready. `streaming.flushes` runs the questions in the sink's thread, where they
take at most a twentieth of the time. What goes wrong here is told and counted, and never stops a worker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pipeline.definitions import Definitions, Funnel, Kpi, Window
from pipeline.sinks.sql import REFUSED
from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable, Warehouse
from pipeline.telemetry.meter import Meter, Reading
from pipeline.telemetry.metrics import (
    AGES,
    FUNNEL_RATIO,
    FUNNEL_USERS,
    KPI_VALUE,
    KPI_WINDOWS,
    SINK_ERRORS,
    WAREHOUSE_BYTES,
    WAREHOUSE_ROWS,
    WAREHOUSE_TABLES,
    WATCHED_AT,
    WATCHED_SECONDS,
)
from pipeline.windows import EARLIEST_MS, window_indices, window_starts

log = logging.getLogger("shopstream.watch")

READ_SECONDS = 10.0
READS_SHARE = 20  # a read that takes a second is made again after 20 s: the thread belongs to the inserts
FORGOTTEN_SECONDS = 60.0  # older values are left out: a gauge that stands still lies
WEEK: dict[Window, int] = {"1m": 7 * 1440, "1h": 7 * 24, "1d": 7, "1w": 1}
"""A week in windows; months have none."""

InThread = Callable[..., Awaitable[Any]]


class Watch:
    """The newest answers."""

    def __init__(self, warehouse: Warehouse, definitions: Definitions, meter: Meter) -> None:
        self._warehouse = warehouse
        self._definitions = definitions
        self._meter = meter
        self._readings: tuple[Reading, ...] = ()
        self._read_at = 0.0
        self._due = self._took = 0.0
        self._told = ""

    async def look(self, in_thread: InThread) -> None:
        """Ask again when it is time, in the thread where the warehouse is spoken to."""
        if time.monotonic() < self._due:
            return
        began = time.monotonic()
        try:
            self._readings = tuple(await in_thread(questions, self._warehouse, self._definitions))
            self._read_at = time.time()
        except (SinkUnavailable, SinkRefused) as error:
            self._meter.count(SINK_ERRORS, "query", error.kind if isinstance(error, SinkUnavailable) else REFUSED)
            if self._told != str(error):
                self._told = str(error)
                log.warning("the metrics of KPIs are not up to date: %s", error)
        took = time.monotonic() - began
        self._due = time.monotonic() + max(READ_SECONDS, READS_SHARE * took)
        self._took = took

    def readings(self) -> Iterator[Reading]:
        """What was read, unless it is too old."""
        if self._read_at and time.time() - self._read_at < max(FORGOTTEN_SECONDS, 2 * READS_SHARE * self._took):
            yield from self._readings
            yield Reading(WATCHED_AT, self._read_at)
            yield Reading(WATCHED_SECONDS, self._took)


def questions(warehouse: Warehouse, definitions: Definitions) -> list[Reading]:
    """Ask all of it; blocks. Raises SinkUnavailable and SinkRefused."""
    readings = list(_tables(warehouse))
    largest = int((warehouse.query("SELECT largest FROM watermarks") or [(0,)])[0][0] or 0)
    if largest >= EARLIEST_MS:
        for window in KPI_WINDOWS:
            readings += _kpis(warehouse, definitions, window, largest)  # type: ignore[arg-type]
        for funnel in definitions.funnels:
            readings += _funnel(warehouse, definitions, funnel, largest)
    return readings


def complete(window: Window, time_zone: str, until_ms: int) -> dict[str, datetime]:
    """Start of the newest window that ends at or before `until_ms`, and of the same one a week before, by age."""
    newest = int(window_indices(window, time_zone, np.array([until_ms], np.int64))[0]) - 1
    indices = {"newest": newest} | ({"week_before": newest - WEEK[window]} if window in WEEK else {})
    starts = window_starts(window, time_zone, np.array(list(indices.values()), np.int64))
    return {age: datetime.fromtimestamp(int(start) / 1000, UTC) for age, start in zip(indices, starts, strict=True) if start >= EARLIEST_MS}


def _kpis(warehouse: Warehouse, definitions: Definitions, window: Window, largest: int) -> Iterator[Reading]:
    kpis = [kpi for kpi in definitions.kpis if window in kpi.windows]
    starts = complete(window, definitions.time_zone, largest)
    if not kpis or not starts:
        return
    rows = warehouse.query(
        "SELECT kpi, window_start, value FROM kpi_report WHERE window = %(window)s AND dimension = '' AND currency IN ('', %(currency)s) "
        "AND window_start IN %(starts)s",
        {"window": window, "currency": definitions.currency, "starts": list(starts.values())},
    )
    values = {(str(kpi), start.timestamp()): float(value) for kpi, start, value in rows}
    open_at = {at for _, at in values}  # a shop without any number was not there yet: nothing to compare with
    for age, start in starts.items():
        for kpi in kpis:
            value = values.get((kpi.name, start.timestamp()), 0.0 if _adds_up(kpi) and start.timestamp() in open_at else None)
            if value is not None:
                yield Reading(KPI_VALUE, value, (kpi.name, window, age))


def _adds_up(kpi: Kpi) -> bool:
    """Whether no row means 0."""
    return kpi.operator != "/" and "quantile" not in kpi.aggregate


def _funnel(warehouse: Warehouse, definitions: Definitions, funnel: Funnel, largest: int) -> Iterator[Reading]:
    starts = complete(funnel.entry_window, definitions.time_zone, max(largest - funnel.conversion_ms, EARLIEST_MS))
    if not starts:
        return
    rows = warehouse.query(
        "SELECT window_start, step, sum(users) FROM funnel_report WHERE funnel = %(name)s AND window_start IN %(starts)s "
        "GROUP BY window_start, step",
        {"name": funnel.name, "starts": list(starts.values())},
    )
    users = {(start.timestamp(), int(step)): int(n) for start, step, n in rows}
    for age in AGES:
        at = starts[age].timestamp() if age in starts else -1.0
        entered = users.get((at, 1), 0)
        for step in range(1, len(funnel.steps) + 1) if entered else ():
            n = users.get((at, step), 0)
            yield Reading(FUNNEL_USERS, n, (funnel.name, str(step), age))
            yield Reading(FUNNEL_RATIO, n / entered, (funnel.name, str(step), age))


def _tables(warehouse: Warehouse) -> Iterator[Reading]:
    try:
        rows = warehouse.query(
            "SELECT table, sum(rows), sum(bytes_on_disk) FROM system.parts WHERE active AND database = currentDatabase() "
            "AND table IN %(tables)s GROUP BY table",
            {"tables": WAREHOUSE_TABLES},
        )
    except SinkRefused:  # the worker's user may not read system tables
        return
    known = {str(table): (int(n), int(size)) for table, n, size in rows}
    for table in WAREHOUSE_TABLES:
        n, size = known.get(table, (0, 0))
        yield Reading(WAREHOUSE_ROWS, n, (table,))
        yield Reading(WAREHOUSE_BYTES, size, (table,))
