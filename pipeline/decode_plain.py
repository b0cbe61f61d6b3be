"""Plainly written events to columns without an object each: what `pipeline.json_scan` found, and texts known by their bytes.

In: the values of a run's records. Out: which of them are plain and what was found in those. Called by `pipeline.decode`, which parses the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.columns import I32, I64, U8, U64, Strings
from pipeline.decode_columns import EventNames, Floats, scaled
from pipeline.json_scan import PADDING, Spans, compile_wanted, find_texts, hash_spans, hash_users, index_texts, scan
from pipeline.plan import Plan
from pipeline.tables.hashes import hash64, text_rows
from pipeline.tables.kernel import grown
from pipeline.windows import EARLIEST_MS, LATEST_MS
from schemas.events import NUMBER_FIELDS

ALWAYS_WANTED = ("event_id", "event", "user_id", "anonymous_id", "order_id", "currency")


class TextNumbers:
    """Numbers of texts, found by their bytes; a new text gets what `assign` says. Holds every text seen: for fields whose texts are interned."""

    def __init__(self, assign: Callable[[str], int]) -> None:
        self._assign = assign
        self._used = 0
        self._slots: I32 = np.full(64, -1, np.int32)
        self._hashes: U64 = np.empty(32, np.uint64)
        self._begins: I64 = np.zeros(33, np.int64)
        self._numbers: I32 = np.empty(32, np.int32)
        self._pool: U8 = np.empty(1024, np.uint8)

    def column(self, data: U8, texts: I32, column: int) -> I32:
        """Numbers [n] of the texts in `texts[:, column]`; 0 of an empty one."""
        out = np.empty(len(texts), np.int32)
        if self._find(data, texts, column, out):
            self._learn(list(dict.fromkeys(data[begin:end].tobytes() for begin, end in texts[out < 0, column].tolist())))
            self._find(data, texts, column, out)
        return out

    def _find(self, data: U8, texts: I32, column: int, out: I32) -> int:
        missing = find_texts(data, texts, column, self._slots, self._hashes, self._begins, self._pool, self._numbers, out)
        return int(missing)

    def _learn(self, new: list[bytes]) -> None:
        texts = [text.decode() for text in new]
        data, ends = text_rows(texts)
        first, last = self._used, self._used + len(texts)
        top = int(self._begins[first])
        if last > len(self._hashes):
            capacity = 2 * last
            self._hashes, self._numbers = grown(self._hashes, capacity), grown(self._numbers, capacity)
            self._begins = grown(self._begins, capacity + 1)
            self._slots = np.full(1 << (2 * capacity - 1).bit_length(), -1, np.int32)
            index_texts(self._slots, self._hashes, 0, first)
        if top + len(data) > len(self._pool):
            self._pool = grown(self._pool, 2 * (top + len(data)))
        self._pool[top : top + len(data)] = data
        self._begins[first + 1 : last + 1] = top + ends
        self._numbers[first:last] = [self._assign(text) for text in texts]
        hash64(data, ends, self._hashes[first:last])
        index_texts(self._slots, self._hashes, first, last)
        self._used = last


@dataclass(frozen=True, slots=True)
class PlainEvents:
    """The plain events of a run; `rows` [n] are their records' indices, ascending."""

    rows: I64
    ts: I64
    user: U64  # [n, 2]
    data: U8
    texts: I32  # [n, texts wanted, 2]
    numbers: Floats  # [n, numbers wanted], scaled
    unknown_fields: int
    scanner: PlainScanner

    def __len__(self) -> int:
        return len(self.rows)

    def event_numbers(self, names: EventNames) -> I32:
        return self.scanner.names.column(self.data, self.texts, ALWAYS_WANTED.index("event"))

    def ids(self, field: str) -> I32:
        return self.scanner.strings.column(self.data, self.texts, self.scanner.texts.index(field))

    def number(self, field: str) -> Floats:
        column: Floats = self.numbers[:, self.scanner.numbers.index(field)]
        return column

    def chosen(self, field: str, rows: I64) -> Sequence[str]:
        spans = self.texts[rows, self.scanner.texts.index(field)].tolist()
        return [self.data[begin:end].tobytes().decode() for begin, end in spans]

    def hashes(self, field: str) -> U64:
        out = np.empty(len(self), np.uint64)
        hash_spans(self.data, self.texts, self.scanner.texts.index(field), out)
        return out


class PlainScanner:
    """Finds what one plan needs; learns the texts of the fields it interns."""

    def __init__(self, plan: Plan, names: EventNames, strings: Strings, partition: int, partitions: int, max_message_bytes: int) -> None:
        filtered = dict.fromkeys(condition.field for match in plan.predicates for condition in match.where)
        self.texts = tuple(dict.fromkeys((*ALWAYS_WANTED, *plan.fields, *(f for f in filtered if f not in NUMBER_FIELDS))))
        self.numbers = tuple(dict.fromkeys((*plan.numbers, *(f for f in filtered if f in NUMBER_FIELDS))))
        self.names = TextNumbers(names.__getitem__)
        self.strings = TextNumbers(strings.ids.__getitem__)
        self._wanted = compile_wanted(self.texts, self.numbers)
        self._partition, self._partitions = partition, partitions
        self._max_message_bytes = max_message_bytes

    def scan(self, values: Sequence[bytes | None], latest: I64) -> PlainEvents:
        """The events that are plain, live in this partition, and have a possible ts of at most `latest` [records] ms."""
        present = [value or b"" for value in values]
        joined = b"".join(present)
        if not (joined.isascii() or is_utf8(joined)):
            present = [value if is_utf8(value) else b"" for value in present]
            joined = b"".join(present)
        data = np.frombuffer(joined + PADDING, np.uint8)
        n = len(values)
        ends = np.cumsum(np.fromiter(map(len, present), np.int64, n))
        spans = Spans(
            np.empty(n, np.uint8), np.empty(n, np.int64), np.empty((n, len(self.texts), 2), np.int32),
            np.empty((n, len(self.numbers)), np.float64), np.empty(n, np.int32),
        )  # fmt: skip
        users = np.empty((n, 2), np.uint64)
        scan(data, ends, self._max_message_bytes, self._wanted, spans)
        hash_users(data, spans.texts, spans.plain, self._partition, self._partitions, users)
        good = (spans.plain == 1) & (spans.ts >= EARLIEST_MS) & (spans.ts < LATEST_MS) & (spans.ts <= latest)
        rows = np.flatnonzero(good)
        _, ts, texts, numbers, unknown = spans
        if len(rows) < n:
            ts, texts, numbers, unknown, users = ts[rows], texts[rows], numbers[rows], unknown[rows], users[rows]
        return PlainEvents(rows, ts, users, data, texts, scaled(numbers), int(unknown.sum()), self)


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
