"""The door to ClickHouse. Calls block; the streaming layer makes them in a thread of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from schemas.rows import Rows

NO_ANSWER = "no_answer"


class SinkUnavailable(Exception):
    """The warehouse did not take it now and may later: network, overload (TOO_MANY_PARTS, memory), read-only. Retried with back-off; nothing is lost.

    kind: one of `pipeline.sinks.sql.SINK_ERROR_KINDS`.
    """

    def __init__(self, message: str, kind: str = NO_ANSWER) -> None:
        super().__init__(message)
        self.kind = kind


class SinkRefused(Exception):
    """The warehouse will never take it: type mismatch, unknown table or column, wrong password. A bug or a wrong setting: the worker stops."""


class Warehouse(Protocol):
    """Insert may repeat rows: a row is an absolute value with a version, so a repetition changes nothing."""

    def migrate(self, again: bool = False) -> list[str]:
        """Apply the migrations that are missing (again: all, which makes dropped tables), in order; their names. Safe to call from several processes."""
        ...

    def insert(self, rows: Rows) -> None:
        """One insert a table that has rows, `progress` last. Returns when the warehouse has acknowledged all."""
        ...

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Rows of a SELECT; `%(name)s` placeholders are bound, never formatted from data."""
        ...

    def close(self) -> None: ...
