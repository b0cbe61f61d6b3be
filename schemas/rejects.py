"""Why a record was not applied, and the envelope in which it is kept.

`pipeline.decode` and `pipeline.partition` give reasons; the envelope's JSON goes to `<topic>.rejected`, its fields to the warehouse's `rejects`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Reason(StrEnum):
    """One word for each way a record can be wrong; a metric's label and a column of the warehouse."""

    TOMBSTONE = "tombstone"  # no value: nothing to apply
    TOO_LARGE = "too_large"  # above max_message_bytes
    INVALID_UTF8 = "invalid_utf8"
    MALFORMED_JSON = "malformed_json"  # also an empty value, trailing bytes, NaN, a lone surrogate
    TOO_DEEP = "too_deep"  # nested beyond what a parser follows
    NOT_AN_OBJECT = "not_an_object"
    MISSING_FIELD = "missing_field"
    EMPTY = "empty"  # a required text of length 0
    WRONG_TYPE = "wrong_type"  # numbers as text, text as numbers, true, null in a required field
    TOO_LONG = "too_long"  # a text above its limit, too many items
    NEGATIVE_MONEY = "negative_money"  # any number below 0: prices, quantities, durations
    OUT_OF_RANGE = "out_of_range"  # a number above NUMBER_LIMIT, or too large for a float
    WRONG_CURRENCY = "wrong_currency"  # not three capital letters
    BAD_TIMESTAMP = "bad_timestamp"  # neither whole milliseconds nor RFC 3339 with an offset
    ABSURD_TIMESTAMP = "absurd_timestamp"  # outside 2000 to 2100
    FROM_THE_FUTURE = "from_the_future"  # further ahead of the broker's clock than future_ms
    WRONG_PARTITION = "wrong_partition"  # re-keyed once and still not where its user lives
    TOO_LATE = "too_late"  # older than the watermark by more than the allowed lateness


class RejectedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record as it came (key and value in base64), where it came from and why it was not applied."""

    reason: Reason
    cause: str
    topic: str
    partition: int
    offset: int
    key: bytes | None
    raw: bytes | None
    record_ts: int
