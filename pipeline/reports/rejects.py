"""Rejected records as the warehouse keeps them: asked for, drawn so that a terminal is safe, and which of them are worth sending again.

In: an open warehouse. Out: models and renderables for `shopstream rejects`. Everything in a reject came from outside: nothing of it reaches a
terminal unescaped, and no query is made of it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.pseudonyms import is_withheld
from pipeline.reports.render import FAINT, WIDE, reasons_line
from pipeline.reports.text import moment, safe
from pipeline.sinks.warehouse import Warehouse
from schemas.rejects import Reason

SHOWN_BYTES = 4096
INCOMPLETE = {
    Reason.TOMBSTONE.value: "it had no value: there is nothing to send",
    Reason.TOO_LARGE.value: "only its beginning is kept",
}
"""Reasons whose records can't be sent again as they were."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rejects: None for any. since: aware, of the record's time in Kafka."""

    topic: str | None = None
    reason: str | None = None
    since: datetime | None = None
    partition: int | None = None
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """A record that was not applied. key, raw: its bytes, None where they were not asked for (`pipeline.pseudonyms` says what they are where user ids
    do not leave Kafka); size: of the value kept, bytes; record_at: its time in Kafka."""

    topic: str
    partition: int
    offset: int
    reason: str
    cause: str
    record_at: datetime
    size: int
    key: bytes | None = None
    raw: bytes | None = None


def count_by_reason(warehouse: Warehouse, wanted: Wanted) -> list[tuple[str, int]]:
    """(reason, records), most first."""
    where, values = _where(wanted)
    rows = warehouse.query(
        f"SELECT reason, uniqExact(topic, partition, offset) AS n FROM rejects WHERE {where} GROUP BY reason ORDER BY n DESC, reason",  # noqa: S608
        values,
    )
    return [(str(reason), int(n)) for reason, n in rows]


def find(
    warehouse: Warehouse, wanted: Wanted, time_zone: str, limit: int, *, oldest_first: bool = False, whole: bool = False
) -> list[Reject]:
    """At most `limit` rejects, the newest first unless told otherwise; `whole`: with key and raw bytes."""
    where, values = _where(wanted)
    direction = "ASC" if oldest_first else "DESC"
    bytes_too = ", argMax(key, version), argMax(raw, version)" if whole else ""
    rows = warehouse.query(
        "SELECT topic, partition, offset, reason, argMax(cause, version), argMax(record_ts, version) AS at, "  # noqa: S608 our own text
        f"argMax(length(raw), version){bytes_too} FROM rejects WHERE {where} GROUP BY topic, partition, offset, reason "
        f"ORDER BY at {direction}, topic, partition, offset {direction} LIMIT %(limit)s",
        {**values, "limit": limit},
    )
    return [_reject(row, time_zone) for row in rows]


def _where(wanted: Wanted) -> tuple[str, dict[str, Any]]:
    values = {name: getattr(wanted, name) for name in ("topic", "reason", "partition", "offset") if getattr(wanted, name) is not None}
    conditions = [f"{name} = %({name})s" for name in values]
    if wanted.since is not None:
        values["since"] = round(wanted.since.timestamp() * 1000)
        conditions.append("record_ts >= %(since)s")
    return " AND ".join(conditions) or "1 = 1", values


def _reject(row: tuple[Any, ...], time_zone: str) -> Reject:
    topic, partition, offset, reason, cause, at, size, *whole = row
    when = datetime.fromtimestamp(int(at) / 1000, ZoneInfo(time_zone))
    key, raw = (_bytes(part) for part in whole) if whole else (None, None)
    return Reject(str(topic), int(partition), int(offset), str(reason), _text(cause), when, int(size), key, raw)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")


def replayable(found: Iterable[Reject], sources: Sequence[str]) -> tuple[list[Reject], dict[str, int]]:
    """Those that can go back to where they came from, and why the others can't, with their number."""
    good: list[Reject] = []
    left: dict[str, int] = {}
    for reject in found:
        why = INCOMPLETE.get(reject.reason)
        if why is None and reject.topic not in sources:
            why = f"{safe(reject.topic)} is none of the source topics ({', '.join(sources)})"
        if why is None:
            good.append(reject)
        else:
            left[f"{safe(reject.reason)}: {why}"] = left.get(f"{safe(reject.reason)}: {why}", 0) + 1
    return good, left


# --- drawing ------------------------------------------------------------------------------------------------------------------


def rejects_table(found: Sequence[Reject], reasons: Sequence[tuple[str, int]], width: int) -> RenderableType:
    """A line a record: where it is, why it was rejected."""
    total = sum(n for _, n in reasons)
    if not found:
        return Group(reasons_line(reasons), Text("nothing was rejected that this asks for", FAINT))
    table = Table(box=None, padding=(0, 0, 0, 2 if width >= WIDE else 1), pad_edge=False, header_style=FAINT, width=width)
    table.add_column("sent", no_wrap=True)
    table.add_column("topic", no_wrap=True, overflow="ellipsis", max_width=max(11, width // 6))
    for header in ("part", "offset"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("reason", no_wrap=True)
    table.add_column("cause", overflow="fold", ratio=1)
    for reject in found:
        place = (safe(reject.topic), str(reject.partition), str(reject.offset))
        table.add_row(f"{reject.record_at:%m-%d %H:%M:%S}", *place, Text(safe(reject.reason), "yellow"), Text(safe(reject.cause)))
    more = f"the newest {len(found):,} of {total:,}; " if total > len(found) else ""
    return Group(reasons_line(reasons), table, Text(f"{more}look at one: shopstream rejects show TOPIC PARTITION OFFSET", FAINT))


def reject_panel(reject: Reject, everything: bool) -> RenderableType:
    """One record: what is known of it, its key and its bytes, escaped; a dump of the first bytes where they are no text."""
    table = Table(box=None, show_header=False, padding=(0, 0, 0, 2), pad_edge=False)
    table.add_column(style=FAINT, no_wrap=True)
    table.add_column(overflow="fold")
    raw = reject.raw or b""
    cut = raw if everything else raw[:SHOWN_BYTES]
    table.add_row("record", Text(f"{safe(reject.topic)} {reject.partition} {reject.offset}", "bold"))
    table.add_row("sent", moment(reject.record_at, "1s"))
    table.add_row("reason", Text(safe(reject.reason), "yellow"))
    table.add_row("cause", Text(safe(reject.cause)))
    table.add_row("key", Text(safe(reject.key)) if reject.key else Text("(none)", FAINT))
    rest = f"; the first {len(cut):,} are shown, --all shows the rest" if len(cut) < len(raw) else ""
    held = "in Kafka only, as user ids don't leave it: --from-kafka shows it" if is_withheld(reject.key) else f"{len(raw):,} bytes{rest}"
    table.add_row("value", Text(held, FAINT))
    parts: list[RenderableType] = [table]
    if raw:
        parts.append(Text(safe(cut), overflow="fold"))
    if not _is_text(raw):
        parts += [Text(), Text(_dump(cut[:256]), FAINT)]
    return Group(*parts)


def _is_text(raw: bytes) -> bool:
    try:
        return raw.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _dump(raw: bytes) -> str:
    lines = []
    for at in range(0, len(raw), 16):
        row = raw[at : at + 16]
        shown = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        lines.append(f"{at:06x}  {row.hex(' '):<47}  {shown}")
    return "\n".join(lines)


def as_fields(reject: Reject) -> dict[str, Any]:
    """For JSON; bytes in base64, as in the dead-letter topics."""
    fields: dict[str, Any] = {
        "topic": reject.topic,
        "partition": reject.partition,
        "offset": reject.offset,
        "reason": reject.reason,
        "cause": reject.cause,
        "record_at": reject.record_at,
        "size": reject.size,
    }
    if reject.raw is not None:
        fields |= {"key": base64.b64encode(reject.key or b"").decode() or None, "raw": base64.b64encode(reject.raw).decode()}
    return fields
