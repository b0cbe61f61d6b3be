"""Raw records to columns of valid events; every other record gets a reason, or the partition where it belongs.

`pipeline.partition` calls `Decoder.decode` with a run of records of one topic partition. What is judged here depends on the record alone:
lateness and duplicates, which depend on what came before, are judged by the caller. A bad record never costs its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import compress
from operator import attrgetter
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from pipeline.columns import I64, U64, Columns, Strings
from pipeline.decode_columns import ColumnBuilder, EventReader, Mask, Reader, texts_of
from pipeline.decode_plain import PlainScanner, is_utf8
from pipeline.plan import Plan
from pipeline.tables.hashes import hash128, murmur2_partitions, text_rows
from pipeline.windows import EARLIEST_MS, LATEST_MS
from schemas.events import KNOWN_FIELDS, TOPICS, Event
from schemas.rejects import Reason

REKEYED_HEADER = "shopstream-rekeyed"
ORIGIN_HEADER = "shopstream-topic"
PIECE = 2000
"""Records parsed at a time: about 2 MB of events, which stay in the processor's cache (20,000 at a time cost a third more)."""

UNKNOWN_FIELDS_STRIDE = 64
"""In runs of more records than this, one in so many is read a second time, as a plain object, to count fields that are not ours: 0.02 µs an event."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_FAR = 1 << 62
_CURRENCY = re.compile(r"[A-Z]{3}", re.ASCII)


class Record(Protocol):
    """What is read of a Kafka record; aiokafka's ConsumerRecord has it."""

    @property
    def offset(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def timestamp(self) -> int: ...  # ms, the broker's or the producer's clock; not positive when there is none
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that can't be applied: its index in the run, why, and what exactly was wrong."""

    index: int
    reason: Reason
    cause: str


@dataclass(frozen=True, slots=True)
class Rekey:
    """A good event in the wrong partition: its record's index in the run and the partition where its user lives."""

    index: int
    partition: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """Every record of a run is exactly one of: a row of `columns`, a reject, a rekey."""

    columns: Columns
    rows: npt.NDArray[np.intp]  # [n] index in the run of each row's record, ascending
    rejects: list[Reject]  # ascending
    rekey: list[Rekey]  # ascending
    unknown_events: int  # rows whose event name is not one of schemas.events
    unknown_fields: int  # fields that are not in schemas.events: exact up to UNKNOWN_FIELDS_STRIDE records, else an estimate


class _FloatTimeEvent(Event, gc=False):
    ts: float  # type: ignore[assignment]


_decode_event = msgspec.json.Decoder(Event).decode
_decode_float_time = msgspec.json.Decoder(_FloatTimeEvent).decode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_get_value = attrgetter("value")
_get_ts = attrgetter("ts")


class Decoder:
    """Decodes what one partition's topics bring. `strings` grows by what it reads."""

    def __init__(self, plan: Plan, strings: Strings, partition: int, partitions: int, max_message_bytes: int = 1 << 20) -> None:
        self._future_ms = plan.definitions.future_ms
        self._partition = partition
        self._partitions = partitions
        self._max_message_bytes = max_message_bytes
        self._strings = strings
        self._builder = ColumnBuilder(plan, strings)
        self._scanner = PlainScanner(plan, self._builder.names, strings, partition, partitions, max_message_bytes)
        self._currencies: set[str | None] = {None, ""}

    def decode(self, topic: str, records: Sequence[Record]) -> Decoded:
        """A run of `topic`, one of schemas.events.TOPICS. Never raises on what a record holds."""
        return self._decode(np.full(len(records), TOPICS.index(topic), np.uint8), records, rekeyed=False)

    def decode_rekeyed(self, records: Sequence[Record]) -> Decoded:
        """A run of the internal topic: each record's header names the topic it came from."""
        return self._decode(np.array([_origin(record) for record in records], np.uint8), records, rekeyed=True)

    def _decode(self, topic: npt.NDArray[np.uint8], records: Sequence[Record], *, rekeyed: bool) -> Decoded:
        starts = range(0, max(len(records), 1), PIECE)
        return _joined([self._decode_piece(topic[at : at + PIECE], records[at : at + PIECE], rekeyed) for at in starts], starts)

    def _decode_piece(self, topic: npt.NDArray[np.uint8], records: Sequence[Record], rekeyed: bool) -> Decoded:
        """The plain events by the scanner, and what it does not take by the parser, which also says what is wrong with a record."""
        values = list(map(_get_value, records))
        plain = self._scanner.scan(values, self._latest(records))
        if not len(plain):
            return self._parse_piece(topic, records, values, rekeyed)
        scanned = self._built(topic, plain, plain.rows, plain.ts, plain.user, plain.unknown_fields)
        if len(plain) == len(records):
            return scanned
        others = np.delete(np.arange(len(records)), plain.rows)
        chosen = others.tolist()
        parsed = self._parse_piece(topic[others], [records[i] for i in chosen], [values[i] for i in chosen], rekeyed)
        return _merged(scanned, parsed, others)

    def _latest(self, records: Sequence[Record]) -> I64:
        """The latest ts [n] that is not from the future."""
        record_ts = _record_timestamps(records)
        return np.where(record_ts > 0, record_ts + self._future_ms, LATEST_MS)

    def _built(
        self, topic: npt.NDArray[np.uint8], events: Reader, rows: npt.NDArray[np.intp], ts: I64, user: U64, unknown_fields: int
    ) -> Decoded:
        b = self._builder.build(events)
        columns = Columns(topic[rows], user, b.event_id, ts, b.event, b.bits, b.fields, b.numbers, b.order, b.currency)
        return Decoded(columns, rows, [], [], b.unknown_events, unknown_fields)

    def _parse_piece(self, topic: npt.NDArray[np.uint8], records: Sequence[Record], values: list[bytes | None], rekeyed: bool) -> Decoded:
        rejects: list[Reject] = []
        indices, events = self._parse(values, rejects)
        unknown_fields = _count_unknown_fields(values, indices)
        indices, events, users = _with_user(indices, events, rejects)
        rows = np.array(indices, np.intp)
        ts = _timestamps(events)
        user, home = self._hash_users(users)

        good = self._judge(rows, events, ts, records, rejects)
        away = np.flatnonzero(good & (home != self._partition))
        rekey: list[Rekey] = []
        for row in away:
            index, target = int(rows[row]), int(home[row])
            if rekeyed or any(name == REKEYED_HEADER for name, _ in records[index].headers or ()):
                cause = f"the user lives in partition {target} of {self._partitions}, the record was re-keyed to {self._partition}"
                rejects.append(Reject(index, Reason.WRONG_PARTITION, cause))
            else:
                rekey.append(Rekey(index, target))
        good[away] = False
        if not good.all():
            events = list(compress(events, good))
            rows, ts, user = rows[good], ts[good], user[good]
        rejects.sort(key=attrgetter("index"))
        built = self._built(topic, EventReader(events, self._strings), rows, ts, user, unknown_fields)
        return replace(built, rejects=rejects, rekey=rekey)

    # --- bytes to events --------------------------------------------------------------------------------------------------

    def _parse(self, values: list[bytes | None], rejects: list[Reject]) -> tuple[list[int], list[Event]]:
        """The records that are events, by index; the others are added to `rejects`."""
        indices = self._admit(values, rejects)
        events: list[Event] = []
        stream = map(_decode_event, values if len(indices) == len(values) else [values[i] for i in indices])  # type: ignore[arg-type]
        failed: list[int] = []
        while True:
            try:
                events.extend(stream)  # on an error it has kept the events before, and goes on after the bad one
                break
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                at = len(events) + len(failed)
                index = indices[at]
                mended = _with_float_time(values[index], error)
                if mended is not None:
                    events.append(mended)
                else:
                    failed.append(at)
                    rejects.append(Reject(index, *_explain(error)))
        if failed:
            bad = set(failed)
            indices = [index for at, index in enumerate(indices) if at not in bad]
        return indices, events

    def _admit(self, values: list[bytes | None], rejects: list[Reject]) -> list[int]:
        """Indices of values that may be parsed: there, not too large, UTF-8. Checked all at once first, as nearly always all are."""
        try:
            joined = b"".join(values)  # type: ignore[arg-type]
            if max(map(len, values), default=0) <= self._max_message_bytes and (joined.isascii() or is_utf8(joined)):  # type: ignore[arg-type]
                return list(range(len(values)))
        except TypeError:  # a tombstone
            pass
        admitted = []
        for index, value in enumerate(values):
            if value is None:
                rejects.append(Reject(index, Reason.TOMBSTONE, "the record has no value"))
            elif len(value) > self._max_message_bytes:
                rejects.append(Reject(index, Reason.TOO_LARGE, f"{len(value)} bytes, the limit is {self._max_message_bytes}"))
            elif not is_utf8(value):
                rejects.append(Reject(index, Reason.INVALID_UTF8, "the value is not UTF-8"))
            else:
                admitted.append(index)
        return admitted

    # --- events judged ----------------------------------------------------------------------------------------------------

    def _hash_users(self, users: list[str]) -> tuple[U64, npt.NDArray[np.int32]]:
        """128-bit hashes [n, 2] and home partitions [n]."""
        data, ends = text_rows(users)
        hashes, home = np.empty((len(users), 2), np.uint64), np.empty(len(users), np.int32)
        hash128(data, ends, hashes)
        murmur2_partitions(data, ends, self._partitions, home)
        return hashes, home

    def _judge(self, rows: npt.NDArray[np.intp], events: list[Event], ts: I64, records: Sequence[Record], rejects: list[Reject]) -> Mask:
        """Which events [n] have a possible time and currency; the others are added to `rejects`, each for its first fault."""
        record_ts = _record_timestamps(records)[rows]
        absurd = (ts < EARLIEST_MS) | (ts >= LATEST_MS)
        future = (ts > record_ts + self._future_ms) & (record_ts > 0)
        good = ~(absurd | future)
        currencies = texts_of(events, "currency")
        strange = {text for text in set(currencies) - self._currencies if text and not _CURRENCY.fullmatch(text)}
        if strange:
            good &= ~np.fromiter((text in strange for text in currencies), np.bool_, len(currencies))
        self._currencies.update(set(currencies) - strange)
        for row in np.flatnonzero(~good):
            at = int(ts[row])
            if absurd[row]:
                reason, cause = Reason.ABSURD_TIMESTAMP, f"ts {_shown(events[row].ts)} is not between the years 2000 and 2100"
            elif future[row]:
                ahead = at - int(record_ts[row])
                reason, cause = (
                    Reason.FROM_THE_FUTURE,
                    f"ts {at} is {ahead} ms ahead of the record's timestamp, allowed are {self._future_ms}",
                )
            else:
                reason, cause = Reason.WRONG_CURRENCY, f"currency {currencies[row]!r} is not three capital letters"
            rejects.append(Reject(int(rows[row]), reason, cause[:300]))
        return good


def _joined(parts: list[Decoded], starts: Sequence[int]) -> Decoded:
    """Consecutive parts of a run as one; part i begins at record `starts[i]`."""
    if len(parts) == 1:
        return parts[0]
    return Decoded(
        Columns.concatenate([part.columns for part in parts]),
        np.concatenate([part.rows + at for at, part in zip(starts, parts, strict=True)]),
        [replace(reject, index=reject.index + at) for at, part in zip(starts, parts, strict=True) for reject in part.rejects],
        [replace(rekey, index=rekey.index + at) for at, part in zip(starts, parts, strict=True) for rekey in part.rekey],
        sum(part.unknown_events for part in parts),
        sum(part.unknown_fields for part in parts),
    )


def _merged(one: Decoded, other: Decoded, others: npt.NDArray[np.intp]) -> Decoded:
    """Two parts of a run that interleave; `others` are the records' indices of the second."""
    rows = np.concatenate((one.rows, others[other.rows]))
    order = np.argsort(rows)
    return Decoded(
        Columns.concatenate([one.columns, other.columns]).take(order),
        rows[order],
        [replace(reject, index=int(others[reject.index])) for reject in other.rejects],
        [replace(rekey, index=int(others[rekey.index])) for rekey in other.rekey],
        one.unknown_events + other.unknown_events,
        one.unknown_fields + other.unknown_fields,
    )


def _origin(record: Record) -> int:
    names = {value.decode("ascii", "replace") for name, value in record.headers or () if name == ORIGIN_HEADER}
    return next((i for i, topic in enumerate(TOPICS) if topic in names), 0)


def _shown(ts: Any) -> str:
    try:
        return str(ts)[:40]
    except ValueError:  # an int of more digits than Python prints
        return "of thousands of digits"


def _with_float_time(value: bytes | None, error: Exception) -> Event | None:
    """The event when all that was wrong is a `ts` of whole milliseconds written as a float, which JSON does not tell from an integer."""
    if not str(error).endswith("got `float` - at `$.ts`"):
        return None
    try:
        event = _decode_float_time(value or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not event.ts.is_integer():
        return None
    event.ts = int(event.ts)
    return event


def _explain(error: Exception) -> tuple[Reason, str]:
    """Reason and cause of a record that did not parse, from the parser's own words (checked by the tests of bad input)."""
    text = str(error)
    if isinstance(error, RecursionError):
        return Reason.TOO_DEEP, "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return Reason.INVALID_UTF8, text
    if not isinstance(error, msgspec.ValidationError):
        return Reason.MALFORMED_JSON, text
    if "missing required field" in text:
        return Reason.MISSING_FIELD, text
    if text.startswith("Expected `object`") and "at `$" not in text:
        return Reason.NOT_AN_OBJECT, text
    if "length >=" in text:
        return Reason.EMPTY, text
    if "length <=" in text:
        return Reason.TOO_LONG, text
    if "at `$.ts`" in text:
        return _explain_ts(text)
    if ">= 0" in text:
        return Reason.NEGATIVE_MONEY, text
    if "<= " in text or "out of range" in text:
        return Reason.OUT_OF_RANGE, text
    return Reason.WRONG_TYPE, text


def _explain_ts(text: str) -> tuple[Reason, str]:
    if "out of range" in text:
        return Reason.ABSURD_TIMESTAMP, text
    if "RFC3339" in text or "timezone" in text or "got `float`" in text:
        return Reason.BAD_TIMESTAMP, f"{text}; ts is whole milliseconds since 1970 or RFC 3339 with an offset"
    return Reason.WRONG_TYPE, text


def _with_user(indices: list[int], events: list[Event], rejects: list[Reject]) -> tuple[list[int], list[Event], list[str]]:
    """The events that name a user, and whom: `user_id`, else `anonymous_id`."""
    users: list[str | None] = texts_of(events, "user_id")
    if None not in users:
        return indices, events, users  # type: ignore[return-value]
    users = [user or event.anonymous_id or None for user, event in zip(users, events, strict=True)]
    named = [user is not None for user in users]
    for index in compress(indices, (not one for one in named)):
        rejects.append(Reject(index, Reason.MISSING_FIELD, "neither `user_id` nor `anonymous_id`"))
    return list(compress(indices, named)), list(compress(events, named)), [user for user in users if user is not None]


def _milliseconds(ts: int | datetime) -> int:
    """ms since 1970, fractions dropped; what int64 can't hold becomes something that is absurd all the same."""
    return max(-_FAR, min(_FAR, ts)) if isinstance(ts, int) else (ts - _EPOCH) // _MILLISECOND


def _timestamps(events: list[Event]) -> I64:
    try:
        return np.fromiter(map(_get_ts, events), np.int64, len(events))
    except (TypeError, OverflowError):  # RFC 3339, or more than int64 holds
        return np.fromiter((_milliseconds(event.ts) for event in events), np.int64, len(events))


def _record_timestamps(records: Sequence[Record]) -> I64:
    get = attrgetter("timestamp")
    try:
        return np.fromiter(map(get, records), np.int64, len(records))
    except TypeError:  # a record of a format that has no timestamp
        return np.array([get(record) or -1 for record in records], np.int64)


def _count_unknown_fields(values: list[bytes | None], indices: list[int]) -> int:
    stride = 1 if len(indices) <= UNKNOWN_FIELDS_STRIDE else UNKNOWN_FIELDS_STRIDE
    sample = indices[::stride]
    unknown = sum(_unknown_fields(values[index] or b"") for index in sample)
    return round(unknown * len(indices) / len(sample)) if unknown else 0


def _unknown_fields(value: bytes) -> int:
    try:
        return len(_decode_object(value).keys() - KNOWN_FIELDS)
    except RecursionError:  # parsed just below the limit, a frame higher than here
        return 1
