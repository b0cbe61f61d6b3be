"""What on-call watches, asked of the warehouse's own views: KPIs and funnels of comparable windows, size of the tables.

In: an open warehouse and the definitions. Out: readings that a scrape finds ready. `streaming.flushes` runs the questions in the sink's thread, where they
take at most a twentieth of the time. What goes wrong here is told and counted, and never stops a worker.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pipeline.definitions import Definitions, Kpi, Window
from pipeline.sinks.sql import REFUSED
from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable, Warehouse
from pipeline.telemetry.meter import Meter, Reading
from pipeline.telemetry.metrics import (
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
SETTLED_SECONDS = 1.0  # so long without an insert, two flushes, and all rows are in: the question is asked at once
READS_SHARE = 20  # a read that takes a second is made again after 20 s: the thread belongs to the inserts
FORGOTTEN_SECONDS = 60.0  # older values are left out: a gauge that stands still lies
WEEK: dict[Window, int] = {"1m": 7 * 1440, "1h": 7 * 24, "1d": 7, "1w": 1}
"""A week in windows; months have none."""

InThread = Callable[..., Awaitable[Any]]


class Watch:
    """The newest answers."""

    def __init__(self, warehouse: Warehouse, definitions: Definitions, meter: Meter, clock: Callable[[], float] = time.monotonic) -> None:
        self._warehouse = warehouse
        self._definitions = definitions
        self._meter = meter
        self._readings: tuple[Reading, ...] = ()
        self._read_at = 0.0  # Unix time, to be told
        self._answered = -math.inf  # the same moment by `clock`, which does not jump
        self._clock = clock
        self._looked: float | None = None
        self._took = 0.0
        self._changed = False
        self._told = ""

    async def look(self, in_thread: InThread, inserted: bool = False) -> None:
        """Ask again when it is time, in the thread where the warehouse is spoken to. `inserted`: rows have gone in since the last call."""
        began = self._clock()
        if inserted:
            self._inserted, self._changed = began, True
        settled = self._changed and began - self._inserted >= SETTLED_SECONDS
        if self._looked is not None and began - self._looked < max(0.0 if settled else READ_SECONDS, READS_SHARE * self._took):
            return
        self._changed = False
        try:
            self._readings = tuple(await in_thread(questions, self._warehouse, self._definitions))
            self._read_at, self._answered = time.time(), self._clock()
        except (SinkUnavailable, SinkRefused) as error:
            self._meter.count(SINK_ERRORS, "query", error.kind if isinstance(error, SinkUnavailable) else REFUSED)
            if self._told != str(error):
                self._told = str(error)
                log.warning("the metrics of KPIs are not up to date: %s", error)
        self._looked = self._clock()
        self._took = self._looked - began

    def readings(self) -> Iterator[Reading]:
        """What was read, unless it is too old."""
        if self._clock() - self._answered < max(FORGOTTEN_SECONDS, 2 * READS_SHARE * self._took):
            yield from self._readings
            yield Reading(WATCHED_AT, self._read_at)
            yield Reading(WATCHED_SECONDS, self._took)


def questions(warehouse: Warehouse, definitions: Definitions) -> list[Reading]:
    """Ask all of it; blocks. Raises SinkUnavailable and SinkRefused."""
    readings = list(_tables(warehouse))
    largest = int((warehouse.query("SELECT largest FROM watermarks") or [(0,)])[0][0] or 0)
    if largest >= EARLIEST_MS:
        readings += _kpis(warehouse, definitions, largest)
        readings += _funnels(warehouse, definitions, largest)
    return readings


def complete(window: Window, time_zone: str, until_ms: int) -> dict[str, datetime]:
    """Start of the newest window that ends at or before `until_ms`, and of the same one a week before, by age."""
    newest = int(window_indices(window, time_zone, np.array([until_ms], np.int64))[0]) - 1
    indices = {"newest": newest} | ({"week_before": newest - WEEK[window]} if window in WEEK else {})
    starts = window_starts(window, time_zone, np.array(list(indices.values()), np.int64))
    return {age: datetime.fromtimestamp(int(start) / 1000, UTC) for age, start in zip(indices, starts, strict=True) if start >= EARLIEST_MS}


def _kpis(warehouse: Warehouse, definitions: Definitions, largest: int) -> Iterator[Reading]:
    starts = {window: complete(window, definitions.time_zone, largest) for window in KPI_WINDOWS}
    wanted = [(window, start) for window, by_age in starts.items() for start in by_age.values()]
    where, values = _pairs("window", wanted)
    rows = warehouse.query(
        f"SELECT window, kpi, window_start, value FROM kpi_report WHERE dimension = '' AND currency IN ('', %(currency)s) AND {where}",  # noqa: S608 our own text
        {"currency": definitions.currency, **values},
    )
    known = {(str(window), str(kpi), start.timestamp()): float(value) for window, kpi, start, value in rows}
    open_at = {(window, at) for window, _, at in known}  # a shop without any number was not there yet: nothing to compare with
    for window, by_age in starts.items():
        for age, start in by_age.items():
            at = start.timestamp()
            for kpi in (kpi for kpi in definitions.kpis if window in kpi.windows):
                value = known.get((window, kpi.name, at), 0.0 if _adds_up(kpi) and (window, at) in open_at else None)
                if value is not None:
                    yield Reading(KPI_VALUE, value, (kpi.name, window, age))


def _pairs(column: str, wanted: Sequence[tuple[str, datetime]]) -> tuple[str, dict[str, Any]]:
    """A condition on `column` and window_start, and its parameters: one question for all costs what one for each does, about 0.1 s."""
    values: dict[str, Any] = {}
    for i, (name, start) in enumerate(wanted):
        values |= {f"name_{i}": name, f"start_{i}": start}
    either = " OR ".join(f"{column} = %(name_{i})s AND window_start = %(start_{i})s" for i in range(len(wanted)))
    return f"({either})", values


def _adds_up(kpi: Kpi) -> bool:
    """Whether no row means 0."""
    return kpi.operator != "/" and "quantile" not in kpi.aggregate


def _funnels(warehouse: Warehouse, definitions: Definitions, largest: int) -> Iterator[Reading]:
    starts = {
        funnel: complete(funnel.entry_window, definitions.time_zone, max(largest - funnel.conversion_ms, EARLIEST_MS))
        for funnel in definitions.funnels
    }
    wanted = [(funnel.name, start) for funnel, by_age in starts.items() for start in by_age.values()]
    if not wanted:
        return
    where, values = _pairs("funnel", wanted)
    rows = warehouse.query(
        f"SELECT funnel, window_start, step, sum(users) FROM funnel_report WHERE {where} GROUP BY funnel, window_start, step",  # noqa: S608 our own text
        values,
    )
    users = {(str(name), start.timestamp(), int(step)): int(n) for name, start, step, n in rows}
    for funnel, by_age in starts.items():
        for age, start in by_age.items():
            at = start.timestamp()
            entered = users.get((funnel.name, at, 1), 0)
            for step in range(1, len(funnel.steps) + 1) if entered else ():
                n = users.get((funnel.name, at, step), 0)
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
