"""A whole pipeline on this machine for as long as a command runs: Kafka (embedded, or one that is there), worker processes, an embedded warehouse.

The parts are production's own: topics, worker, transport, tables, sinks. The warehouse folder belongs to one process, the command's; workers reach it
over an authenticated socket on loopback. `shopstream run` and `shopstream demo` start it; when the context ends, nothing of it is left.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from kafka import KafkaConsumer, TopicPartition

from embedded.kafka import EmbeddedKafka
from pipeline.cli.clients import Wrong, admin_arguments, aiokafka_arguments
from pipeline.cli.workers import RunFailed, Workers
from pipeline.definitions import Definitions
from pipeline.settings import Settings
from pipeline.sinks.catalog import install
from pipeline.sinks.open import open_warehouse
from pipeline.sinks.shared import new_key, serve
from pipeline.topic_names import Topics
from pipeline.topics import delete_topics, ensure_topics, wanted_topics

STALL_SECONDS = 120
METRICS_PORT = int(Settings.model_fields["metrics_port"].default)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a command needs."""

    warehouse: Path
    definitions: Definitions
    definitions_file: Path | None
    partitions: int
    workers: int
    settings: Settings | None = None
    """Of a Kafka that is there; None: the embedded one."""
    metrics_port: int | None = 0
    """Of the first worker, the others have the next ones; 0: none is served; None: the usual one where it is free, else any."""


@dataclass(frozen=True, slots=True)
class Local:
    """The running pipeline. `admin`, `client`: kafka-python's and aiokafka's arguments. `metrics`: ports on loopback, one a worker; none when not served."""

    topics: Topics
    partitions: int
    admin: dict[str, Any]
    client: dict[str, Any]
    warehouse: Any
    workers: Workers
    metrics: tuple[int, ...]

    @property
    def topic_of(self) -> dict[str, str]:
        return {"clickstream": self.topics.clickstream, "orders": self.topics.orders}


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """An empty folder for a warehouse. Raises Wrong rather than empty what no command of ours made."""
    if folder.is_file():
        raise Wrong(f"{folder} is a file: --warehouse names a folder.")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise Wrong(f"{folder} is not empty: a run writes a warehouse of its own. Name another folder, or say --overwrite.")
        if not (folder / "metadata").is_dir() and not (folder / "store").is_dir():
            raise Wrong(f"{folder} is not a warehouse: --overwrite only empties what a run made.")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def local_pipeline(wanted: Wanted) -> Iterator[Local]:
    """Start the parts, Kafka and the warehouse side by side; end them all whatever happens. Raises what the parts raise."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shopstream-local-")))
        with ThreadPoolExecutor(1) as aside:
            kafka = aside.submit(_kafka, wanted, stack)
            warehouse = open_warehouse(f"chdb://{wanted.warehouse.absolute()}")
            stack.callback(warehouse.close)
            warehouse.migrate()
            install(warehouse, wanted.definitions, int(time.time() * 1000))
            broker = kafka.result()
        admin = admin_arguments(wanted.settings) if wanted.settings else {"bootstrap_servers": [broker]}
        client = aiokafka_arguments(wanted.settings) if wanted.settings else {"bootstrap_servers": broker}
        topics = _topics(wanted, admin, stack)
        key = new_key()
        server = stack.enter_context(serve(warehouse, authkey=key.encode()))
        temporary = {"TMPDIR": str(folder)}  # what a killed worker leaves goes with the folder
        ports = _metrics_ports(wanted.metrics_port, wanted.workers)
        workers = Workers(ports, _worker_environment(wanted, broker, topics, server.url, key) | temporary, folder)
        stack.callback(workers.kill)
        yield Local(topics, wanted.partitions, admin, client, warehouse, workers, tuple(port for port in ports if port))


def _kafka(wanted: Wanted, stack: ExitStack) -> str:
    return wanted.settings.broker if wanted.settings else stack.enter_context(EmbeddedKafka()).bootstrap


def _topics(wanted: Wanted, admin: dict[str, Any], stack: ExitStack) -> Topics:
    """The pipeline's topics; on a Kafka that is there they have a name of their own and are deleted at the end."""
    if wanted.settings is None:
        topics = Topics()
        ensure_topics(admin, topics, wanted.partitions)
        return topics
    name = f"run-{uuid4().hex[:8]}"
    topics = Topics(f"{name}.clickstream", f"{name}.orders", name)
    stack.callback(delete_topics, admin, wanted_topics(topics))
    ensure_topics(admin, topics, wanted.partitions, wanted.settings.replication_factor, wanted.settings.min_insync_replicas)
    return topics


def _worker_environment(wanted: Wanted, broker: str, topics: Topics, warehouse: str, key: str) -> dict[str, str]:
    """For the embedded Kafka nothing of the user's settings counts; for another one its security settings do."""
    kept = {k: v for k, v in os.environ.items() if wanted.settings or not k.startswith("SHOPSTREAM_") or k == "SHOPSTREAM_CACHE"}
    kept.pop("SHOPSTREAM_DEFINITIONS", None)
    given = {
        "SHOPSTREAM_BROKER": broker,
        "SHOPSTREAM_WAREHOUSE": warehouse,
        "SHOPSTREAM_WAREHOUSE_KEY": key,
        "SHOPSTREAM_APP_ID": topics.app_id,
        "SHOPSTREAM_CLICKSTREAM_TOPIC": topics.clickstream,
        "SHOPSTREAM_ORDERS_TOPIC": topics.orders,
        "SHOPSTREAM_IDLE_SECONDS": "0",
        "SHOPSTREAM_METRICS_HOST": "127.0.0.1",
    }
    return kept | given | ({"SHOPSTREAM_DEFINITIONS": str(wanted.definitions_file.absolute())} if wanted.definitions_file else {})


def _metrics_ports(first: int | None, count: int) -> list[int]:
    """One a worker. Raises Wrong when one that was asked for is taken."""
    if first == 0:
        return [0] * count
    ports = range(first or METRICS_PORT, (first or METRICS_PORT) + count)
    with ExitStack() as held:
        try:
            for port in ports:
                _hold(port, held)
            return list(ports)
        except (OSError, OverflowError) as error:
            if first:
                raise Wrong(f"metrics can't be served at 127.0.0.1:{port} ({error}): name another --metrics-port, or 0 for none.") from None
    with ExitStack() as held:
        return [_hold(0, held) for _ in range(count)]


def _hold(port: int, held: ExitStack) -> int:
    """Take a port on loopback for a moment, any for 0. Raises OSError when another process has it."""
    probe = held.enter_context(socket.socket())
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", port))
    return int(probe.getsockname()[1])


class Backlog:
    """How far the warehouse's rows are behind the source topics' ends. A context manager: it holds a consumer."""

    def __init__(self, local: Local) -> None:
        self._local = local
        self._places = [TopicPartition(topic, p) for topic in local.topics.sources for p in range(local.partitions)]
        self._consumer = KafkaConsumer(**local.admin)
        self._moved, self._last = time.monotonic(), -1
        self.reached = self.end = 0

    def __enter__(self) -> Backlog:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def look(self) -> bool:
        """Whether every record, and what was re-keyed from them, is in the warehouse. Raises RunFailed when nothing has moved for long."""
        ends = self._consumer.end_offsets(self._places)
        rows = self._local.warehouse.query('SELECT topic, "partition", next_offset FROM current_progress')
        done = {TopicPartition(topic, int(partition)): int(offset) for topic, partition, offset in rows}
        self.end = sum(ends.values())
        self.reached = sum(min(done.get(place, 0), end) for place, end in ends.items())
        if all(done.get(place, 0) >= end for place, end in ends.items()) and ends == self._consumer.end_offsets(self._places):
            self._moved = time.monotonic()
            return True
        if self.reached != self._last:
            self._moved, self._last = time.monotonic(), self.reached
        if time.monotonic() - self._moved > STALL_SECONDS:
            raise RunFailed(f"nothing was applied for {STALL_SECONDS} s.\n{self._local.workers.tail()}")
        self._local.workers.look_after()
        return False
