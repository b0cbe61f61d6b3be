"""JSON objects of a run to where their values are, compiled: for the events that are written plainly, which nearly all are.

In: the run's bytes. Out: by event, spans of the texts and values of the numbers that a plan needs. Called by `pipeline.decode`.

Plain is: one flat object of known types within the limits, texts without escapes, numbers of up to 15 digits without sign or exponent. What is said
of a plain event is what `schemas.events` says of it; whether any other one is valid is not judged here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.columns import I32, I64, U8, U64
from pipeline.tables.hashes import SECOND_SEED, byte_at, murmur2_partition, trailing_zeros, u32_at, u64_at, xxh64
from pipeline.tables.kernel import jit
from schemas.events import ID_LENGTH, NUMBER_FIELDS, NUMBER_LIMIT, TEXT_LENGTH, Event

F64 = npt.NDArray[np.float64]
FIELDS = Event.__struct_fields__
EVENT_ID, EVENT, TS, USER_ID, ANONYMOUS_ID = range(5)  # their places in FIELDS, and but for TS in the spans
TEXT, ID, CURRENCY, NUMBER, TIME, OTHER = range(6)
POWERS: F64 = np.array([10.0**k for k in range(16)])
NULL, TRUE, ALSE = (int.from_bytes(word, "little") for word in (b"null", b"true", b"alse"))
PADDING = b" " * 16  # after the run, so that a word can be read anywhere in it
LONGEST = 16  # bytes of a field's name: two words
ONES, HIGH_BITS, ALL = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080), np.uint64(0xFFFFFFFFFFFFFFFF)
QUOTE, BACKSLASH, COMMA, COLON, DOT, OPEN, CLOSE, ZERO, NINE, SPACE, LETTER_F = (ord(c) for c in '"\\,:.{}09 f')


class Wanted(NamedTuple):
    """The known fields, and what a plan wants of each."""

    names: U64  # [fields, 2] bytes, the first one lowest
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
    return Wanted(*_fields(tuple(texts), tuple(numbers)), np.zeros(len(FIELDS) + 1, np.int64))


@cache
def _fields(texts: tuple[str, ...], numbers: tuple[str, ...]) -> tuple[U64, I64, I64, I64, I64]:
    """All of `Wanted` but its scratch; whoever wants the same shares it."""
    names = (
        np.frombuffer(b"".join(name.encode().ljust(LONGEST, b"\0") for name in FIELDS), np.dtype("<u8")).reshape(-1, 2).astype(np.uint64)
    )
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
    return names, lengths, kinds, limits, columns


@jit
def _key_words(base: int, begin: int, end: int) -> tuple[np.uint64, np.uint64]:
    """A key of at most 16 bytes as two words."""
    n = end - begin
    low, high = np.uint64(0), np.uint64(0)
    if n >= 8:
        low = u64_at(base, begin)
        if n > 8:
            high = u64_at(base, begin + 8) & (ALL >> np.uint64(128 - 8 * n))
    elif n > 0:
        low = u64_at(base, begin) & (ALL >> np.uint64(64 - 8 * n))
    return low, high


@jit
def _is_field(names: U64, lengths: I64, field: int, low: np.uint64, high: np.uint64, n: int) -> bool:
    return lengths[field] == n and names[field, 0] == low and names[field, 1] == high


@jit
def _after_space(base: int, at: int, stop: int) -> int:
    while at < stop and (byte_at(base, at) == 32 or byte_at(base, at) == 10 or byte_at(base, at) == 13 or byte_at(base, at) == 9):
        at += 1
    return at


@jit
def _end_of_text(base: int, at: int, stop: int) -> int:
    """Where the quote is that ends the text at `at`; -1 when the text is not plain."""
    while at < stop:  # eight bytes at a time: the lowest high bit of `special` is at the first quote, backslash or control character
        word = u64_at(base, at)
        quote, back = word ^ (ONES * np.uint64(QUOTE)), word ^ (ONES * np.uint64(BACKSLASH))
        special = (((quote - ONES) & ~quote) | ((back - ONES) & ~back) | ((word - ONES * np.uint64(SPACE)) & ~word)) & HIGH_BITS
        if special != 0:
            at += trailing_zeros(special) >> 3
            return at if at < stop and byte_at(base, at) == QUOTE else -1
        at += 8
    return -1


@jit
def _is_currency(base: int, begin: int, end: int) -> bool:
    if end - begin != 3:
        return False
    return 65 <= byte_at(base, begin) <= 90 and 65 <= byte_at(base, begin + 1) <= 90 and 65 <= byte_at(base, begin + 2) <= 90


@jit
def _number(base: int, at: int, stop: int) -> tuple[int, int, int]:
    """(end or -1 when not plain, digits as one integer, how many of them are decimals); below 10^15, so that the quotient is the nearest float."""
    begin, digits, decimals = at, np.int64(0), 0
    while at < stop and ZERO <= byte_at(base, at) <= NINE:
        digits = digits * 10 + byte_at(base, at) - ZERO
        at += 1
    whole = at - begin
    if whole == 0 or (whole > 1 and byte_at(base, begin) == ZERO):
        return -1, 0, 0
    if at < stop and byte_at(base, at) == DOT:
        at += 1
        while at < stop and ZERO <= byte_at(base, at) <= NINE:
            digits = digits * 10 + byte_at(base, at) - ZERO
            at += 1
            decimals += 1
        if decimals == 0:
            return -1, 0, 0
    if whole + decimals > 15:
        return -1, 0, 0
    return at, digits, decimals


@jit
def scan(data: U8, ends: I64, longest: int, wanted: Wanted, spans: Spans) -> None:
    """Event i is `data[ends[i - 1]:ends[i]]`, at most `longest` bytes if plain. The caller has checked that all is UTF-8, and PADDING bytes follow."""
    names, lengths, kinds, limits, columns, follows = wanted
    plain, stamps, texts, numbers, unknown = spans
    base, fields, stop = data.ctypes.data, len(lengths), np.int64(0)
    for i in range(len(ends)):
        begin, stop = stop, ends[i]
        plain[i] = 0
        unknown[i] = 0
        stamps[i] = -1
        for column in range(texts.shape[1]):
            texts[i, column, 0], texts[i, column, 1] = 0, 0
        for column in range(numbers.shape[1]):
            numbers[i, column] = np.nan
        if stop - begin > longest:
            continue
        at = _after_space(base, begin, stop)
        if at >= stop or byte_at(base, at) != OPEN:
            continue
        at = _after_space(base, at + 1, stop)
        known, good = fields, False
        while True:
            if at >= stop or byte_at(base, at) != QUOTE:
                break  # an empty object lacks what is required
            key, end = at + 1, _end_of_text(base, at + 1, stop)
            if end < 0:
                break
            field, n = fields, end - key
            if n <= LONGEST:
                low, high = _key_words(base, key, end)
                field = follows[known]
                if not _is_field(names, lengths, field, low, high, n):
                    field = 0
                    while field < fields and not _is_field(names, lengths, field, low, high, n):
                        field += 1
                    if field < fields:
                        follows[known] = field
            at = _after_space(base, end + 1, stop)
            if at >= stop or byte_at(base, at) != COLON:
                break
            at = _after_space(base, at + 1, stop)
            if at >= stop:
                break
            kind = kinds[field] if field < fields else -1
            column = columns[field] if field < fields else -1
            if byte_at(base, at) == QUOTE:
                value, end = at + 1, _end_of_text(base, at + 1, stop)
                if end < 0 or kind >= NUMBER or (kind >= 0 and end - value > limits[field]) or (kind == ID and end == value):
                    break
                if kind == CURRENCY and end > value and not _is_currency(base, value, end):
                    break
                if column >= 0:
                    texts[i, column, 0] = value
                    texts[i, column, 1] = end
                at = end + 1
            elif ZERO <= byte_at(base, at) <= NINE:
                at, digits, decimals = _number(base, at, stop)
                if at < 0 or 0 <= kind < NUMBER or kind == OTHER:
                    break
                if kind == NUMBER:
                    number = np.float64(digits) / POWERS[decimals]
                    if number > NUMBER_LIMIT:
                        break
                    if column >= 0:
                        numbers[i, column] = number
                elif kind == TIME:
                    if decimals > 0:
                        break
                    stamps[i] = digits
            elif at + 4 <= stop and u32_at(base, at) == NULL:
                if field in (EVENT_ID, EVENT, TS):
                    break
                if column >= 0:
                    if kind == NUMBER:
                        numbers[i, column] = np.nan
                    else:
                        texts[i, column, 0], texts[i, column, 1] = 0, 0
                at += 4
            elif kind < 0 and at + 5 <= stop and u32_at(base, at) == TRUE:
                at += 4
            elif kind < 0 and at + 5 <= stop and byte_at(base, at) == LETTER_F and u32_at(base, at + 1) == ALSE:
                at += 5
            else:
                break
            if field < fields:
                known = field
            else:
                unknown[i] += 1
            at = _after_space(base, at, stop)
            if at < stop and byte_at(base, at) == COMMA:
                at = _after_space(base, at + 1, stop)
                continue
            good = at < stop and byte_at(base, at) == CLOSE and _after_space(base, at + 1, stop) == stop
            break
        if good and stamps[i] >= 0 and texts[i, 0, 1] > 0 and texts[i, 1, 1] > 0:
            plain[i] = 1


@jit
def hash_spans(data: U8, texts: I32, column: int, out: U64) -> None:
    """xxHash64 of a column's texts [n]; 0 of an empty one."""
    base = data.ctypes.data
    for i in range(len(texts)):
        begin, end = texts[i, column, 0], texts[i, column, 1]
        out[i] = xxh64(base, begin, end, np.uint64(0)) if end > begin else np.uint64(0)


@jit
def hash_users(data: U8, texts: I32, plain: U8, partition: int, partitions: int, out: U64) -> None:
    """Two hashes [n, 2] of each event's user; an event without one, or whose user lives in another partition, is not plain."""
    base = data.ctypes.data
    for i in range(len(texts)):
        begin, end = texts[i, 2, 0], texts[i, 2, 1]
        if begin == end:
            begin, end = texts[i, 3, 0], texts[i, 3, 1]
        if begin == end or murmur2_partition(base, begin, end, partitions) != partition:
            plain[i] = 0
            continue
        out[i, 0] = xxh64(base, begin, end, np.uint64(0))
        out[i, 1] = xxh64(base, begin, end, SECOND_SEED)


@jit
def find_texts(data: U8, texts: I32, column: int, slots: I32, hashes: U64, begins: I64, pool: U8, numbers: I32, out: I32) -> int:
    """Numbers [n] of a column's texts, 0 of an empty one, -1 of one that is not in the pool; how many of those."""
    base, mask, missing = data.ctypes.data, np.uint64(len(slots) - 1), 0
    for i in range(len(texts)):
        begin, end = texts[i, column, 0], texts[i, column, 1]
        out[i] = 0
        if begin == end:
            continue
        key = xxh64(base, begin, end, np.uint64(0))
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
