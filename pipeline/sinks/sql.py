"""What both ClickHouse sinks share: columns checked against the base tables, literals for queries, and which error codes may pass.

Called by `embedded.py` and `server.py`; pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.sinks.warehouse import NO_ANSWER, SinkRefused, SinkUnavailable
from schemas.rows import COLUMNS, Rows

TIMES = frozenset({"window_start", "cohort_start"})
TEXTS = frozenset({
    "funnel", "definition", "segment", "retention", "measure", "kpi", "window", "dimension", "dimension_value", "currency",
    "topic", "reason", "cause", "key", "raw",
})  # fmt: skip
SMALL: dict[str, np.dtype[Any]] = {
    "level": np.dtype(np.uint8),
    "bucket": np.dtype(np.int32),
    "period": np.dtype(np.int32),
    "partition": np.dtype(np.int32),
    "revision": np.dtype(np.int32),
}
UNSIGNED = frozenset({"version"})

RETRYABLE = {
    3: "unexpected end", 32: "read after end", 74: "disk", 75: "disk", 95: "network", 159: "timeout", 160: "too slow", 173: "memory",
    198: "DNS", 201: "quota", 202: "too many queries", 203: "no free connection", 209: "socket timeout", 210: "network", 225: "no keeper",
    236: "aborted", 241: "memory limit", 242: "read-only table", 243: "no space", 244: "keeper", 252: "too many parts",
    254: "no active replicas", 279: "connections failed", 285: "too few replicas", 286: "quorum", 305: "no active replicas",
    313: "quorum", 319: "unknown status of insert", 394: "cancelled", 425: "system call", 439: "no thread", 499: "object storage",
    574: "server overloaded", 735: "cancelled", 745: "server overloaded", 999: "keeper",
}  # fmt: skip
"""ClickHouse's error codes that say nothing against the data: the same insert may succeed later."""

REFUSED = "refused"
OVERLOADED = "other"  # a shared warehouse does not say which
SINK_ERROR_KINDS = tuple(sorted({NO_ANSWER, REFUSED, OVERLOADED, *(words.replace(" ", "_") for words in RETRYABLE.values())}))
"""Words for what can go wrong with a call to the warehouse."""

Column = npt.NDArray[Any] | Sequence[str | bytes]


def sink_error(code: int | None, message: str) -> SinkUnavailable | SinkRefused:
    """The exception for a ClickHouse error; its stack trace is cut off."""
    text = message.split("Stack trace")[0].strip()[:2000]
    return SinkUnavailable(text, RETRYABLE[code].replace(" ", "_")) if code in RETRYABLE else SinkRefused(text)


def prepared(rows: Rows) -> Iterator[tuple[str, int, dict[str, Column]]]:
    """(table, rows, columns in the table's order and its integer types) of every table that has rows, `progress` last.

    Times go from ms to seconds. SinkRefused for an unknown table or column, unequal lengths, a value that does not fit its type.
    """
    if unknown := rows.keys() - COLUMNS.keys():
        raise SinkRefused(f"no base table is called {', '.join(sorted(unknown))}")
    for table, names in COLUMNS.items():
        columns = rows.get(table)
        if not columns:
            continue
        if columns.keys() != set(names):
            raise SinkRefused(f"{table} has columns {', '.join(names)}; got {', '.join(columns)}")
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1:
            raise SinkRefused(f"{table}: columns of different lengths {sorted(lengths)}")
        n = lengths.pop()
        if n:
            yield table, n, {name: _column(table, name, columns[name]) for name in names}


def _column(table: str, name: str, values: Any) -> Column:
    if name in TEXTS:
        return _texts(table, name, values)
    array = np.asarray(values)
    if array.dtype == object or array.dtype.kind not in "iu":
        raise SinkRefused(f"{table}.{name} takes integers, not {array.dtype}")
    if name in TIMES:
        array = array // 1000
    wanted: np.dtype[Any] = np.dtype(np.uint32 if name in TIMES else np.uint64 if name in UNSIGNED else SMALL.get(name, np.int64))
    limits = np.iinfo(wanted)
    if int(array.min()) < limits.min or int(array.max()) > limits.max:
        raise SinkRefused(f"{table}.{name}: a value is outside {wanted}")
    fitted: npt.NDArray[Any] = array.astype(wanted)
    return fitted


def _texts(table: str, name: str, values: Any) -> Sequence[str | bytes]:
    texts = values.tolist() if isinstance(values, np.ndarray) else values
    kinds = set(map(type, texts))
    if kinds <= {str} or kinds <= {bytes}:
        return list(texts)
    if not kinds <= {str, bytes, bytearray, memoryview, type(None)}:
        raise SinkRefused(f"{table}.{name} takes text or bytes, not {', '.join(sorted(kind.__name__ for kind in kinds))}")
    return [text.encode() if isinstance(text, str) else bytes(text or b"") for text in texts]


_ESCAPES = {"\\": "\\\\", "'": "\\'", "\0": "\\0", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}
_ESCAPED = re.compile("[" + "".join(map(re.escape, _ESCAPES)) + "]")
_PLACEHOLDER = re.compile(r"%\((\w+)\)s|%%")


def literal(value: Any) -> str:
    """A value as a ClickHouse literal; ValueError for a type that has none here."""
    match value:
        case None:
            return "NULL"
        case bool():
            return str(int(value))
        case int() | np.integer():
            return str(int(value))
        case float() | np.floating():
            return repr(float(value))
        case str():
            return "'" + _ESCAPED.sub(lambda match: _ESCAPES[match[0]], value) + "'"
        case bytes():
            return "unhex('" + value.hex() + "')"
        case Decimal():
            return f"toDecimal128('{value:f}', {max(0, -int(value.as_tuple().exponent))})"
        case datetime():
            moment = value if value.tzinfo else value.replace(tzinfo=UTC)
            return f"toDateTime({int(moment.timestamp())}, 'UTC')"
        case date():
            return f"toDate('{value.isoformat()}')"
        case list() | tuple() | set() | frozenset():
            return "(" + ", ".join(map(literal, value)) + ")"
    raise ValueError(f"a {type(value).__name__} can't be a parameter of a query")


def bind(sql: str, parameters: Mapping[str, Any] | None) -> str:
    """`sql` with every `%(name)s` replaced by a literal; with parameters, `%%` is a percent sign. KeyError for one that is missing."""
    if parameters is None:
        return sql
    return _PLACEHOLDER.sub(lambda match: "%" if match[0] == "%%" else literal(parameters[match[1]]), sql)
