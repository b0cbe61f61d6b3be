"""Debian's ClickHouse server (18.16) on loopback for tests: own configuration, users, ports and temporary folder.

`with ClickHouseServer() as server:` gives URLs for `pipeline.sinks.open`; the process ends with the test process, even when that is SIGKILLed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import pytest

MISSING = (
    "clickhouse-server is not installed, so the tests against a ClickHouse server are skipped (Debian: apt-get install clickhouse-server)"
)
READY_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1

_CONFIG = """<?xml version="1.0"?>
<yandex>
    <logger><level>warning</level><log>{folder}/server.log</log><errorlog>{folder}/error.log</errorlog></logger>
    <listen_host>127.0.0.1</listen_host>
    <tcp_port>{port}</tcp_port>
    <path>{folder}/data/</path>
    <tmp_path>{folder}/tmp/</tmp_path>
    <user_files_path>{folder}/user_files/</user_files_path>
    <format_schema_path>{folder}/format_schemas/</format_schema_path>
    <users_config>{folder}/users.xml</users_config>
    <default_profile>default</default_profile>
    <default_database>default</default_database>
    <mark_cache_size>67108864</mark_cache_size>
    <max_concurrent_queries>100</max_concurrent_queries>
    <timezone>{time_zone}</timezone>
    <mlock_executable>false</mlock_executable>
    {extra}
</yandex>
"""

# 18.16 knows no roles or grants: a user is limited to databases, networks and the readonly setting.
_USERS = """<?xml version="1.0"?>
<yandex>
    <profiles>
        <default>{profile}</default>
        <reader><readonly>2</readonly></reader>
    </profiles>
    <quotas><default></default></quotas>
    <users>
        <default>{secret}<networks><ip>127.0.0.1</ip></networks><profile>default</profile><quota>default</quota></default>
        <worker>{secret}<networks><ip>127.0.0.1</ip></networks><profile>default</profile><quota>default</quota>
            <allow_databases>{databases}</allow_databases></worker>
        <reader>{secret}<networks><ip>127.0.0.1</ip></networks><profile>reader</profile><quota>default</quota>
            <allow_databases>{databases}</allow_databases></reader>
    </users>
</yandex>
"""


def _binary() -> str | None:
    return shutil.which("clickhouse-server", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/usr/local/bin")


def available() -> bool:
    return _binary() is not None


def require() -> None:
    """Skip the calling test when there is no server; in CI (variable CI set) fail instead, so that a skip never hides there."""
    if available():
        return
    if os.environ.get("CI"):
        pytest.fail(MISSING + "; in CI it must be there")
    pytest.skip(MISSING)


def _die_with(parent: int) -> Callable[[], None]:
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return before_exec


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ClickHouseServer:
    """A server that can be stopped and started again on the same port and data.

    `databases`: the ones its limited user `worker` may use (18.16 lets nobody create others with that user). Start it in the main thread:
    the kernel ends it with the thread that started it. `extra`: XML for the configuration. `within`: where its own folder is made, the
    system's temporary folder by default.
    """

    def __init__(
        self, databases: tuple[str, ...] = ("shopstream",), time_zone: str = "UTC", extra: str = "", within: Path | None = None
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="shopstream-clickhouse-", dir=within))
        self.password = secrets.token_urlsafe(16)
        self.port = free_port()
        for name in ("data", "tmp", "user_files", "format_schemas"):
            (self.folder / name).mkdir()
        self._databases = "".join(f"<database>{name}</database>" for name in databases)
        (self.folder / "config.xml").write_text(_CONFIG.format(folder=self.folder, port=self.port, time_zone=time_zone, extra=extra))
        self._profiles = 0
        self.set_profile()
        self._process: subprocess.Popen[bytes] | None = None

    def set_profile(self, settings: str = "<max_memory_usage>2000000000</max_memory_usage>") -> None:
        """What holds for its users, as XML; a running server reads it within two seconds."""
        secret = f"<password_sha256_hex>{hashlib.sha256(self.password.encode()).hexdigest()}</password_sha256_hex>"
        new = self.folder / "users.new.xml"
        new.write_text(_USERS.format(profile=settings, secret=secret, databases=self._databases))
        self._profiles += 1
        moment = time.time() + 2 * self._profiles  # the server tells files apart by whole seconds
        os.utime(new, (moment, moment))
        new.rename(self.folder / "users.xml")

    def url(self, database: str = "shopstream", user: str = "worker") -> str:
        return f"clickhouse://{user}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        binary = _binary()
        if binary is None:
            raise RuntimeError(MISSING)
        with (self.folder / "console.log").open("ab") as log:
            # The server refuses data owned by another user; the folder is this process's own, whoever that is.
            self._process = subprocess.Popen(
                [binary, f"--config-file={self.folder}/config.xml"],
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with(os.getpid()),
            )  # fmt: skip
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if self._answers():
                return
            time.sleep(0.05)
        raise RuntimeError(f"clickhouse-server did not become ready:\n{self.logs()}")

    def _answers(self) -> bool:
        from clickhouse_driver import Client
        from clickhouse_driver.errors import Error

        client = Client("127.0.0.1", self.port, user="default", password=self.password, connect_timeout=1, send_receive_timeout=2)
        try:
            return bool(client.execute("SELECT 1") == [(1,)])
        except (Error, OSError, EOFError):
            return False
        finally:
            client.disconnect()

    def logs(self) -> str:
        return "\n".join(
            (self.folder / name).read_text(errors="replace")[-4000:]
            for name in ("console.log", "error.log")
            if (self.folder / name).exists()
        )

    def check_alive(self) -> None:
        """Fails with its log when the server has ended by itself."""
        code = self._process.poll() if self._process is not None else None
        assert code is None, f"clickhouse-server has ended by itself with {code}\n{self.logs()}"

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def kill(self) -> None:
        """SIGKILL: what a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> ClickHouseServer:
        try:
            self.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.check_alive()
        finally:
            self._remove()

    def _remove(self) -> None:
        self.kill()  # an orderly end takes ten seconds
        shutil.rmtree(self.folder, ignore_errors=True)
