"""Every kind of bad input, in the middle of good neighbours: where it goes, with what reason, and that its neighbours come through unchanged."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.columns import Columns, Strings
from pipeline.decode import ORIGIN_HEADER, REKEYED_HEADER, Decoded, Decoder
from pipeline.definitions import Definitions, Filter, Match
from pipeline.plan import Plan
from schemas.rejects import Reason

NOW = 1_767_225_600_000  # 2026-01-01
LIMIT = 16_384
PLAN = Plan(
    Definitions(future_ms=300_000),
    (
        Match(("page_view",)),
        Match(("purchase",), (Filter("value", "gte", (100_000,)),)),
        Match(("*",), (Filter("device", "ne", ("mobile",)),)),
    ),
    ("channel", "device"),
    ("value", "price"),
)


@dataclass(frozen=True)
class Raw:
    offset: int
    value: bytes | None
    key: bytes | None = None
    timestamp: int = NOW
    headers: tuple[tuple[str, bytes], ...] = ()


def body(i: int, **changes: Any) -> dict[str, Any]:
    event = {
        "event_id": f"id-{i}",
        "event": "purchase",
        "ts": NOW + i,
        "user_id": f"user-{i}",
        "channel": "mail",
        "device": "mobile",
        "value": 35.79,
    }
    return {name: value for name, value in (event | changes).items() if value is not ...}


def good(i: int) -> Raw:
    value = json.dumps(body(i, channel=f"channel-{i}", page="página" if i % 2 else "/")).encode()
    return Raw(1000 + i, value, f"user-{i}".encode())


def decode(*records: Raw, partition: int = 0, partitions: int = 1) -> Decoded:
    return Decoder(PLAN, Strings(), partition, partitions, LIMIT).decode("orders", records)


def equal(left: Columns, right: Columns) -> bool:
    return all(np.array_equal(getattr(left, f.name), getattr(right, f.name)) for f in fields(Columns))


def of(**changes: Any) -> bytes:
    return json.dumps(body(5, **changes)).encode()


def raw(fragment: bytes) -> bytes:
    """A good event with one more member, as written."""
    return json.dumps(body(5)).encode()[:-1] + b"," + fragment + b"}"


BAD: dict[str, tuple[bytes | None, Reason]] = {
    "tombstone": (None, Reason.TOMBSTONE),
    "empty value": (b"", Reason.MALFORMED_JSON),
    "only spaces": (b"   ", Reason.MALFORMED_JSON),
    "above the size limit": (of(page="x" * LIMIT), Reason.TOO_LARGE),
    "not JSON": (b"hello", Reason.MALFORMED_JSON),
    "cut off": (of()[:-9], Reason.MALFORMED_JSON),
    "cut in a string": (of()[:20], Reason.MALFORMED_JSON),
    "bytes after the end": (of() + b"x", Reason.MALFORMED_JSON),
    "two objects in one message": (of() + of(event_id="other"), Reason.MALFORMED_JSON),
    "a comma that would splice it to its neighbour": (of() + b"," + of(event_id="injected"), Reason.MALFORMED_JSON),
    "a closing bracket that would end a list of its neighbours": (of() + b"]", Reason.MALFORMED_JSON),
    "trailing comma": (of()[:-1] + b",}", Reason.MALFORMED_JSON),
    "single quotes": (b"{'event_id': 'a'}", Reason.MALFORMED_JSON),
    "a comment": (b"/* hello */" + of(), Reason.MALFORMED_JSON),
    "byte order mark": (b"\xef\xbb\xbf" + of(), Reason.MALFORMED_JSON),
    "UTF-16": (of().decode().encode("utf-16"), Reason.INVALID_UTF8),
    "NUL bytes": (b"\x00" * 40, Reason.MALFORMED_JSON),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", Reason.INVALID_UTF8),
    "invalid UTF-8 in a known field": (raw(b'"page":"\xff\xfe"'), Reason.INVALID_UTF8),
    "invalid UTF-8 in an unknown field": (raw(b'"theirs":"\xc3\x28"'), Reason.INVALID_UTF8),
    "invalid UTF-8 in a name": (raw(b'"\xc3\x28":1'), Reason.INVALID_UTF8),
    "a surrogate in UTF-8": (raw(b'"page":"\xed\xa0\x80"'), Reason.INVALID_UTF8),
    "a truncated character at the end": (of() + b"\xe4\xb8", Reason.INVALID_UTF8),
    "overlong UTF-8": (raw(b'"page":"\xc0\xaf"'), Reason.INVALID_UTF8),
    "a lone surrogate": (raw(b'"page":"\\ud800"'), Reason.MALFORMED_JSON),
    "a bad escape": (raw(b'"page":"\\x41"'), Reason.MALFORMED_JSON),
    "a control character in a string": (raw(b'"page":"a\nb"'), Reason.MALFORMED_JSON),
    "NaN": (raw(b'"price":NaN'), Reason.MALFORMED_JSON),
    "Infinity": (raw(b'"price":Infinity'), Reason.MALFORMED_JSON),
    "minus Infinity": (raw(b'"price":-Infinity'), Reason.MALFORMED_JSON),
    "NaN in an unknown field": (raw(b'"theirs":NaN'), Reason.MALFORMED_JSON),
    "1e999": (raw(b'"price":1e999'), Reason.OUT_OF_RANGE),
    "an integer of 400 digits": (raw(b'"price":' + b"9" * 400), Reason.OUT_OF_RANGE),
    "a leading zero": (raw(b'"price":007'), Reason.MALFORMED_JSON),
    "a nesting bomb in an unknown field": (raw(b'"theirs":' + b"[" * 1500 + b"]" * 1500), Reason.TOO_DEEP),
    "a nesting bomb of objects": (raw(b'"theirs":' + b'{"a":' * 1100 + b"1" + b"}" * 1100), Reason.TOO_DEEP),
    "a nesting bomb that is never closed": (raw(b'"theirs":' + b"[" * 2000), Reason.TOO_DEEP),
    "an array": (b"[" + of() + b"]", Reason.NOT_AN_OBJECT),
    "a string": (b'"purchase"', Reason.NOT_AN_OBJECT),
    "a number": (b"17", Reason.NOT_AN_OBJECT),
    "null": (b"null", Reason.NOT_AN_OBJECT),
    "an empty object": (b"{}", Reason.MISSING_FIELD),
    "no event_id": (of(event_id=...), Reason.MISSING_FIELD),
    "no event name": (of(event=...), Reason.MISSING_FIELD),
    "no ts": (of(ts=...), Reason.MISSING_FIELD),
    "no user": (of(user_id=...), Reason.MISSING_FIELD),
    "null for a user, anonymous_id empty": (of(user_id=None, anonymous_id=""), Reason.MISSING_FIELD),
    "empty event_id": (of(event_id=""), Reason.EMPTY),
    "empty event name": (of(event=""), Reason.EMPTY),
    "empty user_id": (of(user_id=""), Reason.EMPTY),
    "null event_id": (of(event_id=None), Reason.WRONG_TYPE),
    "user_id as a number": (of(user_id=42), Reason.WRONG_TYPE),
    "event as a list": (of(event=["purchase"]), Reason.WRONG_TYPE),
    "value as text": (of(value="35.79"), Reason.WRONG_TYPE),
    "value as a boolean": (of(value=True), Reason.WRONG_TYPE),
    "value as an object": (of(value={"amount": 1}), Reason.WRONG_TYPE),
    "a field that no definition uses, of a wrong type": (of(search_term=5), Reason.WRONG_TYPE),
    "a number in a field that no definition uses, as text": (of(load_ms="12"), Reason.WRONG_TYPE),
    "items as an object": (of(items={"item_id": "a"}), Reason.WRONG_TYPE),
    "an item as text": (of(items=["a"]), Reason.WRONG_TYPE),
    "quantity of an item as text": (of(items=[{"quantity": "2"}]), Reason.WRONG_TYPE),
    "too many items": (of(items=[{}] * 1001), Reason.TOO_LONG),
    "a long event_id": (of(event_id="x" * 257), Reason.TOO_LONG),
    "a long user_id": (of(user_id="x" * 257), Reason.TOO_LONG),
    "a long event name": (of(event="x" * 257), Reason.TOO_LONG),
    "a long page": (of(page="x" * 1025), Reason.TOO_LONG),
    "negative value": (of(value=-0.01), Reason.NEGATIVE_MONEY),
    "negative quantity": (of(quantity=-1), Reason.NEGATIVE_MONEY),
    "negative price in an item": (of(items=[{"price": -1}]), Reason.NEGATIVE_MONEY),
    "negative refund": (of(refund_value=-5), Reason.NEGATIVE_MONEY),
    "more money than is exact": (of(value=3e11), Reason.OUT_OF_RANGE),
    "a large price in an item": (of(items=[{"price": 1e15}]), Reason.OUT_OF_RANGE),
    "currency in small letters": (of(currency="eur"), Reason.WRONG_CURRENCY),
    "currency as a sign": (of(currency="€"), Reason.WRONG_CURRENCY),
    "currency with a line break": (of(currency="EUR\n"), Reason.WRONG_CURRENCY),
    "currency of wide letters": (of(currency="ＥＵＲ"), Reason.WRONG_CURRENCY),
    "ts null": (of(ts=None), Reason.WRONG_TYPE),
    "ts a boolean": (of(ts=True), Reason.WRONG_TYPE),
    "ts an object": (of(ts={"ms": NOW}), Reason.WRONG_TYPE),
    "ts as text of digits": (of(ts=str(NOW)), Reason.BAD_TIMESTAMP),
    "ts without an offset": (of(ts="2026-01-01T00:00:00"), Reason.BAD_TIMESTAMP),
    "ts a date": (of(ts="2026-01-01"), Reason.BAD_TIMESTAMP),
    "ts of the 30th of February": (of(ts="2026-02-30T00:00:00Z"), Reason.BAD_TIMESTAMP),
    "ts empty": (of(ts=""), Reason.BAD_TIMESTAMP),
    "ts with a fraction of a millisecond": (of(ts=NOW + 0.5), Reason.BAD_TIMESTAMP),
    "ts in seconds": (of(ts=NOW // 1000), Reason.ABSURD_TIMESTAMP),
    "ts in microseconds": (of(ts=NOW * 1000), Reason.ABSURD_TIMESTAMP),
    "ts zero": (of(ts=0), Reason.ABSURD_TIMESTAMP),
    "ts negative": (of(ts=-NOW), Reason.ABSURD_TIMESTAMP),
    "ts of 1999": (of(ts="1999-12-31T23:59:59.999Z"), Reason.ABSURD_TIMESTAMP),
    "ts of the year 1": (of(ts="0001-01-01T00:00:00+23:59"), Reason.ABSURD_TIMESTAMP),
    "ts of the year 9999": (of(ts="9999-12-31T23:59:59-23:59"), Reason.ABSURD_TIMESTAMP),
    "ts beyond 64 bits": (of(ts=2**63), Reason.ABSURD_TIMESTAMP),
    "ts far below 64 bits": (of(ts=-(2**70)), Reason.ABSURD_TIMESTAMP),
    "ts of 4,000 digits": (raw(b'"ts":' + b"1" * 3800), Reason.ABSURD_TIMESTAMP),
    "ts 1e300": (raw(b'"ts":1e300'), Reason.ABSURD_TIMESTAMP),
    "ts 1e999": (raw(b'"ts":1e999'), Reason.ABSURD_TIMESTAMP),
    "ts ahead of the broker's clock": (of(ts=NOW + 300_001), Reason.FROM_THE_FUTURE),
    "ts a day ahead, as RFC 3339": (of(ts="2026-01-02T00:00:00Z"), Reason.FROM_THE_FUTURE),
}
assert len(BAD) >= 40

NEIGHBOURS = [good(i) for i in range(10)]
ALONE = decode(*NEIGHBOURS)


@pytest.mark.parametrize("kind", BAD)
def test_bad_record_at_any_position_is_rejected_whole_and_its_neighbours_are_applied(kind: str) -> None:
    value, reason = BAD[kind]
    bad = Raw(77, value, b"user-5")
    for position in range(len(NEIGHBOURS) + 1):
        result = decode(*NEIGHBOURS[:position], bad, *NEIGHBOURS[position:])

        assert [(reject.index, reject.reason) for reject in result.rejects] == [(position, reason)]
        assert result.rejects[0].cause
        assert len(result.rejects[0].cause) < 500
        assert result.rows.tolist() == [row for row in range(len(NEIGHBOURS) + 1) if row != position]
        assert result.rekey == []
        assert equal(result.columns, ALONE.columns)


def test_neighbours_decode_to_what_they_say() -> None:
    """Without this, neighbours could be 'unchanged' and wrong."""
    assert ALONE.columns.event_id.tolist() == [xxhash.xxh64_intdigest(f"id-{i}".encode()) for i in range(10)]
    assert ALONE.columns.ts.tolist() == [NOW + i for i in range(10)]
    assert ALONE.columns.numbers.tolist() == [[357_900, 0]] * 10


def test_all_kinds_in_one_run_cost_no_neighbour() -> None:
    records: list[Raw] = []
    for i, (value, _) in enumerate(BAD.values()):
        records += [Raw(2 * i, value, b"k"), good(i)]
    result = decode(*records)
    assert [reject.reason for reject in result.rejects] == [reason for _, reason in BAD.values()]
    assert [reject.index for reject in result.rejects] == list(range(0, len(records), 2))
    assert result.rows.tolist() == list(range(1, len(records), 2))
    assert equal(result.columns, decode(*[good(i) for i in range(len(BAD))]).columns)


def test_a_run_of_bad_records_alone_gives_empty_columns() -> None:
    result = decode(*[Raw(i, b"{", b"k") for i in range(3)])
    assert (len(result.columns), len(result.rejects)) == (0, 3)
    assert result.columns.bits.shape == (0, 1)
    assert len(decode().columns) == 0


def test_event_in_the_wrong_partition_is_rekeyed_to_its_user_s() -> None:
    whole = decode(*NEIGHBOURS, partitions=4)
    homes = {int(row): 0 for row in whole.rows} | {rekey.index: rekey.partition for rekey in whole.rekey}
    assert len(homes) == len(NEIGHBOURS)
    assert 0 < len(whole.rekey) < len(NEIGHBOURS)
    for index, home in homes.items():
        assert decode(NEIGHBOURS[index], partition=home, partitions=4).rows.tolist() == [0]


@pytest.mark.parametrize("header", [True, False])
def test_event_rekeyed_once_and_still_wrong_is_rejected(header: bool) -> None:
    index = decode(*NEIGHBOURS, partitions=4).rekey[0].index
    headers = ((REKEYED_HEADER, b"1"), (ORIGIN_HEADER, b"orders")) if header else ((ORIGIN_HEADER, b"orders"),)
    record = Raw(0, NEIGHBOURS[index].value, NEIGHBOURS[index].key, NOW, headers)
    decoder = Decoder(PLAN, Strings(), 0, 4)
    result = decoder.decode("orders", [record]) if header else decoder.decode_rekeyed([record])
    assert [reject.reason for reject in result.rejects] == [Reason.WRONG_PARTITION]
    assert result.rekey == []


def test_bad_event_in_the_wrong_partition_is_rejected_where_it_came_in() -> None:
    index = decode(*NEIGHBOURS, partitions=4).rekey[0].index
    result = decode(Raw(0, json.dumps(body(index, ts=5)).encode(), b"k"), partitions=4)
    assert [reject.reason for reject in result.rejects] == [Reason.ABSURD_TIMESTAMP]
    assert result.rekey == []


@pytest.mark.parametrize("key", [None, b"", b"\xff\xfe", b"someone-else"])
def test_event_whose_user_lives_here_is_applied_whatever_its_key(key: bytes | None) -> None:
    assert decode(Raw(0, of(), key)).rows.tolist() == [0]


@pytest.mark.parametrize("timestamp", [-1, 0, None])
def test_without_a_record_timestamp_nothing_is_from_the_future(timestamp: int) -> None:
    assert decode(Raw(0, of(ts="2099-01-01T00:00:00Z"), b"k", timestamp)).rejects == []


def test_unknown_names_and_fields_are_accepted_and_counted() -> None:
    value = json.dumps(body(1, event="our_own", theirs=1, more={"a": [1]})).encode()
    result = decode(good(0), Raw(1, value, b"user-1"))
    assert (len(result.columns), result.unknown_events, result.unknown_fields) == (2, 1, 2)


def test_unknown_fields_are_estimated_in_long_runs() -> None:
    value = json.dumps(body(1, theirs=1)).encode()
    assert decode(*[Raw(i, value, b"user-1") for i in range(3000)]).unknown_fields == 3000


def test_of_a_name_that_comes_twice_the_last_one_counts() -> None:
    assert decode(Raw(0, raw(b'"value":1.5'), b"k")).columns.numbers.tolist() == [[15_000, 0]]


@st.composite
def mangled(draw: st.DrawFn) -> bytes | None:
    """Noise, or a good event with bytes changed, cut, repeated, or a member of any JSON value."""
    kind = draw(st.sampled_from(("noise", "none", "good", "cut", "flip", "insert", "member")))
    seed = draw(st.integers(0, 50))
    data = bytearray(good(seed).value or b"")
    at = draw(st.integers(0, len(data) - 1))
    if kind == "noise":
        return draw(st.binary(max_size=80))
    if kind == "none":
        return None
    if kind == "cut":
        return bytes(data[:at])
    if kind == "flip":
        data[at] = draw(st.integers(0, 255))
    elif kind == "insert":
        data[at:at] = draw(st.sampled_from([b'"', b"{", b"}", b"\\", b",", b"\xff", b"\x00", b"-", b"1e999", b"null", b"[[[["]))
    elif kind == "member":
        name = draw(st.sampled_from(["ts", "user_id", "value", "currency", "items", "event", "anonymous_id", "load_ms", "other"]))
        json_values = st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=5,
        )
        return json.dumps(body(seed) | {name: draw(json_values)}, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return bytes(data)


@settings(max_examples=300, deadline=None)
@given(st.lists(mangled(), max_size=12), st.integers(0, 3))
def test_whatever_comes_every_record_ends_in_exactly_one_place(values: list[bytes | None], partition: int) -> None:
    records = [Raw(i, value, b"k") for i, value in enumerate(values)]
    result = decode(*records, partition=partition, partitions=4)
    places = [*result.rows.tolist(), *(r.index for r in result.rejects), *(r.index for r in result.rekey)]
    assert sorted(places) == list(range(len(records)))
    assert result.rows.tolist() == sorted(result.rows.tolist())
    assert len(result.columns) == len(result.rows)
    assert all(reject.cause for reject in result.rejects)
    assert all(rekey.partition != partition for rekey in result.rekey)
    one_by_one = [decode(record, partition=partition, partitions=4) for record in records]
    assert [len(one.columns) for one in one_by_one] == [int(i in set(result.rows.tolist())) for i in range(len(records))]


def test_order_of_bad_and_good_does_not_matter_to_the_columns() -> None:
    shuffled = [Raw(i, value, b"k") for i, (value, _) in enumerate(BAD.values())]
    for seed in range(5):
        mixed = list(NEIGHBOURS)
        for record in random.Random(seed).sample(shuffled, len(shuffled)):
            mixed.insert(random.Random(seed + record.offset).randrange(len(mixed) + 1), record)
        assert equal(decode(*mixed).columns, decode(*sorted(NEIGHBOURS, key=mixed.index)).columns)


def test_no_depth_of_nesting_stops_the_run() -> None:
    """Around the limit of the parser, which depends on how deep its caller is."""
    for depth in range(880, 1010):
        result = decode(good(0), Raw(1, raw(b'"theirs":' + b"[" * depth + b"]" * depth), b"k"), good(2))
        assert set(result.rows.tolist()) >= {0, 2}
        assert len(result.rows) + len(result.rejects) == 3
