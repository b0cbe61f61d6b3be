"""Event files as Kafka records: NDJSON, CSV or Parquet, each also gzipped. `pipeline.replay` sends what comes out; the commands call both.

A line of NDJSON goes out as it is. A row of CSV or Parquet becomes a JSON object of its non-empty columns. What is broken (a cut line, a row with
another number of columns, bytes that are no UTF-8) goes out as raw bytes, too: the worker rejects it with its reason, and nothing is lost silently.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import msgspec
import pyarrow as pa
import pyarrow.parquet

from schemas.events import NUMBER_FIELDS

BATCH = 5000
LONGEST_FIELD = 1 << 20
"""Of CSV, in characters: past it a quote that never closes is given up."""
REQUIRED = frozenset({"event_id", "event", "ts"})
FORMATS = {".ndjson": "ndjson", ".jsonl": "ndjson", ".json": "ndjson", ".csv": "csv", ".parquet": "parquet"}

Row = dict[str, Any]


class FilesError(Exception):
    """A file can't be read; the message names it and says what to do."""


class Keyed(NamedTuple):
    """A record to send: topic kind (`clickstream` or `orders`), key (None when there is no user) and value."""

    topic: str
    key: str | None
    value: bytes


class Mapping(Protocol):
    """Foreign rows to our events (`pipeline.mapping`)."""

    columns: frozenset[str]
    """Columns that a file must have."""

    def __call__(self, rows: Iterable[tuple[int, Row]], source: str) -> Iterator[tuple[str, Row]]:
        """From numbered rows of the file `source` to events, each with its topic kind."""
        ...


class Reading:
    """How much of a file has been read: by its bytes as they lie on the disk, of Parquet by its rows."""

    def __init__(self) -> None:
        self._share: Callable[[], float] = lambda: 0.0

    @property
    def share(self) -> float:
        """0 to 1."""
        return self._share()

    def follow(self, share: Callable[[], float]) -> None:
        self._share = share


class _User(msgspec.Struct):
    user_id: str | None = None
    anonymous_id: str | None = None


_user = msgspec.json.Decoder(_User).decode
_object = msgspec.json.Decoder(dict[str, Any]).decode


def read(path: Path, topic: str, mapping: Mapping | None = None, reading: Reading | None = None) -> Iterator[Keyed]:
    """All records of a file, streamed, in the same order each time. `topic` is the kind of records that no mapping routes. Raises FilesError."""
    form = file_format(path)
    reading = reading or Reading()
    try:
        if form == "ndjson" and mapping is None:
            yield from _lines_as_they_are(path, topic, reading)
            return
        columns = REQUIRED if mapping is None else mapping.columns
        rows = {"ndjson": _ndjson_rows, "csv": _csv_rows, "parquet": _parquet_rows}[form](path, columns, reading)
        yield from _plain(rows, topic) if mapping is None else _mapped(rows, topic, mapping, path.name)
    except (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeError) as error:
        raise FilesError(f"{path} can't be read: {error}. Is it whole, and what its ending says?") from error


def file_format(path: Path) -> str:
    """'ndjson', 'csv' or 'parquet', by the file's ending. Raises FilesError."""
    ending = next((s for s in reversed(path.suffixes) if s != ".gz"), "").lower()
    if ending not in FORMATS:
        raise FilesError(f"{path}: the ending says no format; name it .ndjson, .csv or .parquet, or the same with .gz")
    return FORMATS[ending]


def _open(path: Path, reading: Reading) -> IO[bytes]:
    file: Any = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 the callers close it
    raw, size = getattr(file, "fileobj", file), max(1, path.stat().st_size)
    reading.follow(lambda: 1.0 if raw.closed else float(raw.tell() / size))
    return file  # type: ignore[no-any-return]


def _lines_as_they_are(path: Path, topic: str, reading: Reading) -> Iterator[Keyed]:
    with _open(path, reading) as lines:
        for line in lines:
            value = line.rstrip(b"\r\n")
            if value:
                yield Keyed(topic, _key(value), value)


def _key(value: bytes) -> str | None:
    try:
        user = _user(value)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None
    return user.user_id or user.anonymous_id


def _ndjson_rows(path: Path, columns: frozenset[str], reading: Reading) -> Iterator[Row | bytes]:
    with _open(path, reading) as lines:
        for line in lines:
            value = line.rstrip(b"\r\n")
            if not value:
                continue
            try:
                yield _object(value)
            except (msgspec.DecodeError, RecursionError, UnicodeError):
                yield value


class _Lines:
    """Lines of a CSV file as text, remembering the bytes since the last row so that a broken one can be given back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._again: deque[bytes] = deque()
        self.taken: list[bytes] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._file)
        self.taken.append(line)
        return line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8", errors="surrogateescape")

    def broken(self) -> bytes:
        """The first line taken; those after it are read again, each on its own (an open quote had swallowed them)."""
        first, *rest = self.taken
        self._again.extendleft(reversed(rest))
        return first.rstrip(b"\r\n")


def _csv_rows(path: Path, columns: frozenset[str], reading: Reading) -> Iterator[Row | bytes]:
    csv.field_size_limit(LONGEST_FIELD)
    with _open(path, reading) as file:
        lines = _Lines(file)
        reader = csv.reader(lines)
        names = next(reader, [])
        _check_columns(path, names, columns)
        while True:
            lines.taken = []
            try:
                cells = next(reader)
                whole = len(cells) == len(names) and all(_is_text(line) for line in lines.taken)
            except StopIteration:
                return
            except csv.Error:
                cells, whole, reader = [""], False, csv.reader(lines)
            if whole:
                yield dict(zip(names, cells, strict=True))
            elif cells:
                yield lines.broken()


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeError:
        return False
    return True


def _parquet_rows(path: Path, columns: frozenset[str], reading: Reading) -> Iterator[Row | bytes]:
    source: Any = io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
    with pa.parquet.ParquetFile(source) as file:
        _check_columns(path, file.schema_arrow.names, columns)
        done, all_rows = 0, max(1, file.metadata.num_rows)
        reading.follow(lambda: done / all_rows)
        for batch in file.iter_batches(BATCH):
            done += batch.num_rows
            yield from pa.table({f.name: _in_microseconds(c) for f, c in zip(batch.schema, batch.columns, strict=True)}).to_pylist()


def _in_microseconds(column: Any) -> Any:
    """Python's datetime holds no nanoseconds."""
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        return column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return column


def _check_columns(path: Path, names: list[str], wanted: frozenset[str]) -> None:
    if missing := sorted(wanted - set(names)):
        raise FilesError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(names) or 'none'}. Without --map columns are named as in schemas/json, "
            "separated by commas; with it the map's columns must be there."
        )
    if len(set(names)) < len(names):
        raise FilesError(f"{path} has two columns of one name: {', '.join(names)}. Rename one.")


def _plain(rows: Iterator[Row | bytes], topic: str) -> Iterator[Keyed]:
    for row in rows:
        if isinstance(row, bytes):
            yield Keyed(topic, None, row)
        else:
            yield _keyed(topic, {name: typed for name, value in row.items() if (typed := _typed(name, value)) is not None})


def _mapped(rows: Iterator[Row | bytes], topic: str, mapping: Mapping, source: str) -> Iterator[Keyed]:
    broken: deque[bytes] = deque()

    def whole() -> Iterator[tuple[int, Row]]:
        for number, row in enumerate(rows):
            if isinstance(row, bytes):
                broken.append(row)
            else:
                yield number, row

    for routed, event in mapping(whole(), source):
        while broken:
            yield Keyed(topic, None, broken.popleft())
        yield _keyed(routed, event)
    for row in broken:
        yield Keyed(topic, None, row)


def _keyed(topic: str, event: Row) -> Keyed:
    user = event.get("user_id") or event.get("anonymous_id")
    return Keyed(topic, user if isinstance(user, str) else None, msgspec.json.encode(event))


def _typed(name: str, value: Any) -> Any:
    """A cell as the contract wants it; None for an empty one. What does not read as its type stays text, and the worker rejects it."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if name == "ts":
        return _timestamp(value)
    if name in NUMBER_FIELDS:
        return number(value)
    if name == "items":
        if isinstance(value, str):
            with suppress(msgspec.DecodeError, RecursionError):
                return msgspec.json.decode(value)
        return value
    return text(value)


def _timestamp(value: Any) -> Any:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        return int(value)
    return str(value) if isinstance(value, date | Decimal) else value


def number(value: Any) -> Any:
    """A float, or what was given when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return value if isinstance(value, bool | list | dict) else str(value)
    try:
        read = float(value)
    except (ValueError, OverflowError):
        return str(value)
    return read if math.isfinite(read) and "_" not in str(value) else str(value)


def text(value: Any) -> Any:
    """Text; ids that a file holds as whole numbers lose the `.0` that a gap in a column of numbers gives them."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, list | dict) else str(value)
