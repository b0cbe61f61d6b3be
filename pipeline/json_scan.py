"""JSON objects of a run to where their values are, compiled: for the events that are written plainly, which nearly all are.

In: the run's bytes. Out: by event, spans of the texts and values of the numbers that a plan needs. Called by `pipeline.decode`.

Plain is: one flat object of known types within the limits, texts without escapes, numbers of up to 15 digits without sign or exponent. What is said
of a plain event is what `schemas.events` says of it; whether any other one is valid is not judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.columns import I32, I64, U8, U64
from pipeline.tables.hashes import SECOND_SEED, murmur2_partition, xxh64
from pipeline.tables.kernel import jit
from schemas.events import ID_LENGTH, KNOWN_FIELDS, NUMBER_FIELDS, NUMBER_LIMIT, TEXT_LENGTH, Event

F64 = npt.NDArray[np.float64]
FIELDS = Event.__struct_fields__
EVENT_ID, EVENT, TS, USER_ID, ANONYMOUS_ID = range(5)  # their places in FIELDS, and but for TS in the spans
TEXT, ID, CURRENCY, NUMBER, TIME, OTHER = range(6)
POWERS: F64 = 10.0 ** np.arange(16)
LONGEST = max(map(len, KNOWN_FIELDS))
QUOTE, BACKSLASH, COMMA, COLON, DOT, OPEN, CLOSE, ZERO, NINE, SPACE = (ord(c) for c in '"\\,:.{}09 ')


class Wanted(NamedTuple):
    """The known fields, and what a plan wants of each."""

    names: U8  # [fields, LONGEST]
    lengths: I64  # [fields] of the names
    kinds: I64  # [fields] TEXT, ID (never empty), CURRENCY (three capitals), NUMBER, TIME, OTHER (only null is plain)
    limits: I64  # [fields] bytes of a text; characters are never more
    columns: I64  # [fields] where a text's span or a number's value goes, -1 nowhere
    follows: I64  # [fields + 1] scratch: the field that came after this one last time; of the last row: the first one


class Spans(NamedTuple):
    """What was found in `n` events; a row means something where `plain` is 1."""

    plain: U8  # [n]
    ts: I64  # [n] ms
    texts: I32  # [n, texts wanted, 2] begin and end in the run's bytes; equal for an absent or empty text
    numbers: F64  # [n, numbers wanted] NaN for an absent one
    unknown: I32  # [n] fields that are not ours


def compile_wanted(texts: Sequence[str], numbers: Sequence[str]) -> Wanted:
    """Where the spans of `texts` and the values of `numbers` go, in that order."""
    names = np.zeros((len(FIELDS), LONGEST), np.uint8)
    for i, name in enumerate(FIELDS):
        names[i, : len(name)] = np.frombuffer(name.encode(), np.uint8)
    kinds = np.array([NUMBER if name in NUMBER_FIELDS else TEXT for name in FIELDS], np.int64)
    kinds[[EVENT_ID, EVENT, USER_ID]], kinds[TS] = ID, TIME
    kinds[FIELDS.index("currency")], kinds[FIELDS.index("items")] = CURRENCY, OTHER
    limits = np.full(len(FIELDS), TEXT_LENGTH, np.int64)
    limits[[EVENT_ID, EVENT, USER_ID, ANONYMOUS_ID]] = ID_LENGTH
    columns = np.full(len(FIELDS), -1, np.int64)
    for wanted in (texts, numbers):
        for column, name in enumerate(wanted):
            columns[FIELDS.index(name)] = column
    lengths = np.array([len(name) for name in FIELDS], np.int64)
    return Wanted(names, lengths, kinds, limits, columns, np.zeros(len(FIELDS) + 1, np.int64))


@jit
def _is_field(names: U8, lengths: I64, field: int, data: U8, begin: int, end: int) -> bool:
    if lengths[field] != end - begin:
        return False
    for k in range(end - begin):
        if names[field, k] != data[begin + k]:
            return False
    return True


@jit
def _after_space(data: U8, at: int, stop: int) -> int:
    while at < stop and (data[at] == 32 or data[at] == 10 or data[at] == 13 or data[at] == 9):
        at += 1
    return at


@jit
def _end_of_text(data: U8, at: int, stop: int) -> int:
    """Where the quote is that ends the text at `at`; -1 when the text is not plain."""
    while at < stop and data[at] != QUOTE:
        if data[at] == BACKSLASH or data[at] < SPACE:
            return -1
        at += 1
    return at if at < stop else -1


@jit
def _is_currency(data: U8, begin: int, end: int) -> bool:
    if end - begin != 3:
        return False
    return 65 <= data[begin] <= 90 and 65 <= data[begin + 1] <= 90 and 65 <= data[begin + 2] <= 90


@jit
def _is_word(data: U8, at: int, stop: int, a: int, b: int, c: int, d: int) -> bool:
    return at + 4 <= stop and data[at] == a and data[at + 1] == b and data[at + 2] == c and data[at + 3] == d


@jit
def _number(data: U8, at: int, stop: int) -> tuple[int, int, int]:
    """(end or -1 when not plain, digits as one integer, how many of them are decimals); below 10^15, so that the quotient is the nearest float."""
    begin, digits, decimals = at, np.int64(0), 0
    while at < stop and ZERO <= data[at] <= NINE:
        digits = digits * 10 + np.int64(data[at] - ZERO)
        at += 1
    whole = at - begin
    if whole == 0 or (whole > 1 and data[begin] == ZERO):
        return -1, 0, 0
    if at < stop and data[at] == DOT:
        at += 1
        while at < stop and ZERO <= data[at] <= NINE:
            digits = digits * 10 + np.int64(data[at] - ZERO)
            at += 1
            decimals += 1
        if decimals == 0:
            return -1, 0, 0
    if whole + decimals > 15:
        return -1, 0, 0
    return at, digits, decimals


@jit
def scan(data: U8, ends: I64, longest: int, wanted: Wanted, spans: Spans) -> None:
    """Event i is `data[ends[i - 1]:ends[i]]`, at most `longest` bytes if plain. The caller has checked that all is UTF-8."""
    names, lengths, kinds, limits, columns, follows = wanted
    plain, stamps, texts, numbers, unknown = spans
    fields, stop = len(lengths), np.int64(0)
    for i in range(len(ends)):
        begin, stop = stop, ends[i]
        plain[i] = 0
        unknown[i] = 0
        stamps[i] = -1
        texts[i] = 0
        numbers[i] = np.nan
        if stop - begin > longest:
            continue
        at = _after_space(data, begin, stop)
        if at >= stop or data[at] != OPEN:
            continue
        at = _after_space(data, at + 1, stop)
        known, good = fields, True
        while good:
            if at >= stop or data[at] != QUOTE:
                good = False  # an empty object lacks what is required
                break
            key, end = at + 1, _end_of_text(data, at + 1, stop)
            if end < 0:
                good = False
                break
            field = follows[known]
            if not _is_field(names, lengths, field, data, key, end):
                field = 0
                while field < fields and not _is_field(names, lengths, field, data, key, end):
                    field += 1
                if field < fields:
                    follows[known] = field
            at = _after_space(data, end + 1, stop)
            if at >= stop or data[at] != COLON:
                good = False
                break
            at = _after_space(data, at + 1, stop)
            if at >= stop:
                good = False
                break
            kind = kinds[field] if field < fields else -1
            column = columns[field] if field < fields else -1
            if data[at] == QUOTE:
                value, end = at + 1, _end_of_text(data, at + 1, stop)
                if end < 0 or (kind >= NUMBER) or (kind >= 0 and end - value > limits[field]) or (kind == ID and end == value):
                    good = False
                    break
                if kind == CURRENCY and end > value and not _is_currency(data, value, end):
                    good = False
                    break
                if column >= 0:
                    texts[i, column, 0] = value
                    texts[i, column, 1] = end
                at = end + 1
            elif ZERO <= data[at] <= NINE:
                at, digits, decimals = _number(data, at, stop)
                if at < 0 or 0 <= kind < NUMBER or kind == OTHER:
                    good = False
                    break
                if kind == NUMBER:
                    number = np.float64(digits) / POWERS[decimals]
                    if number > NUMBER_LIMIT:
                        good = False
                        break
                    if column >= 0:
                        numbers[i, column] = number
                elif kind == TIME:
                    if decimals > 0:
                        good = False
                        break
                    stamps[i] = digits
            elif _is_word(data, at, stop, 110, 117, 108, 108):  # null
                if field == EVENT_ID or field == EVENT or field == TS:
                    good = False
                    break
                if column >= 0:
                    if kind == NUMBER:
                        numbers[i, column] = np.nan
                    else:
                        texts[i, column, :] = 0
                at += 4
            elif kind < 0 and _is_word(data, at, stop, 116, 114, 117, 101):  # true
                at += 4
            elif kind < 0 and data[at] == 102 and _is_word(data, at + 1, stop, 97, 108, 115, 101):  # false
                at += 5
            else:
                good = False
                break
            if field < fields:
                known = field
            else:
                unknown[i] += 1
            at = _after_space(data, at, stop)
            if at < stop and data[at] == COMMA:
                at = _after_space(data, at + 1, stop)
                continue
            good = at < stop and data[at] == CLOSE and _after_space(data, at + 1, stop) == stop
            break
        if good and stamps[i] >= 0 and texts[i, 0, 1] > 0 and texts[i, 1, 1] > 0:
            plain[i] = 1


@jit
def hash_spans(data: U8, texts: I32, column: int, out: U64) -> None:
    """xxHash64 of a column's texts [n]; 0 of an empty one."""
    for i in range(len(texts)):
        begin, end = texts[i, column, 0], texts[i, column, 1]
        out[i] = xxh64(data, begin, end, np.uint64(0)) if end > begin else np.uint64(0)


@jit
def hash_users(data: U8, texts: I32, plain: U8, partition: int, partitions: int, out: U64) -> None:
    """Two hashes [n, 2] of each event's user; an event without one, or whose user lives in another partition, is not plain."""
    for i in range(len(texts)):
        begin, end = texts[i, 2, 0], texts[i, 2, 1]
        if begin == end:
            begin, end = texts[i, 3, 0], texts[i, 3, 1]
        if begin == end or murmur2_partition(data, begin, end, partitions) != partition:
            plain[i] = 0
            continue
        out[i, 0] = xxh64(data, begin, end, np.uint64(0))
        out[i, 1] = xxh64(data, begin, end, SECOND_SEED)


@jit
def find_texts(data: U8, texts: I32, column: int, slots: I32, hashes: U64, begins: I64, pool: U8, numbers: I32, out: I32) -> int:
    """Numbers [n] of a column's texts, 0 of an empty one, -1 of one that is not in the pool; how many of those."""
    mask, missing = np.uint64(len(slots) - 1), 0
    for i in range(len(texts)):
        begin, end = texts[i, column, 0], texts[i, column, 1]
        out[i] = 0
        if begin == end:
            continue
        key = xxh64(data, begin, end, np.uint64(0))
        at = key & mask
        out[i] = -1
        while slots[at] >= 0:
            row = slots[at]
            if hashes[row] == key and begins[row + 1] - begins[row] == end - begin:
                same = True
                for k in range(end - begin):
                    same = same and pool[begins[row] + k] == data[begin + k]
                if same:
                    out[i] = numbers[row]
                    break
            at = (at + np.uint64(1)) & mask
        missing += out[i] < 0
    return missing


@jit
def index_texts(slots: I32, hashes: U64, first: int, last: int) -> None:
    """Enter rows first to last - 1 of the pool in `slots`."""
    mask = np.uint64(len(slots) - 1)
    for row in range(first, last):
        at = hashes[row] & mask
        while slots[at] >= 0:
            at = (at + np.uint64(1)) & mask
        slots[at] = row
