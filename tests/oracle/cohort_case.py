"""Columns built by hand for the tests of retention and of first occurrences, and a table's cells as the sink would get them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from pipeline.columns import Columns, Strings
from pipeline.definitions import ANY_EVENT
from pipeline.plan import Plan
from pipeline.tables.kernel import Cells, UserIndex
from pipeline.tables.table import Batch, Table

ZONES = ("UTC", "Asia/Shanghai", "Europe/Berlin", "America/New_York")
CLOCK_CHANGES = ((2026, 3, 8), (2026, 3, 29), (2026, 10, 25), (2026, 11, 1))


@dataclass(frozen=True)
class Event:
    user: int
    ts: int
    name: str
    event_id: int
    fields: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)

    def is_one_of(self, names: Sequence[str]) -> bool:
        return ANY_EVENT in names or self.name in names


def columns_of(plan: Plan, events: Sequence[Event], strings: Strings) -> Columns:
    n = len(events)
    bits = np.zeros((n, plan.words), np.uint64)
    for p, match in enumerate(plan.predicates):
        bits[:, p >> 6] |= np.array([e.is_one_of(match.events) for e in events], np.uint64) << np.uint64(p & 63)
    return Columns(
        np.zeros(n, np.uint8),
        np.array([[e.user, ~e.user & 0xFF] for e in events], np.uint64).reshape(n, 2),
        np.array([e.event_id for e in events], np.uint64),
        np.array([e.ts for e in events], np.int64),
        np.array([strings.intern(e.name) for e in events], np.int32),
        bits,
        np.array([[strings.intern(e.fields.get(f, "")) for f in plan.fields] for e in events], np.int32).reshape(n, len(plan.fields)),
        np.array([[e.numbers.get(f, 0) for f in plan.numbers] for e in events], np.int64).reshape(n, len(plan.numbers)),
        np.zeros(n, np.uint64),
        np.zeros(n, np.int32),
    )


class Run:
    """A table with what it needs around it. Room is scarce from the start, so that it has to grow again and again."""

    def __init__(self, family: Callable[[Plan, int], Table], plan: Plan, metric: int = 3) -> None:
        self.family, self.plan = family, plan
        self.table = family(plan, metric)
        self.cells, self.strings, self.users = Cells(1), Strings(), UserIndex()

    def apply(self, events: Sequence[Event]) -> None:
        columns = columns_of(self.plan, events, self.strings)
        user = self.users.resolve(columns.user)
        self.table.apply(Batch.of(columns, user, len(self.users)), self.cells)

    def reload(self) -> None:
        """As after a crash: all state through its dump."""
        arrays = {name: array.copy() for name, array in self.table.dump().items()}
        self.table = self.family(self.plan, self.table.metric)
        self.table.load(arrays)
        self.cells.stamp(1)
        cells = {name: array.copy() for name, array in self.cells.dump().items()}
        self.cells = Cells(1)
        self.cells.load(cells)

    def rows(self, base_table: str) -> list[dict[str, Any]]:
        """Cells that are not 0, as rows of the sink."""
        n = len(self.cells)
        arrays = self.cells.arrays
        columns = self.table.rows(arrays.keys[:n], arrays.values[:n], arrays.versions[:n], self.strings, 5)[base_table]
        plain = [c.tolist() if isinstance(c, np.ndarray) else c for c in columns.values()]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*plain, strict=True)]
        return [row for row in rows if row["value"]]


def clock_change(r: random.Random, zone: str) -> int:
    """Local midnight, in ms, of a day on which some zone's clock changes."""
    return int(datetime(*r.choice(CLOCK_CHANGES), tzinfo=ZoneInfo(zone)).timestamp()) * 1000


def play(r: random.Random, run: Run, events: list[Event], lateness: int) -> None:
    """Apply all events: in any order or late by up to about the lateness, cut anywhere, with legal horizons and reloads between."""
    if r.random() < 0.4:
        r.shuffle(events)
    else:
        events.sort(key=lambda e: e.ts + r.randint(0, max(lateness, 1)))
    at, expiring = 0, r.choice((0.1, 0.5, 1.0))
    while at < len(events):
        cut = at + r.choice((1, 1, 3, 10, 40))
        run.apply(events[at:cut])
        at = cut
        if r.random() < expiring:
            run.table.expire(min((e.ts for e in events[at:]), default=events[-1].ts) - r.choice((0, 0, 3_600_000, 3 * 86_400_000)))
        if r.random() < 0.15:
            run.reload()
