"""Events to columns: times, amounts, filters, strings, partitions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.partitioner.default import murmur2

from pipeline.columns import MONEY_SCALE, Strings
from pipeline.decode import ORIGIN_HEADER, REKEYED_HEADER, Decoded, Decoder
from pipeline.definitions import ANY_EVENT, Definitions, Filter, Match
from pipeline.plan import Plan
from schemas.events import NUMBER_LIMIT
from schemas.rejects import Reason

NOW = 1_767_225_600_000  # 2026-01-01


@dataclass(frozen=True)
class Raw:
    value: bytes | None
    offset: int = 0
    key: bytes | None = b"k"
    timestamp: int = NOW + 40_000_000_000
    headers: tuple[tuple[str, bytes], ...] = ()


def record(**fields: Any) -> Raw:
    return Raw(json.dumps({"event_id": "e", "event": "purchase", "ts": NOW, "user_id": "u"} | fields).encode())


def plan(*predicates: Match, fields: tuple[str, ...] = (), numbers: tuple[str, ...] = (), currency: str = "EUR") -> Plan:
    return Plan(Definitions(currency=currency), predicates, fields, numbers)


def decode(plan: Plan, *records: Raw, strings: Strings | None = None, topic: str = "orders") -> Decoded:
    result = Decoder(plan, Strings() if strings is None else strings, 0, 1).decode(topic, records)
    assert result.rejects == []
    return result


def passes(condition: Filter, *records: Raw) -> list[bool]:
    bits = decode(plan(Match(("other",)), Match((ANY_EVENT,), (condition,))), *records).columns.bits
    return (bits[:, 0] >> np.uint64(1) == 1).tolist()


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ts", "ms"),
    [
        (NOW, NOW),
        (float(NOW), NOW),
        ("2026-01-01T00:00:00Z", NOW),
        ("2026-01-01t00:00:00z", NOW),
        ("2026-01-01T08:00:00+08:00", NOW),
        ("2025-12-31T18:30:00-05:30", NOW),
        ("2026-01-01T00:00:00.25Z", NOW + 250),
        ("2026-01-01T00:00:00.0019Z", NOW + 1),
        ("2000-01-01T00:00:00Z", 946_684_800_000),
        ("2024-02-29T12:00:00+00:00", 1_709_208_000_000),
    ],
)
def test_ts_is_milliseconds_or_rfc_3339(ts: Any, ms: int) -> None:
    assert decode(plan(), record(ts=ts)).columns.ts.tolist() == [ms]


@settings(deadline=None)
@given(st.datetimes(datetime(2000, 1, 2), datetime(2026, 12, 30)), st.integers(-23 * 60, 23 * 60))
def test_rfc_3339_with_any_offset_is_the_same_instant(instant: datetime, minutes: int) -> None:
    local = instant.replace(microsecond=instant.microsecond // 1000 * 1000)
    sign, (hours, rest) = "-" if minutes < 0 else "+", divmod(abs(minutes), 60)
    expected = round(local.replace(tzinfo=UTC).timestamp() * 1000) - minutes * 60_000
    result = decode(plan(), record(ts=f"{local.isoformat(timespec='milliseconds')}{sign}{hours:02}:{rest:02}"))
    assert result.columns.ts.tolist() == [expected]


def test_mixed_spellings_of_ts_in_one_run_keep_their_places() -> None:
    records = [record(ts=NOW), record(ts="2026-01-01T00:00:01Z"), record(ts=float(NOW + 2000)), record(ts=NOW + 3000)]
    assert decode(plan(), *records).columns.ts.tolist() == [NOW, NOW + 1000, NOW + 2000, NOW + 3000]


def test_an_event_exactly_future_ms_ahead_is_accepted() -> None:
    ahead = Raw(record(ts=NOW).value, timestamp=NOW - 300_000)
    too_far = Raw(record(ts=NOW).value, timestamp=NOW - 300_001)
    result = Decoder(plan(), Strings(), 0, 1).decode("orders", [ahead, too_far])
    assert (result.rows.tolist(), [r.reason for r in result.rejects]) == ([0], [Reason.FROM_THE_FUTURE])


# --- amounts ----------------------------------------------------------------------------------------------------------


def amount(text: str) -> int:
    value = b'{"event_id":"e","event":"purchase","ts":1767225600000,"user_id":"u","value":' + text.encode() + b"}"
    return int(decode(plan(numbers=("value",)), Raw(value)).columns.numbers[0, 0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.30000000000000004", 3_000),  # 0.1 + 0.2
        ("35.79", 357_900),
        ("100000000000.01", 1_000_000_000_000_100),
        ("250000000000", 2_500_000_000_000_000),
        ("249999999999.9999", 2_499_999_999_999_999),
        ("1.005", 10_050),
        ("0", 0),
        ("-0.0", 0),
        ("1e2", 1_000_000),
        ("0.00005", 0),  # a float a little above half would round up; this one is half to even
        ("0.0001", 1),
        ("19", 190_000),
    ],
)
def test_amounts_are_exact_in_ten_thousandths(text: str, expected: int) -> None:
    assert amount(text) == expected


@settings(deadline=None)
@given(st.integers(0, NUMBER_LIMIT * MONEY_SCALE))
def test_any_amount_of_four_decimals_is_exact(units: int) -> None:
    assert amount(str(Decimal(units).scaleb(-4))) == units


def test_absent_and_null_numbers_are_zero_in_sums() -> None:
    result = decode(plan(numbers=("value", "tax")), record(value=1), record(tax=2), record(value=None))
    assert result.columns.numbers.tolist() == [[10_000, 0], [0, 20_000], [0, 0]]


# --- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "values", "expected"),
    [
        ("eq", (100_000,), [False, True, False, False, False]),
        ("eq", (100_000, 200_000), [False, True, True, False, False]),
        ("ne", (100_000,), [True, False, True, True, True]),
        ("gt", (100_000,), [False, False, True, False, False]),
        ("gte", (100_000,), [False, True, True, False, False]),
        ("lt", (100_000,), [True, False, False, False, False]),
        ("lte", (100_000,), [True, True, False, False, False]),
    ],
)
def test_number_filter(op: Any, values: tuple[int, ...], expected: list[bool]) -> None:
    """The last two have no value."""
    records = (record(value=9.9999), record(value=10), record(value=20), record(), record(value=None))
    assert passes(Filter("value", op, values), *records) == expected


@pytest.mark.parametrize(
    ("op", "values", "expected"),
    [
        ("eq", ("mobile",), [True, False, False, False, False]),
        ("eq", ("mobile", "tablet"), [True, True, False, False, False]),
        ("ne", ("mobile",), [False, True, True, True, True]),
    ],
)
def test_string_filter(op: Any, values: tuple[str, ...], expected: list[bool]) -> None:
    """The last three have no device."""
    records = (record(device="mobile"), record(device="tablet"), record(), record(device=None), record(device=""))
    assert passes(Filter("device", op, values), *records) == expected


def test_an_absent_number_is_not_zero_to_a_filter() -> None:
    assert passes(Filter("discount", "lte", (0,)), record(discount=0), record()) == [True, False]


def test_every_filter_of_a_match_must_hold_and_only_on_its_events() -> None:
    match = Match(("purchase", "refund"), (Filter("device", "eq", ("mobile",)), Filter("value", "gt", (10_000,))))
    records = (
        record(device="mobile", value=2),
        record(device="mobile", value=1),
        record(device="tv", value=2),
        record(event="refund", device="mobile", value=2),
        record(event="order_created", device="mobile", value=2),
    )
    assert decode(plan(match), *records).columns.bits[:, 0].tolist() == [1, 0, 0, 1, 0]


def test_predicates_beyond_64_go_to_the_next_word() -> None:
    matches = [Match((f"event-{i}",)) for i in range(63)] + [Match(("purchase",)), Match(("refund",)), Match((ANY_EVENT,))]
    matches += [Match(("refund",), (Filter("device", "eq", ("mobile",)),))]
    bits = decode(plan(*matches), record(), record(event="refund"), record(event="refund", device="mobile")).columns.bits
    assert bits.tolist() == [[1 << 63, 0b010], [0, 0b011], [0, 0b111]]


def test_event_names_first_seen_in_a_later_run_get_their_predicates() -> None:
    decoder = Decoder(plan(Match(("purchase",)), Match(("refund",))), Strings(), 0, 1)
    assert decoder.decode("orders", [record()]).columns.bits.tolist() == [[1]]
    assert decoder.decode("orders", [record(event="refund"), record()]).columns.bits.tolist() == [[2], [1]]


# --- strings ----------------------------------------------------------------------------------------------------------


def test_fields_are_interned_and_absent_ones_are_the_empty_string() -> None:
    strings = Strings()
    result = decode(
        plan(fields=("channel", "device")), record(channel="mail"), record(channel="邮件", device=""), record(device=None), strings=strings
    )
    assert [[strings[i] for i in row] for row in result.columns.fields.tolist()] == [["mail", ""], ["邮件", ""], ["", ""]]
    assert [strings[i] for i in result.columns.event.tolist()] == ["purchase"] * 3


def test_ids_of_a_restored_partition_go_on_where_they_were() -> None:
    strings = Strings()
    before = decode(plan(fields=("channel",)), record(channel="mail"), record(channel="seo"), strings=strings)
    after = decode(plan(fields=("channel",)), record(channel="seo"), record(channel="new"), strings=Strings(strings.texts))
    assert after.columns.fields[0, 0] == before.columns.fields[1, 0]
    assert after.columns.fields[1, 0] == len(strings)


def test_currency_is_the_shop_s_when_absent() -> None:
    strings = Strings()
    result = decode(plan(currency="CNY"), record(currency="USD"), record(), record(currency=None), record(currency=""), strings=strings)
    assert [strings[i] for i in result.columns.currency.tolist()] == ["USD", "CNY", "CNY", "CNY"]


def test_hashes_are_those_of_clickhouse() -> None:
    result = decode(plan(), record(order_id="1001"), record(order_id="订单"), record(), record(order_id=None))
    assert result.columns.order.tolist() == [xxhash.xxh64_intdigest(b"1001"), xxhash.xxh64_intdigest("订单".encode()), 0, 0]
    assert result.columns.event_id.tolist() == [xxhash.xxh64_intdigest(b"e")] * 4


def test_anonymous_visitor_is_the_user_until_one_is_known() -> None:
    anonymous, known = record(user_id=None, anonymous_id="a"), record(user_id="u", anonymous_id="a")
    users = decode(plan(), anonymous, known, record(user_id="a"), record(user_id="u")).columns.user.tolist()
    assert users[0] == users[2] != users[1] == users[3]


# --- partitions -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=64), st.integers(1, 64))
def test_home_partition_is_the_one_kafka_s_default_partitioner_picks(user: str, partitions: int) -> None:
    home = (murmur2(user.encode()) & 0x7FFFFFFF) % partitions
    raw = record(user_id=user)
    assert len(Decoder(plan(), Strings(), home, partitions).decode("orders", [raw]).columns) == 1
    if partitions > 1:
        away = Decoder(plan(), Strings(), (home + 1) % partitions, partitions).decode("orders", [raw])
        assert [(r.index, r.partition) for r in away.rekey] == [(0, home)]


def test_rekeyed_records_keep_the_topic_they_came_from() -> None:
    records = [
        Raw(record(event=name).value, headers=((REKEYED_HEADER, b"1"), (ORIGIN_HEADER, topic.encode())))
        for name, topic in (("purchase", "orders"), ("page_view", "clickstream"), ("refund", "orders"))
    ]
    result = Decoder(plan(), Strings(), 0, 1).decode_rekeyed(records)
    assert result.columns.topic.tolist() == [1, 0, 1]
    assert result.rejects == []


def test_a_long_run_equals_its_parts() -> None:
    records = [record(event_id=f"e{i}", ts=NOW + i, user_id=f"u{i % 7}", channel=f"c{i % 5}", value=i / 100) for i in range(9_000)]
    records[4_321] = Raw(b"{")
    one = Decoder(plan(fields=("channel",), numbers=("value",)), Strings(), 0, 1).decode("orders", records)
    assert [r.index for r in one.rejects] == [4_321]
    assert one.rows.tolist() == [i for i in range(9_000) if i != 4_321]
    assert one.columns.ts.tolist() == [NOW + i for i in one.rows.tolist()]
    assert one.columns.numbers[:, 0].tolist() == [i * 100 for i in one.rows.tolist()]


def test_a_decoder_adds_no_string_before_it_reads_an_event() -> None:
    """A restore builds one, too: a string it added there would be in no delta."""
    strings = Strings()
    decoder = Decoder(plan(Match(("purchase",), (Filter("device", "eq", ("mobile",)),)), currency="CNY"), strings, 0, 1)
    decoder.decode("orders", [Raw(b"{")])
    assert strings.texts == [""]
