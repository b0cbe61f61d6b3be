"""`--map FILE`: foreign rows to our events, as data.

```toml
topic = "clickstream"             # where events go that [topics] does not name
[columns]                         # our field = their column
user_id = "user_id"
price = "price"
[constants]                       # our field = a value
currency = "USD"
[event]                           # which column names the event, and what their names become
column = "event_type"
names = { view = "view_item", cart = "add_to_cart" }
[time]                            # ts: format is "ms", "s", "rfc3339" or a strptime format; zone for the latter
column = "event_time"
format = "%Y-%m-%d %H:%M:%S UTC"
zone = "UTC"
[event_id]                        # from these columns; without the table the row's number is the id
columns = ["user_id", "event_time"]
[topics]                          # our event name = topic, where it is not the default one
purchase = "orders"
[orders]                          # fields of events that go to orders: our field = their column
value = "price"
```
"""

from __future__ import annotations

import tomllib
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
import xxhash

from pipeline.files import Mapping, Row
from schemas.events import NUMBER_FIELDS


class MappingError(Exception):
    """The map file is wrong; the message names file, key and remedy."""


class _Event(msgspec.Struct, forbid_unknown_fields=True):
    column: str
    names: dict[str, str] = {}


class _Time(msgspec.Struct, forbid_unknown_fields=True):
    column: str
    format: str = "rfc3339"
    zone: str = "UTC"


class _Id(msgspec.Struct, forbid_unknown_fields=True):
    columns: list[str]


class _Map(msgspec.Struct, forbid_unknown_fields=True):
    event: _Event
    time: _Time
    columns: dict[str, str]
    topic: str = "clickstream"
    constants: dict[str, str | float | int] = {}
    event_id: _Id | None = None
    topics: dict[str, str] = {}
    orders: dict[str, str] = {}


def load_mapping(path: Path) -> Mapping:
    """The function that the file describes. Raises MappingError."""
    try:
        parsed = msgspec.convert(tomllib.loads(path.read_text()), _Map)
        zone = ZoneInfo(parsed.time.zone)
    except OSError as error:
        raise MappingError(f"{path} can't be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise MappingError(f"{path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise MappingError(f"{path}: {error}") from error
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise MappingError(f"{path}: time.zone {parsed.time.zone!r} is no time zone; use an IANA name like Europe/Berlin") from error

    def apply(row: Row, number: int) -> list[tuple[str, Row]]:
        theirs = str(row.get(parsed.event.column) or "")
        name = parsed.event.names.get(theirs, theirs)
        topic = parsed.topics.get(name, parsed.topic)
        columns = parsed.columns | (parsed.orders if topic == "orders" else {})
        event: Row = {"event": name, "ts": _time(row.get(parsed.time.column), parsed.time.format, zone)}
        event |= parsed.constants | {ours: _value(ours, row[column]) for ours, column in columns.items() if row.get(column) not in (None, "")}
        if parsed.event_id is None:
            event["event_id"] = f"row-{number}"
        else:
            event["event_id"] = xxhash.xxh3_128_hexdigest("\x1f".join(str(row.get(c)) for c in parsed.event_id.columns))
        return [(topic, event)]

    return apply


def _time(value: Any, form: str, zone: ZoneInfo) -> Any:
    """Milliseconds; what can't be read stays as it is, and the worker rejects it."""
    try:
        if isinstance(value, datetime):
            return round((value if value.tzinfo else value.replace(tzinfo=zone)).timestamp() * 1000)
        if form in ("ms", "s"):
            return round(float(value) * (1 if form == "ms" else 1000))
        if form == "rfc3339":
            return value
        return round(datetime.strptime(str(value), form).replace(tzinfo=zone).timestamp() * 1000)
    except (TypeError, ValueError, OverflowError):
        return value


def _value(name: str, value: Any) -> Any:
    if name in NUMBER_FIELDS:
        try:
            return float(value)
        except (TypeError, ValueError):
            return value
    return value if isinstance(value, list | dict) else str(value)
