"""ClickHouse in memory, as far as the protocol leans on it: a row is keyed, and the newest version of a key is what a report reads.

`worker` inserts; `check` reads `newest`. tests/contract holds it against the embedded ClickHouse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from schemas.rows import COLUMNS, Rows

KEYS: dict[str, tuple[str, ...]] = {
    "funnel_cells": ("funnel", "definition", "window_start", "segment", "level", "bucket", "partition"),
    "retention_cells": ("retention", "definition", "cohort_start", "segment", "period", "measure", "partition"),
    "kpi_cells": ("kpi", "definition", "window", "window_start", "dimension", "dimension_value", "currency", "bucket", "partition"),
    "rejects": ("topic", "partition", "offset", "reason"),
    "progress": ("topic", "partition", "revision"),
}
"""The sorting keys of schemas/migrations."""

Row = tuple[Any, ...]
_KEY_AT = {table: [COLUMNS[table].index(column) for column in columns] for table, columns in KEYS.items()}
_VERSION_AT = {table: COLUMNS[table].index("version") for table in KEYS}
_REST_AT = {table: [i for i, column in enumerate(COLUMNS[table]) if column not in (*KEYS[table], "version")] for table in KEYS}


class AmbiguousVersion(Exception):
    """Two values of one key have the same version: which one a report reads is chance."""


class MemoryWarehouse:
    """`newest[table][key]` is (version, the other columns)."""

    def __init__(self) -> None:
        self.newest: dict[str, dict[Row, tuple[int, Row]]] = {table: {} for table in KEYS}
        self.inserts = 0

    def insert(self, rows: Rows, tables: int = len(KEYS)) -> None:
        """`progress` last, as `Warehouse.insert` does; with `tables` fewer it fails on the way and the rest is not inserted."""
        self.inserts += 1
        for table in list(KEYS)[:tables]:
            if table in rows:
                self._merge(table, rows[table])

    def _merge(self, table: str, columns: dict[str, Any]) -> None:
        newest = self.newest[table]
        for row in rows_of(table, columns):
            key, rest, version = tuple(row[i] for i in _KEY_AT[table]), tuple(row[i] for i in _REST_AT[table]), row[_VERSION_AT[table]]
            known = newest.get(key)
            if known is None or version > known[0]:
                newest[key] = (version, rest)
            elif version == known[0] and rest != known[1] and table != "progress":
                raise AmbiguousVersion(f"{table} {key} version {version}: {known[1]} and {rest}")

    def version(self, partition: int) -> int:
        """The newest version in `progress` of a partition, 0 without any."""
        return max((version for (_, number, _), (version, _) in self.newest["progress"].items() if number == partition), default=0)


def rows_of(table: str, columns: dict[str, Any]) -> Iterator[Row]:
    """A table's columns as tuples in the order of schemas.rows."""
    return zip(*(c.tolist() if hasattr(c, "tolist") else c for c in (columns[name] for name in COLUMNS[table])), strict=True)
