"""Columns built by hand for the funnel's tests, and the cells of table and oracle in one form."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pipeline.columns import Columns, Strings
from pipeline.definitions import ANY_EVENT, Funnel
from pipeline.plan import Plan
from pipeline.tables.funnel import FunnelTable
from pipeline.tables.kernel import HISTOGRAM_UPPER, Cells, UserIndex
from pipeline.tables.table import Batch
from schemas.events import TOPIC_OF_EVENT
from tests.oracle.plain_funnel import PlainEvent, best_outcomes

CellKey = tuple[int, int, int, int, str]  # funnel, level, bucket, window start, segment


@dataclass(frozen=True)
class Event:
    user: int
    ts: int
    name: str
    event_id: int
    fields: tuple[tuple[str, str], ...] = ()
    topic: int = 0


def columns_of(plan: Plan, events: list[Event], strings: Strings) -> Columns:
    n = len(events)
    bits = np.zeros((n, plan.words), np.uint64)
    for p, match in enumerate(plan.predicates):
        hit = np.array([ANY_EVENT in match.events or e.name in match.events for e in events], np.uint64)
        bits[:, p >> 6] |= hit << np.uint64(p & 63)
    fields = [[strings.intern(dict(e.fields).get(name, "")) for name in plan.fields] for e in events]
    return Columns(
        np.array([e.topic for e in events], np.uint8),
        np.array([[e.user, e.user] for e in events], np.uint64).reshape(n, 2),
        np.array([e.event_id for e in events], np.uint64),
        np.array([e.ts for e in events], np.int64),
        np.array([strings.intern(e.name) for e in events], np.int32),
        bits,
        np.array(fields, np.int32).reshape(n, len(plan.fields)),
        np.zeros((n, len(plan.numbers)), np.int64),
        np.zeros(n, np.uint64),
        np.zeros(n, np.int32),
    )


@dataclass
class Run:
    """A table with what it needs around it."""

    plan: Plan
    table: FunnelTable
    cells: Cells
    strings: Strings
    users: UserIndex

    @staticmethod
    def of(plan: Plan, metric: int = 3) -> Run:
        return Run(plan, FunnelTable(plan, metric), Cells(16), Strings(), UserIndex())

    def apply(self, events: list[Event]) -> None:
        columns = columns_of(self.plan, events, self.strings)
        user = self.users.resolve(columns.user)
        self.table.apply(Batch.of(columns, user, len(self.users)), self.cells)

    def reload(self) -> None:
        """As after a crash: all state through its dump."""
        arrays = {name: array.copy() for name, array in self.table.dump().items()}
        self.table = FunnelTable(self.plan, self.table.metric)
        self.table.load(arrays)
        self.cells.stamp(1)
        cells = {name: array.copy() for name, array in self.cells.dump().items()}
        self.cells = Cells(16)
        self.cells.load(cells)

    def counted(self) -> dict[CellKey, int]:
        """Cells that are not 0."""
        arrays, out = self.cells.arrays, {}
        for row in range(len(self.cells)):
            k0, k1, k2 = (int(k) for k in arrays.keys[row])
            if arrays.values[row]:
                key = ((k0 >> 32) - self.table.metric, k0 >> 16 & 0xFFFF, k0 & 0xFFFF, k1, self.strings[k2 >> 32])
                out[key] = int(arrays.values[row])
        return out


def plain_counted(funnels: tuple[Funnel, ...], events: list[Event], zone: str) -> dict[CellKey, int]:
    """The same by the oracle."""
    out: Counter[CellKey] = Counter()
    for i, funnel in enumerate(funnels):
        names = {name for step in funnel.steps for name in step.match.events}
        topics = frozenset({0, 1}) if ANY_EVENT in names else frozenset(TOPIC_OF_EVENT.get(name, 0) for name in names)
        for user in {e.user for e in events}:
            plain = [_plain(funnel, e) for e in events if e.user == user]
            for window, o in best_outcomes(funnel, plain, zone, topics).items():
                bucket = next(b for b, upper in enumerate(HISTOGRAM_UPPER) if o.duration <= upper)
                out[i, o.level, bucket, window, o.segment] += 1
    return dict(out)


def _plain(funnel: Funnel, e: Event) -> PlainEvent:
    def hit(names: tuple[str, ...]) -> bool:
        return ANY_EVENT in names or e.name in names

    fields = dict(e.fields)
    return PlainEvent(
        e.ts, e.event_id,
        frozenset(s for s, step in enumerate(funnel.steps, 1) if hit(step.match.events)),
        frozenset(x for x, exclusion in enumerate(funnel.exclusions) if hit(exclusion.match.events)),
        fields.get(funnel.breakdown or "", ""), fields.get(funnel.hold_constant or "", ""), e.topic,
    )  # fmt: skip
