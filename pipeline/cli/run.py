"""`shopstream run`: files through an embedded Kafka and real worker processes into an embedded warehouse, bounded.

The parts are production's own: topics, worker, transport, tables, sinks. The warehouse folder belongs to one process, this one; workers reach it
over an authenticated socket on loopback.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from kafka import KafkaConsumer, TopicPartition
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from embedded.kafka import EmbeddedKafka
from pipeline.cli.show import show_summary
from pipeline.definitions import Definitions
from pipeline.files import Keyed, Mapping, read
from pipeline.mapping import load_mapping
from pipeline.partition import Topics
from pipeline.replay import replay
from pipeline.sinks.catalog import install
from pipeline.sinks.open import open_warehouse
from pipeline.sinks.shared import new_key, serve
from pipeline.topics import ensure_topics

RESTARTS = 5
STALL_SECONDS = 120
console = Console()
status = Console(stderr=True)


class RunFailed(Exception):
    """The run can't be completed; the message says why and shows the worker's last lines."""


@dataclass(frozen=True, slots=True)
class Job:
    """What `run` was asked for."""

    warehouse: Path
    clickstream: Path | None
    orders: Path | None
    definitions: Definitions
    definitions_file: Path | None
    map_file: Path | None
    partitions: int
    workers: int
    broker: str | None
    overwrite: bool


def run_job(job: Job) -> None:
    """Run it and print the summary. Raises RunFailed and what the parts raise."""
    mapping = load_mapping(job.map_file) if job.map_file else None
    _prepare_folder(job)
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shopstream-run-")))
        with status.status("starting Kafka and the warehouse"), ThreadPoolExecutor(1) as aside:
            kafka = aside.submit(_kafka, job, stack)
            warehouse = open_warehouse(f"chdb://{job.warehouse.absolute()}")
            stack.callback(warehouse.close)
            warehouse.migrate()
            install(warehouse, job.definitions, int(time.time() * 1000))
            broker = kafka.result()
        topics = Topics() if job.broker is None else _own_topics()
        ensure_topics({"bootstrap_servers": [broker]}, topics, job.partitions)
        key = new_key()
        server = stack.enter_context(serve(warehouse, authkey=key.encode()))
        workers = Workers(job, broker, topics, server.url, key, folder)
        stack.callback(workers.kill)
        with _progress() as progress:
            read_count = _replay(job, broker, topics, mapping, progress)
            _wait(broker, topics, job.partitions, warehouse, workers, progress)
        workers.stop()
        show_summary(console, warehouse, job.definitions, read_count, time.monotonic() - started)


def _kafka(job: Job, stack: ExitStack) -> str:
    return job.broker or stack.enter_context(EmbeddedKafka()).bootstrap


def _own_topics() -> Topics:
    name = f"run-{uuid4().hex[:8]}"
    return Topics(f"{name}.clickstream", f"{name}.orders", name)


def _prepare_folder(job: Job) -> None:
    if job.warehouse.exists() and any(job.warehouse.iterdir()):
        if not job.overwrite:
            raise RunFailed(f"{job.warehouse} is not empty: a run writes a warehouse of its own. Name another folder, or say --overwrite.")
        if not (job.warehouse / "metadata").is_dir() and not (job.warehouse / "store").is_dir():
            raise RunFailed(f"{job.warehouse} is not a warehouse: --overwrite only empties what a run made.")
        shutil.rmtree(job.warehouse)
    job.warehouse.mkdir(parents=True, exist_ok=True)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=status,
        transient=True,
    )


def _replay(job: Job, broker: str, topics: Topics, mapping: Mapping | None, progress: Progress) -> int:
    task = progress.add_task("replayed", total=None)
    sent = asyncio.run(
        replay(
            {"bootstrap_servers": broker},
            _records(job, mapping),
            {"clickstream": topics.clickstream, "orders": topics.orders},
            job.partitions,
            lambda n: progress.advance(task, n),
        )
    )
    progress.update(task, total=sent, completed=sent)
    return sent


def _records(job: Job, mapping: Mapping | None) -> Iterator[Keyed]:
    if job.clickstream:
        yield from read(job.clickstream, "clickstream", mapping)
    if job.orders:
        yield from read(job.orders, "orders", mapping)


Ends = dict[tuple[str, int], int]


def _ends(consumer: Any, topics: Topics, partitions: int) -> Ends:
    found = consumer.end_offsets([TopicPartition(topic, p) for topic in topics.sources for p in range(partitions)])
    return {(tp.topic, tp.partition): offset for tp, offset in found.items()}


def _wait(broker: str, topics: Topics, partitions: int, warehouse: Any, workers: Workers, progress: Progress) -> None:
    """Until every record of the source topics, and what was re-keyed from them, is in the warehouse's rows."""
    consumer = KafkaConsumer(bootstrap_servers=[broker])
    try:
        task = progress.add_task("applied", total=None)
        moved, last = time.monotonic(), -1
        while True:
            ends = _ends(consumer, topics, partitions)
            rows = warehouse.query('SELECT topic, "partition", argMax(next_offset, version) FROM progress GROUP BY topic, "partition"')
            done = {(topic, int(partition)): int(offset) for topic, partition, offset in rows}
            reached = sum(min(done.get(place, 0), end) for place, end in ends.items())
            progress.update(task, total=sum(ends.values()), completed=reached)
            if all(done.get(place, 0) >= end for place, end in ends.items()) and ends == _ends(consumer, topics, partitions):
                return
            if reached != last:
                moved, last = time.monotonic(), reached
            if time.monotonic() - moved > STALL_SECONDS:
                raise RunFailed(f"nothing was applied for {STALL_SECONDS} s.\n{workers.tail()}")
            workers.look_after()
            time.sleep(0.25)
    finally:
        consumer.close()


class Workers:
    """The worker processes of a run; one that dies is started again (a restart is exact), a few times."""

    def __init__(self, job: Job, broker: str, topics: Topics, warehouse: str, key: str, folder: Path) -> None:
        self._log = folder / "workers.log"
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("SHOPSTREAM_") or k == "SHOPSTREAM_CACHE"} | {
            "SHOPSTREAM_BROKER": broker,
            "SHOPSTREAM_WAREHOUSE": warehouse,
            "SHOPSTREAM_WAREHOUSE_KEY": key,
            "SHOPSTREAM_APP_ID": topics.app_id,
            "SHOPSTREAM_CLICKSTREAM_TOPIC": topics.clickstream,
            "SHOPSTREAM_ORDERS_TOPIC": topics.orders,
            "SHOPSTREAM_IDLE_SECONDS": "0",
        }
        if job.definitions_file:
            self._environment["SHOPSTREAM_DEFINITIONS"] = str(job.definitions_file.absolute())
        self._restarts = 0
        self._processes = [self._start() for _ in range(job.workers)]

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "pipeline.cli.main", "worker"]
            return subprocess.Popen(command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def look_after(self) -> None:
        for i, process in enumerate(self._processes):
            if process.poll() is not None:
                self._restarts += 1
                if self._restarts > RESTARTS:
                    raise RunFailed(f"workers ended {self._restarts} times, the last with code {process.returncode}.\n{self.tail()}")
                self._processes[i] = self._start()

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            if process.wait(90):
                raise RunFailed(f"a worker ended with code {process.returncode}.\n{self.tail()}")

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
