"""`--map FILE`: foreign rows to our events, as data. The commands load it, `pipeline.files` applies it.

```toml
topic = "clickstream"             # where events go that [topics] does not name
[columns]                         # our field = their column
user_id = "user_id"
price = "price"
[constants]                       # our field = a value
currency = "USD"
[event]                           # the column that names the event, and what its names become; or `name`, the same for all rows
column = "event_type"
names = { view = "view_item", cart = "add_to_cart" }
[time]                            # ts: format is "ms", "s", "rfc3339" or strptime's; zone for times that name none
column = "event_time"
format = "%Y-%m-%d %H:%M:%S UTC"
zone = "UTC"
[event_id]                        # a hash of these columns; without the table the file's name and the row's number are the id
columns = ["user_id", "event_time"]
[topics]                          # our event name = topic kind, where it is not the default one
purchase = "orders"
[order]                           # events that go to orders get items and their sum as value
items = { item_id = "product_id", price = "price", quantity = "amount" }   # fields of an item = their columns; no quantity is 1
group = "invoice"                 # rows that share this column (and stand near each other) are one order
refund_prefix = "C"               # groups that begin so are refunds: event `refund`, refund_value = minus the sum
```
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from pipeline.files import Row, number, text
from schemas.events import KNOWN_FIELDS, NUMBER_FIELDS, Item

NEAR = 5000
"""Rows after its last one that an order waits for another row."""


class MappingError(Exception):
    """The map file is wrong; the message names file, key and remedy."""


class _Event(msgspec.Struct, forbid_unknown_fields=True):
    column: str | None = None
    name: str | None = None
    names: dict[str, str] = {}


class _Time(msgspec.Struct, forbid_unknown_fields=True):
    column: str
    format: str = "rfc3339"
    zone: str = "UTC"


class _Id(msgspec.Struct, forbid_unknown_fields=True):
    columns: list[str]


class _Order(msgspec.Struct, forbid_unknown_fields=True):
    items: dict[str, str]
    group: str | None = None
    refund_prefix: str | None = None


class _Map(msgspec.Struct, forbid_unknown_fields=True):
    event: _Event
    time: _Time
    columns: dict[str, str]
    topic: Literal["clickstream", "orders"] = "clickstream"
    constants: dict[str, str | float | int] = {}
    event_id: _Id | None = None
    topics: dict[str, Literal["clickstream", "orders"]] = {}
    order: _Order | None = None


def load_mapping(path: Path) -> TomlMapping:
    """The mapping that the file describes. Raises MappingError."""
    try:
        parsed = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _Map)
        zone = ZoneInfo(parsed.time.zone)
    except OSError as error:
        raise MappingError(f"{path} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MappingError(f"{path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise MappingError(
            f"{path}: {error}. The tables and keys are described in pipeline/mapping.py, with examples in deploy/maps."
        ) from error
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise MappingError(f"{path}: time.zone {parsed.time.zone!r} is no time zone; use an IANA name like Europe/Berlin") from error
    _check(path, parsed)
    return TomlMapping(parsed, zone)


def _check(path: Path, parsed: _Map) -> None:
    if (parsed.event.column is None) == (parsed.event.name is None):
        raise MappingError(f"{path}: event needs either column, which names the event, or name, the same for all rows")
    if unknown := sorted((set(parsed.columns) | set(parsed.constants)) - KNOWN_FIELDS):
        raise MappingError(f"{path}: columns and constants name no field of ours: {', '.join(unknown)}. The fields are in schemas/json.")
    if parsed.order and (unknown := sorted(set(parsed.order.items) - set(Item.__struct_fields__))):
        raise MappingError(
            f"{path}: order.items names no field of an item: {', '.join(unknown)}. There are {', '.join(Item.__struct_fields__)}."
        )
    if parsed.order and parsed.order.refund_prefix and not parsed.order.group:
        raise MappingError(f"{path}: order.refund_prefix looks at the column order.group: name it, or leave the prefix out")


@dataclass(frozen=True, slots=True)
class _Group:
    """The rows of one order so far."""

    number: int
    rows: list[Row]


class TomlMapping:
    """What a map file says, as a function from rows to events."""

    def __init__(self, parsed: _Map, zone: ZoneInfo) -> None:
        self._map = parsed
        self._zone = zone
        named = [parsed.event.column, parsed.time.column, *parsed.columns.values(), *(parsed.event_id.columns if parsed.event_id else ())]
        if parsed.order:
            named += [parsed.order.group, *parsed.order.items.values()]
        self.columns = frozenset(name for name in named if name)

    def __call__(self, rows: Iterable[tuple[int, Row]], source: str) -> Iterator[tuple[str, Row]]:
        """From numbered rows of the file `source` to events, each with its topic kind."""
        if self._map.order is None or self._map.order.group is None:
            for index, row in rows:
                yield self._event([row], f"{source}-{index}")
        else:
            for group in _grouped(rows, self._map.order.group):
                yield self._event(group.rows, f"{source}-{group.number}")

    def _event(self, rows: list[Row], place: str) -> tuple[str, Row]:
        told, row = self._map, rows[0]
        theirs = told.event.name or str(row.get(told.event.column or "") or "")
        name = told.event.names.get(theirs, theirs)
        order = told.order
        if order and order.refund_prefix and str(row.get(order.group or "") or "").startswith(order.refund_prefix):
            name = "refund"
        topic = told.topics.get(name, told.topic)
        event: Row = {
            "event_id": self._event_id(row, place),
            "event": name,
            "ts": _time(row.get(told.time.column), told.time.format, self._zone),
        }
        event |= told.constants
        event |= {ours: value for ours, column in told.columns.items() if (value := _cell(ours, row.get(column))) is not None}
        if order and topic == "orders":
            event |= _items(rows, order, refund=name == "refund")
        return topic, event

    def _event_id(self, row: Row, place: str) -> str:
        if self._map.event_id is None:
            return place
        return hashlib.blake2b("\x1f".join(str(row.get(c)) for c in self._map.event_id.columns).encode(), digest_size=16).hexdigest()


def _grouped(rows: Iterable[tuple[int, Row]], column: str) -> Iterator[_Group]:
    """Rows that share a value, in the order of their first rows; rows without one stand alone."""
    groups: dict[str, _Group] = {}
    last: dict[str, int] = {}
    for index, row in rows:
        key = str(row.get(column) or f"\x00{index}")
        groups.setdefault(key, _Group(index, [])).rows.append(row)
        last[key] = index
        while (oldest := next(iter(groups))) and last[oldest] < index - NEAR:
            del last[oldest]
            yield groups.pop(oldest)
    yield from groups.values()


def _items(rows: list[Row], order: _Order, refund: bool) -> Row:
    """Items and their sum. A refund's amounts are written with a minus in what is mapped, and without one in our events."""
    items, total = [], Decimal(0)
    sign = -1 if refund else 1
    for row in rows:
        item = {ours: value for ours, column in order.items.items() if (value := _cell(ours, row.get(column))) is not None}
        item.setdefault("quantity", 1.0)
        if isinstance(item["quantity"], float):
            item["quantity"] = item["quantity"] * sign or 0.0
            if isinstance(item.get("price"), float):
                total += Decimal(repr(item["quantity"])) * Decimal(repr(item["price"]))
        items.append(item)
    return {"items": items, "refund_value" if refund else "value": float(round(total, 4))}


def _time(value: Any, form: str, zone: ZoneInfo) -> Any:
    """Milliseconds; what can't be read stays as it is, and the worker rejects it."""
    try:
        if isinstance(value, datetime):
            read = value
        elif form in ("ms", "s"):
            return round(Decimal(str(value)) * (1 if form == "ms" else 1000))
        else:
            read = datetime.fromisoformat(str(value)) if form == "rfc3339" else datetime.strptime(str(value), form)
        return round((read if read.tzinfo else read.replace(tzinfo=zone)).timestamp() * 1000)
    except (TypeError, ValueError, OverflowError, ArithmeticError):
        return None if value is None else str(value)


def _cell(name: str, value: Any) -> Any:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return number(value) if name in NUMBER_FIELDS else text(value)
