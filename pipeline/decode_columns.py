"""Typed events to columns: strings interned, numbers scaled, predicates evaluated.

In: the checked events of one run, from `pipeline.decode`. Out: what `pipeline.columns.Columns` holds of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.columns import I32, I64, MONEY_SCALE, U64, Strings
from pipeline.definitions import ANY_EVENT, Filter
from pipeline.plan import Plan
from pipeline.tables.kernel import hash64, text_rows
from schemas.events import NUMBER_FIELDS, TOPIC_OF_EVENT, Event

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def texts_of(events: Sequence[Event], field: str) -> list[str | None]:
    """A string field of every event; absent is '' or None."""
    return list(map(attrgetter(field), events))


def floats_of(events: Sequence[Event], field: str) -> Floats:
    """A number field [n]; absent is NaN."""
    get = attrgetter(field)
    try:
        return np.fromiter(map(get, events), np.float64, len(events))
    except TypeError:  # an explicit null
        return np.array(list(map(get, events)), np.float64)


def scaled(numbers: Floats) -> Floats:
    """In 1/MONEY_SCALE: whole numbers below 2^53, still as floats; half to even; NaN stays."""
    return np.rint(numbers * float(MONEY_SCALE))


def hashes_of(texts: list[str | None]) -> U64:
    """xxHash64 of each text [n]; 0 of an absent one."""
    out = np.zeros(len(texts), np.uint64)
    if any(texts):
        data, ends = text_rows([text or "" for text in texts])
        hash64(data, ends, out)
    return out


class EventNames(dict[str, int]):
    """Event name to a small dense number, given at first sight; and per number what depends on the name alone."""

    def __init__(self, plan: Plan, strings: Strings) -> None:
        super().__init__()
        self._plan = plan
        self._strings = strings
        self._rows: list[tuple[int, bool, tuple[int, ...]]] = []
        self.string_id: I32 = np.empty(0, np.int32)
        self.unknown: Mask = np.empty(0, np.bool_)
        self.words: U64 = np.empty((0, plan.words), np.uint64)

    def __missing__(self, name: str) -> int:
        number = self[name] = len(self._rows)
        words = [0] * self._plan.words
        for p, match in enumerate(self._plan.predicates):
            if name in match.events or ANY_EVENT in match.events:
                words[p // 64] |= 1 << (p % 64)
        self._rows.append((self._strings.intern(name), name not in TOPIC_OF_EVENT, tuple(words)))
        return number

    def numbers(self, events: Sequence[Event]) -> I32:
        """The number of every event's name [n]; afterwards the arrays cover them."""
        numbers = np.fromiter(map(self.__getitem__, map(attrgetter("event"), events)), np.int32, len(events))
        new = self._rows[len(self.string_id) :]
        if new:
            ids, unknown, words = zip(*new, strict=True)
            self.string_id = np.concatenate((self.string_id, np.array(ids, np.int32)))
            self.unknown = np.concatenate((self.unknown, np.array(unknown, np.bool_)))
            self.words = np.concatenate((self.words, np.array(words, np.uint64)))
        return numbers


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.isin,
    "gt": lambda column, values: column > values[0],
    "gte": lambda column, values: column >= values[0],
    "lt": lambda column, values: column < values[0],
    "lte": lambda column, values: column <= values[0],
}


def number_passes(condition: Filter, column: Floats) -> Mask:
    """Which of the scaled numbers [n] pass; NaN (absent) passes `ne` alone."""
    values = np.array(condition.values, np.float64)
    if condition.op == "ne":
        return ~np.isin(column, values)
    result: Mask = _COMPARE[condition.op](column, values)
    return result


def text_passes(condition: Filter, column: Sequence[str | None]) -> Mask:
    """Which of the texts [n] pass; '' and None (absent) pass `ne` alone."""
    wanted = frozenset(condition.values) - {""}
    found = np.fromiter(map(wanted.__contains__, column), np.bool_, len(column))
    return ~found if condition.op == "ne" else found


@dataclass(slots=True)
class _Reader:
    """One run's events, each field taken out at most once."""

    events: Sequence[Event]
    floats: dict[str, Floats]
    texts: dict[str, list[str | None]]

    def number(self, field: str) -> Floats:
        if field not in self.floats:
            self.floats[field] = scaled(floats_of(self.events, field))
        return self.floats[field]

    def text(self, field: str) -> list[str | None]:
        if field not in self.texts:
            self.texts[field] = texts_of(self.events, field)
        return self.texts[field]


@dataclass(frozen=True, slots=True)
class EventColumns:
    """What this module adds to `Columns`, in its terms, and how many events had a name that is not ours."""

    event: I32
    bits: U64
    fields: I32
    numbers: I64
    order: U64
    currency: I32
    unknown_events: int


class ColumnBuilder:
    """Builds the columns that one plan needs; `strings` grows by what the events bring."""

    def __init__(self, plan: Plan, strings: Strings) -> None:
        self._plan = plan
        self._strings = strings
        self._names = EventNames(plan, strings)
        self._filtered = [(p, match.where) for p, match in enumerate(plan.predicates) if match.where]
        self._currency = plan.definitions.currency

    def build(self, events: Sequence[Event]) -> EventColumns:
        n = len(events)
        reader = _Reader(events, {}, {})
        names = self._names.numbers(events)
        fields = np.empty((n, len(self._plan.fields)), np.int32)
        for i, field in enumerate(self._plan.fields):
            fields[:, i] = self._strings.column(reader.text(field), n)
        numbers = np.empty((n, len(self._plan.numbers)), np.int64)
        for i, field in enumerate(self._plan.numbers):
            numbers[:, i] = np.nan_to_num(reader.number(field))
        return EventColumns(
            self._names.string_id[names],
            self._bits(names, reader),
            fields,
            numbers,
            hashes_of(reader.text("order_id")),
            self._currencies(reader.text("currency")),
            int(np.count_nonzero(self._names.unknown[names])),
        )

    def _currencies(self, texts: list[str | None]) -> I32:
        own = self._strings.intern(self._currency) if texts else 0
        if not any(texts):
            return np.full(len(texts), own, np.int32)
        ids = self._strings.column(texts, len(texts))
        return np.where(ids == 0, np.int32(own), ids)

    def _bits(self, names: I32, reader: _Reader) -> U64:
        """The predicates of each event's name, less those whose filters fail."""
        bits = self._names.words[names]
        for p, where in self._filtered:
            word, bit = bits[:, p // 64], np.uint64(1 << (p % 64))
            rows = np.flatnonzero(word & bit)
            failed = np.zeros(len(rows), np.bool_)
            for condition in where:
                failed |= ~self._passes(condition, reader, rows)
            word[rows[failed]] &= ~bit
        return bits

    def _passes(self, condition: Filter, reader: _Reader, rows: npt.NDArray[np.intp]) -> Mask:
        if condition.field in NUMBER_FIELDS:
            return number_passes(condition, reader.number(condition.field)[rows])
        column = reader.text(condition.field)
        return text_passes(condition, column if len(rows) == len(column) else [column[row] for row in rows])
