"""A warehouse's tables read out and filled again through its own door, and what its reports say as a number that can be compared.

Every stored row goes, replaced ones too (a row is an absolute value with a version); `pipeline.cli.backup` calls it while no worker runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa

from pipeline.backup import Digest
from pipeline.sinks.catalog import TABLES
from pipeline.sinks.sql import TEXTS, TIMES
from pipeline.sinks.warehouse import Warehouse
from schemas.rows import COLUMNS

CHUNK_ROWS = 200_000
REPORTS = {view: f"SELECT * FROM {view}" for view in ("funnel_report", "retention_report", "kpi_report")} | {  # noqa: S608 our own names
    table: "SELECT {} FROM {} FINAL".format(", ".join(f'"{name}"' for name in COLUMNS[table]), table)  # noqa: S608
    for table in ("rejects", "progress")
}
"""What a reader of the warehouse sees: equal before and after."""


def count_rows(warehouse: Warehouse) -> dict[str, int]:
    """Stored rows of each base and catalog table, and of that of revisions."""
    return {table: int(warehouse.query(f"SELECT count() FROM {table}")[0][0]) for table in (*COLUMNS, *TABLES, "revisions")}  # noqa: S608


def chunks(warehouse: Warehouse, table: str, rows: int) -> Iterator[dict[str, Any]]:
    """Arrow columns of all rows of a base table, about CHUNK_ROWS at a time; times in ms, as `Warehouse.insert` takes them.

    A chunk is cut by a hash of what identifies a row, so a merge between two of them moves nothing.
    """
    names = COLUMNS[table]
    keys = ", ".join(f'toString("{name}")' for name in names if name not in ("value", "final_at", "version", *_PAYLOAD))
    wanted = ", ".join(f'toUInt32("{name}")' if name in TIMES else f'"{name}"' for name in names)
    parts = max(1, -(-rows // CHUNK_ROWS))
    for part in range(parts):
        found = warehouse.query(f"SELECT {wanted} FROM {table} WHERE cityHash64({keys}) % {parts} = {part}")  # noqa: S608
        if found:
            yield {name: _column(name, values) for name, values in zip(names, zip(*found, strict=True), strict=True)}


_PAYLOAD = ("cause", "key", "raw", "next_offset", "watermark", "applied", "duplicates", "rejected", "too_late", "rekeyed")


def _column(name: str, values: tuple[Any, ...]) -> Any:
    if name in TEXTS:
        return pa.array([value.encode() if isinstance(value, str) else value for value in values], pa.binary())
    if name in TIMES:
        return pa.array([value * 1000 for value in values], pa.int64())
    return pa.array(values, pa.int64())


def digest(warehouse: Warehouse) -> dict[str, Digest]:
    """Of every report: its rows and the sum of their hashes."""
    return {name: _digest(warehouse.query(sql)) for name, sql in REPORTS.items()}


def _digest(rows: list[tuple[Any, ...]]) -> Digest:
    total = 0
    for row in rows:
        total += int.from_bytes(hashlib.blake2b(repr([_plain(value) for value in row]).encode(), digest_size=16).digest(), "little")
    return Digest(len(rows), f"{total % (1 << 128):032x}")


def _plain(value: Any) -> Any:
    """The same for every kind of warehouse: their drivers differ in zones and in trailing zeros."""
    if isinstance(value, datetime):
        return int(value.timestamp())
    if isinstance(value, Decimal):
        return f"{value.normalize():f}"
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value
