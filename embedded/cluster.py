"""Three combined KRaft nodes (broker and controller) of Apache Kafka on free loopback ports, gone with their owner: what a lost broker does can be tried.

The fault tests and `make kafka-cluster` (`python -m embedded.cluster`) start it. Every topic of its own has three replicas, two of which must have what
is acknowledged.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from embedded.jars import EmbeddedKafkaError
from embedded.kafka import EmbeddedKafka, Place, free_ports

NODES = 3
HEAP = "384m"
START_ATTEMPTS = 3


class EmbeddedCluster:
    """A context manager; `nodes` by id (1 to 3), each with `kill` and `start`. `bootstrap` names all of them, living or not. Its data go with it.

    `more`: see `Place`.
    """

    def __init__(self, *, quiet: bool = False, more: Mapping[str, str] | None = None) -> None:
        self._more = more or {}
        self.folder = Path(tempfile.mkdtemp(prefix="shopstream-kafka-cluster-")).absolute()
        self.nodes: dict[int, EmbeddedKafka] = {}
        self._quiet = quiet

    def __enter__(self) -> EmbeddedCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def bootstrap(self) -> str:
        return ",".join(f"127.0.0.1:{node.place.port}" for node in self.nodes.values() if node.place is not None)

    def start(self) -> None:
        """Start all and wait until each serves. Raises EmbeddedKafkaError with the end of the log of one that does not."""
        for attempt in range(1, START_ATTEMPTS + 1):
            ports = free_ports(2 * NODES)
            quorum = {number: ports[NODES + number - 1] for number in range(1, NODES + 1)}
            places = [Place(number, ports[number - 1], quorum, self._more) for number in quorum]
            self.nodes = {
                place.number: EmbeddedKafka(
                    self.folder / f"node-{place.number}", quiet=self._quiet, place=place, heap=HEAP, remove=self.folder
                )
                for place in places
            }
            try:
                for place in places:
                    self.nodes[place.number].launch(place)
                for node in self.nodes.values():
                    node.wait()
                return
            except EmbeddedKafkaError as error:
                self._kill()
                if attempt == START_ATTEMPTS or "already in use" not in str(error):
                    raise

    def stop(self) -> None:
        """Kill all nodes and remove their data."""
        self._kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kill(self) -> None:
        for node in self.nodes.values():
            node.kill()


def main() -> None:
    """Run a cluster until Ctrl-C or SIGTERM."""
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    with EmbeddedCluster() as cluster:
        print(f"bootstrap servers: {cluster.bootstrap}", flush=True)  # noqa: T201 — its only output, for other programs
        over.wait()


if __name__ == "__main__":
    main()
