"""Writes what the definitions mean into the warehouse's catalog tables, from which reports take names, units, formulas and the shop's time zone.

Called once by a worker or `shopstream run` after the migrations; safe to repeat and to run from several processes. Reports show the revision in force
(`pipeline.sinks.revisions`): what is installed at another one is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.columns import MONEY_SCALE
from pipeline.definitions import Definitions, Funnel, Kpi, Retention
from pipeline.sinks.sql import literal
from pipeline.sinks.warehouse import Warehouse

Row = tuple[Any, ...]
TABLES = {
    "catalog_funnels": ("funnel", "definition", "step", "step_name"),
    "catalog_retentions": ("retention", "definition", "period", "periods"),
    "catalog_kpis": ("kpi", "definition", "kind", "scale", "left_kpi", "operator", "right_kpi", "quantile", "money", "follows_ms"),
    "catalog_shop": ("setting", "value"),
}
_TOMBSTONES: dict[str, Row] = {
    "catalog_funnels": (0, ""),
    "catalog_retentions": ("", 0),
    "catalog_kpis": ("", 1, "", "", "", 0.0, 0, 0),
    "catalog_shop": (),
}
_BATCH = 200


def install(warehouse: Warehouse, definitions: Definitions, now_ms: int, revision: int = 0) -> int:
    """Make `definitions` the ones that reports show of a revision; how many names changed, 0 when they already were.

    A name that `definitions` no longer has gets a row with an empty definition, and so leaves the reports. Should the clock stand
    behind the newest entry, the entry's time plus 1 ms is used: the last to install wins.
    """
    wanted: dict[str, dict[str, list[Row]]] = {
        "catalog_funnels": {funnel.name: _funnel(funnel) for funnel in definitions.funnels},
        "catalog_retentions": {retention.name: _retention(retention) for retention in definitions.retentions},
        "catalog_kpis": {kpi.name: _kpi(kpi, definitions) for kpi in definitions.kpis},
    }
    shop = {"time_zone": definitions.time_zone, "currency": definitions.currency}
    _install(warehouse, "catalog_shop", {name: [(name, value)] for name, value in shop.items()}, now_ms, revision)
    return sum(_install(warehouse, table, rows, now_ms, revision) for table, rows in wanted.items())


def _install(warehouse: Warehouse, table: str, wanted: dict[str, list[Row]], now_ms: int, revision: int) -> int:
    installed, newest = _installed(warehouse, table, revision)
    removed = {name: [(name, "", *_TOMBSTONES[table])] for name in installed if name not in wanted}
    changed = {name: rows for name, rows in {**wanted, **removed}.items() if sorted(rows) != installed.get(name)}
    installed_at = max(now_ms, newest + 1)
    rows = [(*row, revision, installed_at) for rows in changed.values() for row in rows]
    for at in range(0, len(rows), _BATCH):
        _insert(warehouse, table, rows[at : at + _BATCH])
    return len(changed)


def _installed(warehouse: Warehouse, table: str, revision: int) -> tuple[dict[str, list[Row]], int]:
    """Each name's rows as installed last at a revision, and the newest time of all."""
    columns = TABLES[table]
    latest: dict[str, tuple[int, str]] = {}
    rows: dict[tuple[str, str, int], set[Row]] = {}
    for row in warehouse.query(f"SELECT {', '.join(columns)}, installed_at FROM {table} WHERE revision = {revision}"):  # noqa: S608 our own names
        *values, installed_at = row
        name, definition = str(values[0]), str(values[1])
        latest[name] = max(latest.get(name, (0, "")), (int(installed_at), definition))
        rows.setdefault((name, definition, int(installed_at)), set()).add(tuple(values))
    current = {name: sorted(rows[name, definition, at]) for name, (at, definition) in latest.items()}
    return current, max((at for at, _ in latest.values()), default=0)


def read(warehouse: Warehouse) -> dict[str, list[Row]]:
    """All rows of the catalog, so that `write` makes another warehouse's catalog equal."""
    return {table: warehouse.query(f"SELECT {', '.join(names)}, revision, installed_at FROM {table}") for table, names in TABLES.items()}  # noqa: S608


def write(warehouse: Warehouse, tables: dict[str, list[Row]]) -> None:
    """What `read` gave, into an empty catalog."""
    for table, rows in tables.items():
        for at in range(0, len(rows), _BATCH):
            _insert(warehouse, table, rows[at : at + _BATCH])


def _insert(warehouse: Warehouse, table: str, rows: Iterable[Row]) -> None:
    values = " UNION ALL ".join(f"SELECT {', '.join(map(_typed, row))}" for row in rows)
    warehouse.query(f"INSERT INTO {table} ({', '.join(TABLES[table])}, revision, installed_at) {values}")


def _typed(value: Any) -> str:
    """A literal of one type whatever its size: a UNION ALL of a UInt8 and a UInt16 constant is refused by some versions."""
    return f"to{'Int64' if isinstance(value, int) else 'Float64'}({literal(value)})" if isinstance(value, int | float) else literal(value)


def _funnel(funnel: Funnel) -> list[Row]:
    return [(funnel.name, funnel.version, number, step.name) for number, step in enumerate(funnel.steps, 1)]


def _retention(retention: Retention) -> list[Row]:
    return [(retention.name, retention.version, retention.period, retention.periods)]


def _kpi(kpi: Kpi, definitions: Definitions) -> list[Row]:
    kind = (
        "formula"
        if kpi.source == "formula"
        else "quantile"
        if kpi.aggregate == "dwell_quantile"
        else "sum"
        if kpi.aggregate == "sum"
        else "count"
    )
    scale = MONEY_SCALE if kind == "sum" else 1
    follows = max(leg.follows_ms for leg in (kpi, *definitions.kpis) if leg is kpi or leg.name in (kpi.left, kpi.right))
    return [(kpi.name, kpi.version, kind, scale, kpi.left, kpi.operator, kpi.right, float(kpi.quantile), int(kpi.money), follows)]
