"""Typed events to columns: strings interned, numbers scaled, predicates evaluated.

In: the checked events of one run, parsed or plain, from `pipeline.decode`. Out: what `pipeline.columns.Columns` holds of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.columns import I32, I64, MONEY_SCALE, U64, Strings
from pipeline.definitions import ANY_EVENT, Filter
from pipeline.plan import Plan
from pipeline.tables.hashes import hash64, text_rows
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

    def cover(self) -> None:
        """Make the arrays cover every number given so far."""
        new = self._rows[len(self.string_id) :]
        if new:
            ids, unknown, words = zip(*new, strict=True)
            self.string_id = np.concatenate((self.string_id, np.array(ids, np.int32)))
            self.unknown = np.concatenate((self.unknown, np.array(unknown, np.bool_)))
            self.words = np.concatenate((self.words, np.array(words, np.uint64)))


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


class Reader(Protocol):
    """Events of which columns are made: parsed ones (`EventReader`) or plain ones (`pipeline.decode_plain`)."""

    def __len__(self) -> int: ...

    def event_numbers(self, names: EventNames) -> I32:
        """The number of every event's name [n]."""
        ...

    def ids(self, field: str) -> I32:
        """String ids [n] of a text field, interned."""
        ...

    def number(self, field: str) -> Floats:
        """A number field [n], scaled; NaN when absent."""
        ...

    def chosen(self, field: str, rows: I64) -> Sequence[str | None]:
        """The texts of some rows, without interning them."""
        ...

    def hashes(self, field: str) -> U64:
        """xxHash64 [n] of a text field; 0 when absent."""
        ...


class EventReader:
    """Parsed events, each field taken out at most once."""

    def __init__(self, events: Sequence[Event], strings: Strings) -> None:
        self._events = events
        self._strings = strings
        self._floats: dict[str, Floats] = {}
        self._texts: dict[str, list[str | None]] = {}

    def __len__(self) -> int:
        return len(self._events)

    def event_numbers(self, names: EventNames) -> I32:
        return np.fromiter(map(names.__getitem__, map(attrgetter("event"), self._events)), np.int32, len(self._events))

    def ids(self, field: str) -> I32:
        return self._strings.column(self._text(field), len(self._events))

    def number(self, field: str) -> Floats:
        if field not in self._floats:
            self._floats[field] = scaled(floats_of(self._events, field))
        return self._floats[field]

    def chosen(self, field: str, rows: I64) -> Sequence[str | None]:
        texts = self._text(field)
        return texts if len(rows) == len(texts) else [texts[row] for row in rows]

    def hashes(self, field: str) -> U64:
        return hashes_of(self._text(field))

    def _text(self, field: str) -> list[str | None]:
        if field not in self._texts:
            self._texts[field] = texts_of(self._events, field)
        return self._texts[field]


@dataclass(frozen=True, slots=True)
class EventColumns:
    """What this module adds to `Columns`, in its terms, and how many events had a name that is not ours."""

    event_id: U64
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
        self.names = EventNames(plan, strings)
        self._filtered = [(p, match.where) for p, match in enumerate(plan.predicates) if match.where]
        self._currency = plan.definitions.currency

    def build(self, events: Reader) -> EventColumns:
        n = len(events)
        names = events.event_numbers(self.names)
        self.names.cover()
        fields = np.empty((n, len(self._plan.fields)), np.int32)
        for i, field in enumerate(self._plan.fields):
            fields[:, i] = events.ids(field)
        numbers = np.empty((n, len(self._plan.numbers)), np.int64)
        for i, field in enumerate(self._plan.numbers):
            numbers[:, i] = np.nan_to_num(events.number(field))
        own = self._strings.intern(self._currency) if n else 0
        currency = events.ids("currency")
        return EventColumns(
            events.hashes("event_id"),
            self.names.string_id[names],
            self._bits(names, events),
            fields,
            numbers,
            events.hashes("order_id"),
            np.where(currency == 0, np.int32(own), currency),
            int(np.count_nonzero(self.names.unknown[names])),
        )

    def _bits(self, names: I32, events: Reader) -> U64:
        """The predicates of each event's name, less those whose filters fail."""
        bits = self.names.words[names]
        for p, where in self._filtered:
            word, bit = bits[:, p // 64], np.uint64(1 << (p % 64))
            rows = np.flatnonzero(word & bit)
            failed = np.zeros(len(rows), np.bool_)
            for condition in where:
                failed |= ~_passes(condition, events, rows)
            word[rows[failed]] &= ~bit
        return bits


def _passes(condition: Filter, events: Reader, rows: I64) -> Mask:
    if condition.field in NUMBER_FIELDS:
        return number_passes(condition, events.number(condition.field)[rows])
    return text_passes(condition, events.chosen(condition.field, rows))
