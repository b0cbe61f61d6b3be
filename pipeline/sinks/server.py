"""The warehouse on a ClickHouse server over its native protocol. The only module that imports clickhouse_driver."""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from clickhouse_driver import Client
from clickhouse_driver.errors import Error, NetworkError, ServerException, SocketTimeoutError, UnexpectedPacketFromServerError

from pipeline.sinks.migrations import Deployment, migrate
from pipeline.sinks.sql import bind, prepared, sink_error
from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable
from schemas.rows import Rows

T = TypeVar("T")
_UNKNOWN_DATABASE = 81

# It logs a traceback for every refused connection; SinkUnavailable says so once, and the caller backs off.
logging.getLogger("clickhouse_driver.connection").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server is and how to talk to it. Times in seconds; a socket that stays silent longer is given up."""

    host: str
    port: int = 9000
    user: str = "default"
    password: str = field(default="", repr=False)
    secure: bool = False
    verify: bool = True
    ca_certs: str | None = None
    compression: bool = False
    connect_timeout: float = 5.0
    timeout: float = 60.0


QUERY_SETTINGS = {"enable_optimize_predicate_expression": 1}
"""A filter on a report goes down into its view, as it does by default from 19.1 on. Without it 18.16 aggregates every cell there is for each
question: of 3.3 million KPI cells, 14 s until its memory of 2 GB is full, instead of 0.1 s."""


class ServerWarehouse:
    """A Warehouse on a ClickHouse server: one connection, one statement at a time, opened by the first call and again after any error."""

    def __init__(self, endpoint: Endpoint, deployment: Deployment | None = None, settings: Mapping[str, Any] | None = None) -> None:
        self._endpoint = endpoint
        self._deployment = deployment or Deployment()
        self._settings = dict(settings or {})
        self._lock = threading.RLock()
        self._client: Any = None

    def migrate(self, again: bool = False) -> list[str]:
        # Before the first migration the database that other calls connect to may not exist.
        with self._lock:
            client = self._connect(database="")
            try:
                return migrate(lambda sql: self._guarded(lambda: client.execute(sql)), self._deployment, again)
            finally:
                client.disconnect()

    def insert(self, rows: Rows) -> None:
        for table, _, columns in prepared(rows):
            statement = f"INSERT INTO {self._deployment.database}.{table} ({', '.join(columns)}) VALUES"
            data = [column.tolist() if isinstance(column, np.ndarray) else column for column in columns.values()]
            self._call(lambda client, statement=statement, data=data: client.execute(statement, data, columnar=True))  # type: ignore[misc]

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """DateTime('UTC') as aware datetime; String as str, or as bytes where it is not UTF-8."""
        statement = bind(sql, parameters)
        result = self._call(lambda client: client.execute(statement, settings=QUERY_SETTINGS))
        return result if isinstance(result, list) else []

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
            if client is not None:
                client.disconnect()

    def _connect(self, database: str) -> Any:
        e = self._endpoint
        return Client(
            e.host, e.port, database, e.user, e.password, client_name="shopstream", connect_timeout=e.connect_timeout,
            send_receive_timeout=e.timeout, sync_request_timeout=e.connect_timeout, secure=e.secure, verify=e.verify,
            ca_certs=e.ca_certs, compression=e.compression, settings=self._settings,
        )  # fmt: skip

    def _call(self, action: Callable[[Any], T]) -> T:
        with self._lock:
            if self._client is None:
                self._client = self._connect(self._deployment.database)
            client = self._client
            try:
                return self._guarded(lambda: action(client))
            except (SinkUnavailable, SinkRefused):
                # Half a conversation may be left in the socket; the next call begins a new one.
                self.close()
                raise

    def _guarded(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except ServerException as error:
            remedy = " (run the migrations first)" if error.code == _UNKNOWN_DATABASE else ""
            raise sink_error(error.code, f"ClickHouse at {self._where()}{remedy}: Code: {error.code}. {error.message}") from None
        except (NetworkError, SocketTimeoutError, UnexpectedPacketFromServerError, EOFError, OSError) as error:
            raise SinkUnavailable(f"ClickHouse at {self._where()} does not answer: {error}") from None
        except (Error, UnicodeError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
            raise SinkRefused(f"ClickHouse at {self._where()}: {error}") from None

    def _where(self) -> str:
        return f"{self._endpoint.host}:{self._endpoint.port}"
