"""All tables of one partition over one map of cells, one index of users and one memory of event ids.

`pipeline.partition` applies accepted batches here, takes the changed cells as rows, and dumps or loads the whole for a snapshot.
Definitions come in generations: a definitions file that changed adds a generation with what is new in it, and what did not change
goes on undisturbed in the generation that has it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.columns import I64, Columns, Strings
from pipeline.definitions import Definitions
from pipeline.plan import Plan, compile_plan
from pipeline.tables.first import FirstTable
from pipeline.tables.funnel import FunnelTable
from pipeline.tables.kernel import Cells, UserIndex
from pipeline.tables.kpi import EventKpiTable
from pipeline.tables.orders import OrderTable
from pipeline.tables.retention import RetentionTable
from pipeline.tables.seen import Seen
from pipeline.tables.sessions import SessionTable
from pipeline.tables.table import Arrays, Batch, Table
from schemas.rows import Rows

FAMILIES: tuple[type[Any], ...] = (FunnelTable, RetentionTable, FirstTable, EventKpiTable, SessionTable, OrderTable)


class Board:
    """The state of one partition's tables: a pure function of the columns applied and of the horizons passed."""

    def __init__(self, generations: list[Definitions]) -> None:
        self.generations = generations
        self.plan = merged_plan(generations)
        self.users = UserIndex()
        self.cells = Cells()
        self.strings = Strings()
        newest = generations[-1]
        self.seen = Seen(newest.deduplication_ms, newest.lateness_ms)
        self.tables: list[Table] = []
        metric = 0
        for definitions in generations:
            plan = replace(self.plan, definitions=definitions)
            for family in FAMILIES:
                table: Table = family(plan, metric)
                if table.metrics:
                    self.tables.append(table)
                    metric += table.metrics
        self._bases = np.array([table.metric for table in self.tables], np.int64)

    def apply(self, columns: Columns, user: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.int32]:
        """Apply accepted events [n]; returns their users' indices [n], resolved here unless given."""
        user = self.users.resolve(columns.user) if user is None else user
        batch = Batch.of(columns, user, len(self.users))
        for table in self.tables:
            table.apply(batch, self.cells)
        return user

    def expire(self, horizon: int) -> None:
        self.seen.expire(horizon)
        for table in self.tables:
            table.expire(horizon)

    def evict(self, watermark: int, acknowledged: int) -> int:
        """Forget cells that no event to come can change and that the sink has confirmed; how many."""
        n = len(self.cells)
        keys, versions = self.cells.arrays.keys[:n], self.cells.arrays.versions[:n]
        clean = self.cells.arrays.dirty[:n] == 0
        gone = clean & (versions <= acknowledged)
        for table, rows in self._by_table(keys):
            gone[rows] &= table.final_at(keys[rows]) <= watermark
        if gone.any():
            self.cells.keep(~gone)
        return int(gone.sum())

    def rows(self, keys: I64, values: I64, versions: I64, partition: int) -> Rows:
        """Cells [m] as the sink's rows."""
        merged: dict[str, dict[str, list[Any]]] = {}
        for table, chosen in self._by_table(keys):
            for name, columns in table.rows(keys[chosen], values[chosen], versions[chosen], self.strings, partition).items():
                into = merged.setdefault(name, {column: [] for column in columns})
                for column, data in columns.items():
                    into[column].append(data)
        return {name: {column: _joined(parts) for column, parts in columns.items()} for name, columns in merged.items()}

    def _by_table(self, keys: I64) -> list[tuple[Table, npt.NDArray[np.intp]]]:
        owner = np.searchsorted(self._bases, keys[:, 0] >> 32, side="right") - 1
        return [(table, rows) for i, table in enumerate(self.tables) if len(rows := np.flatnonzero(owner == i))]

    def dump(self) -> dict[str, Arrays]:
        """Every array of the state by owner; call right after `Cells.stamp`."""
        parts = {"cells": self.cells.dump(), "users": {"keys": self.users.dump()}, "seen": self.seen.dump()}
        return parts | {f"table{i}": table.dump() for i, table in enumerate(self.tables)}

    def load(self, parts: dict[str, Arrays], strings: list[str]) -> None:
        self.strings = Strings(strings)
        self.cells.load(parts["cells"])
        self.users = UserIndex(parts["users"]["keys"])
        self.seen.load(parts["seen"])
        for i, table in enumerate(self.tables):
            if f"table{i}" in parts:  # a new generation's tables start empty
                table.load(parts[f"table{i}"])


def _joined(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts)
    return [value for part in parts for value in part]


def merged_plan(generations: list[Definitions]) -> Plan:
    """One plan for all generations; adding a generation never renumbers what an earlier one uses."""
    plans = [compile_plan(definitions) for definitions in generations]
    return Plan(
        generations[-1],
        tuple(dict.fromkeys(p for plan in plans for p in plan.predicates)),
        tuple(dict.fromkeys(f for plan in plans for f in plan.fields)),
        tuple(dict.fromkeys(n for plan in plans for n in plan.numbers)),
    )


def next_generations(known: list[Definitions], wanted: Definitions) -> list[Definitions]:
    """`known` with one more generation for what `wanted` has that no known one has, by version. Equal to `known` when nothing is new."""
    every: list[Any] = [d for g in known for d in (*g.funnels, *g.retentions, *g.kpis)]
    seen = {(type(d).__name__, d.name, d.version) for d in every}

    def new(items: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(d for d in items if (type(d).__name__, d.name, d.version) not in seen)

    fresh = replace(wanted, funnels=new(wanted.funnels), retentions=new(wanted.retentions), kpis=new(wanted.kpis))
    same_rules = replace(wanted, funnels=(), retentions=(), kpis=()) == replace(known[-1], funnels=(), retentions=(), kpis=())
    nothing_new = not (fresh.funnels or fresh.retentions or any(kpi.source != "formula" for kpi in fresh.kpis))
    return known if nothing_new and same_rules else [*known, fresh]
