"""The `ts` of an event's JSON, read and moved without touching anything else. `pipeline.resumable` paces and shifts files with it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)
_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeError, ValueError, OverflowError)


class _Timed(msgspec.Struct):
    ts: int | float | Annotated[datetime, msgspec.Meta(tz=True)]


_timed = msgspec.json.Decoder(_Timed).decode
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def time_of(value: bytes) -> int | None:
    """Event time in ms; None when it can't be read, and the worker will reject it."""
    try:
        ts = _timed(value).ts
        return (ts - _EPOCH) // _MS if isinstance(ts, datetime) else int(ts)
    except _UNREADABLE:
        return None


def moved(value: bytes, by_ms: int) -> bytes:
    """The same event `by_ms` later, `ts` in ms; every other field keeps its bytes. What has no readable time comes back as it is."""
    ts = time_of(value)
    if ts is None:
        return value
    return msgspec.json.encode(_fields(value) | {"ts": ts + by_ms})
