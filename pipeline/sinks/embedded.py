"""The warehouse in this process: ClickHouse as a library (chdb) over one folder, nothing to install or start.

One process holds a folder at a time; several workers share it through `shared.py`. The only module that imports chdb.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
from chdb.session import Session

from pipeline.sinks.migrations import Deployment, migrate
from pipeline.sinks.sql import TEXTS, bind, prepared, sink_error
from pipeline.sinks.warehouse import SinkRefused
from schemas.rows import Rows

_CODE = re.compile(r"Code: (\d+)")
_SETTINGS = "concurrent_part_removal_threshold = 1000000"
"""Merged parts are removed by the thread that finds them. From 100 on ClickHouse starts 117 more for it, which stay, with some 25 MB of memory."""


class EmbeddedWarehouse:
    """A Warehouse in `folder` ('' keeps it in memory). Thread-safe, one statement at a time.

    Its database is `default`, so that `SELECT … FROM funnel_report` works on the folder without further ado. A process can have
    several open only of the same folder. SinkRefused when the folder is held by another process or can't be written.
    """

    def __init__(self, folder: str, deployment: Deployment | None = None) -> None:
        self._deployment = deployment or Deployment(database="default")
        self._lock = threading.RLock()
        try:
            self._session: Any = Session(folder or None)
        except RuntimeError as error:
            raise SinkRefused(f"chdb can't open the warehouse folder {folder!r} (one process at a time may): {_short(error)}") from None
        self._statement("SET output_format_arrow_string_as_string = 0")  # strings may be any bytes
        if self._deployment.database != "default":
            self._statement(f"CREATE DATABASE IF NOT EXISTS {self._deployment.database}")
            self._statement(f"USE {self._deployment.database}")

    def migrate(self, again: bool = False) -> list[str]:
        with self._lock:
            done = migrate(self._statement, self._deployment, again)
            if done:
                self._settle_tables()
            return done

    def _settle_tables(self) -> None:
        database = self._deployment.database
        tables = f"SELECT name FROM system.tables WHERE database = '{database}' AND engine LIKE '%MergeTree'"  # noqa: S608 an identifier, checked
        for (table,) in self._statement(tables):
            self._statement(f"ALTER TABLE {database}.{table} MODIFY SETTING {_SETTINGS}")

    def insert(self, rows: Rows) -> None:
        with self._lock:
            for table, _, columns in prepared(rows):
                try:
                    arrays = {name: _text_array(data) if name in TEXTS else pa.array(data) for name, data in columns.items()}
                except (pa.ArrowException, UnicodeError, TypeError) as error:
                    raise SinkRefused(f"{table}: {error}") from None
                self._insert(f"INSERT INTO {self._deployment.database}.{table} ({', '.join(columns)})", pa.table(arrays))

    def _insert(self, statement: str, table: Any) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        try:
            with self._open().send_insert(statement, "ArrowStream") as inserter:
                inserter.append(sink.getvalue().to_pybytes())
                inserter.finish()
        except RuntimeError as error:
            raise _translated(error) from None

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """DateTime as aware datetime in UTC; String as str, or as bytes where it is not UTF-8."""
        return self._statement(bind(sql, parameters))

    def _statement(self, sql: str) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                data = self._open().query(sql, "ArrowStream").bytes()
                # Arrow output has no DateTime: it comes as a plain uint32, and only the names of the types tell.
                types = self._open().query(f"DESCRIBE ({sql})", "TabSeparated").data() if data and _selects(sql) else ""
            except RuntimeError as error:
                raise _translated(error) from None
        if not data:
            return []
        columns = pa.ipc.open_stream(data).read_all().columns
        kinds = [line.split("\t")[1] for line in types.splitlines()] or [""] * len(columns)
        return list(zip(*(_values(column, kind) for column, kind in zip(columns, kinds, strict=True)), strict=True))

    def _open(self) -> Any:
        if self._session is None:
            raise SinkRefused("the warehouse has been closed")
        return self._session

    def close(self) -> None:
        with self._lock:
            if self._session is not None:
                self._session.close()
                self._session = None


def _text_array(texts: Any) -> Any:
    return pa.array(texts, pa.string() if isinstance(texts[0], str) else pa.binary())


def _selects(sql: str) -> bool:
    return sql.lstrip().split(None, 1)[0].upper() in ("SELECT", "WITH")


def _values(column: Any, kind: str) -> list[Any]:
    values = column.to_pylist()
    if "DateTime" in kind and pa.types.is_uint32(column.type):
        return [None if value is None else datetime.fromtimestamp(value, UTC) for value in values]
    return [_plain(value) for value in values] if not _is_number(column.type) else values


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return tuple(_plain(item) for item in value.values())
    return value


def _translated(error: RuntimeError) -> Exception:
    message = _short(error)
    code = _CODE.search(message)
    return sink_error(int(code[1]) if code else None, message)


def _short(error: RuntimeError) -> str:
    return str(error).split("Stack trace")[0].strip()
