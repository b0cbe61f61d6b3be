"""Event files as Kafka records: NDJSON, CSV or Parquet, each also gzipped. `pipeline.replay` sends what comes out.

A line of NDJSON goes out as it is. A row of CSV or Parquet becomes a JSON object of its non-empty columns. What is broken (a cut line, a row with
too few columns) goes out as raw bytes, too: the worker rejects it with its reason, and nothing is lost silently.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from datetime import date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from schemas.events import NUMBER_FIELDS

BATCH = 5000


class FilesError(Exception):
    """A file can't be read; the message names it and says what to do."""


class Keyed(NamedTuple):
    """A record to send: topic kind (`clickstream` or `orders`), key (None when there is no user) and value."""

    topic: str
    key: str | None
    value: bytes


Row = dict[str, Any]
Mapping = Callable[[Row, int], list[tuple[str, Row]]]
"""From a foreign row and its number to events, each with its topic."""


class _User(msgspec.Struct):
    user_id: str | None = None
    anonymous_id: str | None = None


_user = msgspec.json.Decoder(_User).decode


def read(path: Path, topic: str, mapping: Mapping | None = None) -> Iterator[Keyed]:
    """All records of a file. Raises FilesError."""
    kind = [s for s in path.suffixes if s != ".gz"][-1:] or [""]
    try:
        if kind[0] in (".ndjson", ".jsonl", ".json"):
            yield from _ndjson(path, topic, mapping)
        elif kind[0] == ".csv":
            yield from _rows(_csv(path), topic, mapping)
        elif kind[0] == ".parquet":
            yield from _rows(_parquet(path), topic, mapping)
        else:
            raise FilesError(f"{path}: the ending says no format; name it .ndjson, .csv or .parquet, or the same with .gz")
    except (OSError, EOFError, pa.ArrowException, UnicodeError) as error:
        raise FilesError(f"{path} can't be read: {error}") from error


def _ndjson(path: Path, topic: str, mapping: Mapping | None) -> Iterator[Keyed]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines):
            value = line.rstrip(b"\r\n")
            if not value:
                continue
            if mapping is None:
                yield Keyed(topic, _key(value), value)
            else:
                try:
                    row = msgspec.json.decode(value, type=dict[str, Any])
                except (msgspec.DecodeError, RecursionError, UnicodeError):
                    yield Keyed(topic, None, value)
                else:
                    yield from _mapped(row, number, mapping)


def _key(value: bytes) -> str | None:
    try:
        user = _user(value)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None
    return user.user_id or user.anonymous_id


def _rows(rows: Iterator[Row | bytes], topic: str, mapping: Mapping | None) -> Iterator[Keyed]:
    for number, row in enumerate(rows):
        if isinstance(row, bytes):
            yield Keyed(topic, None, row)
        elif mapping is None:
            event = {name: _typed(name, value) for name, value in row.items() if value not in (None, "")}
            yield Keyed(topic, event.get("user_id") or event.get("anonymous_id"), msgspec.json.encode(event))
        else:
            yield from _mapped(row, number, mapping)


def _mapped(row: Row, number: int, mapping: Mapping) -> Iterator[Keyed]:
    for topic, event in mapping(row, number):
        user = event.get("user_id") or event.get("anonymous_id")
        yield Keyed(topic, user if isinstance(user, str) else None, msgspec.json.encode(event))


def _csv(path: Path) -> Iterator[Row | bytes]:
    broken: list[bytes] = []

    def keep(row: Any) -> str:
        broken.append((row.text or "").encode())
        return "skip"

    with pa.input_stream(str(path)) as stream:
        text = io.BytesIO(stream.read())
    head = text.readline().decode("utf-8-sig").strip()
    names = next(iter(pa.csv.read_csv(io.BytesIO(f"{head}\n{head}\n".encode())).column_names for _ in range(1)))
    text.seek(0)
    reader = pa.csv.open_csv(
        text,
        parse_options=pa.csv.ParseOptions(invalid_row_handler=keep),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
    )
    for batch in reader:
        yield from batch.to_pylist()
    yield from broken


def _parquet(path: Path) -> Iterator[Row]:
    source: Any = io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path
    for batch in pa.parquet.ParquetFile(source).iter_batches(BATCH):
        yield from batch.to_pylist()


def _typed(name: str, value: Any) -> Any:
    """CSV has text only: numbers and epoch times become numbers; what does not read as one stays text and is rejected by the worker."""
    if isinstance(value, datetime):
        return value.isoformat() if value.tzinfo else value.isoformat() + "Z"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, str) and name in NUMBER_FIELDS:
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, str) and name == "ts" and value.isdigit():
        return int(value)
    if isinstance(value, str) and name == "items":
        return msgspec.json.decode(value)
    return value
