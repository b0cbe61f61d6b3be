"""One embedded warehouse for several processes: `serve` in the process that holds it, `SharedWarehouse` in the workers.

Loopback only; both sides prove the same random key (HMAC) before anything is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

from pipeline.sinks.sql import OVERLOADED
from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable, Warehouse
from schemas.rows import Rows

KEY_VARIABLE = "SHOPSTREAM_WAREHOUSE_KEY"
TIMEOUT_SECONDS = 120.0
_METHODS = frozenset({"migrate", "insert", "query"})
_LOOPBACK = ("127.0.0.1", "localhost")


def new_key() -> str:
    """A fresh random key as text, for the variable SHOPSTREAM_WAREHOUSE_KEY of the worker processes."""
    return secrets.token_hex(32)


class SharedServer:
    """Serves `warehouse` until closed: a thread a client, one call at a time. `port` is the one it got when 0 was asked."""

    def __init__(self, warehouse: Warehouse, address: tuple[str, int], authkey: bytes) -> None:
        if address[0] not in _LOOPBACK:
            raise ValueError(f"a shared warehouse is served on 127.0.0.1 only, not on {address[0]}")
        self._warehouse = warehouse
        self._authkey = authkey
        self._lock = threading.Lock()
        self._connections: set[Any] = set()
        # The key is asked for in the client's own thread: a silent client must not hold up the others.
        self._listener = Listener((address[0], address[1]), "AF_INET", backlog=64)
        self.address: tuple[str, int] = (address[0], int(self._listener.address[1]))
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name="shared-warehouse", daemon=True).start()

    @property
    def url(self) -> str:
        return f"shared://{self.address[0]}:{self.address[1]}"

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection = self._listener.accept()
            except OSError:
                if self._closed.is_set():
                    return
                continue
            if self._closed.is_set():
                connection.close()
                return
            threading.Thread(target=self._serve, args=(connection,), name="shared-warehouse-client", daemon=True).start()

    def _serve(self, connection: Connection[Any, Any]) -> None:
        self._connections.add(connection)
        with contextlib.suppress(OSError, EOFError, AuthenticationError), connection:
            deliver_challenge(connection, self._authkey)
            answer_challenge(connection, self._authkey)
            while not self._closed.is_set():
                method, arguments = connection.recv()
                connection.send(self._answer(method, arguments))
        self._connections.discard(connection)

    def _answer(self, method: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
        if method not in _METHODS:
            return "refused", f"a shared warehouse has no method {method}"
        try:
            with self._lock:
                return "done", getattr(self._warehouse, method)(*arguments)
        except SinkUnavailable as error:
            return "unavailable", str(error)
        except SinkRefused as error:
            return "refused", str(error)
        except Exception as error:  # the client's worker must stop, not wait for an answer that never comes
            return "refused", f"{type(error).__name__}: {error}"

    def close(self) -> None:
        """Stop accepting and hang up; the warehouse itself stays open."""
        if self._closed.is_set():
            return
        self._closed.set()
        # close() alone does not wake a blocked accept().
        with contextlib.suppress(OSError), contextlib.closing(Client(self.address, "AF_INET")):
            pass
        self._listener.close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.close()

    def __enter__(self) -> SharedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(warehouse: Warehouse, address: tuple[str, int] = ("127.0.0.1", 0), authkey: bytes | None = None) -> SharedServer:
    """Serve `warehouse` on a loopback address (port 0: a free one); the key is the variable SHOPSTREAM_WAREHOUSE_KEY unless given."""
    return SharedServer(warehouse, address, authkey or environment_key())


def environment_key() -> bytes:
    """The key from the environment; SinkRefused when it is not set."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise SinkRefused(f"a shared warehouse needs its key in the environment variable {KEY_VARIABLE}")
    return key.encode()


class SharedWarehouse:
    """The Warehouse that `serve` holds in another process. Thread-safe; connects again after an error."""

    def __init__(self, address: tuple[str, int], authkey: bytes, timeout: float = TIMEOUT_SECONDS) -> None:
        self._address = address
        self._authkey = authkey
        self._timeout = timeout
        self._lock = threading.Lock()
        self._connection: Any = None

    def migrate(self, again: bool = False) -> list[str]:
        return list(self._call("migrate", again))

    def insert(self, rows: Rows) -> None:
        self._call("insert", rows)

    def query(self, sql: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        return list(self._call("query", sql, parameters))

    def close(self) -> None:
        with self._lock:
            self._hang_up()

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()

    def _call(self, method: str, *arguments: Any) -> Any:
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                self._connection.send((method, arguments))
                if not self._connection.poll(self._timeout):
                    raise TimeoutError(f"no answer within {self._timeout:.0f} s")
                status, result = self._connection.recv()
            except AuthenticationError:
                self._hang_up()
                raise SinkRefused(f"the shared warehouse at {self._where()} has another key") from None
            except (OSError, EOFError) as error:
                self._hang_up()
                raise SinkUnavailable(f"the shared warehouse at {self._where()} does not answer: {error}") from None
        if status == "unavailable":
            raise SinkUnavailable(result, OVERLOADED)
        if status == "refused":
            raise SinkRefused(result)
        return result

    def _connect(self) -> Any:
        connection = Client(self._address, "AF_INET")
        try:
            if not connection.poll(self._timeout):
                raise TimeoutError("no greeting")
            answer_challenge(connection, self._authkey)
            deliver_challenge(connection, self._authkey)
        except BaseException:
            connection.close()
            raise
        return connection

    def _where(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"
