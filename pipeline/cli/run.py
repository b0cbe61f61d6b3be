"""`shopstream run`: files through an embedded Kafka and real worker processes into an embedded warehouse, bounded.

The parts are production's own: topics, worker, transport, tables, sinks. The warehouse folder belongs to one process, this one; workers reach it
over an authenticated socket on loopback.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
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
from pipeline.cli.clients import Wrong, admin_arguments, aiokafka_arguments
from pipeline.cli.show import show_summary
from pipeline.cli.workers import RunFailed, Workers
from pipeline.definitions import Definitions
from pipeline.files import Keyed, Mapping, file_format, read
from pipeline.mapping import load_mapping
from pipeline.partition import Topics
from pipeline.replay import replay
from pipeline.settings import Settings
from pipeline.sinks.catalog import install
from pipeline.sinks.open import open_warehouse
from pipeline.sinks.shared import new_key, serve
from pipeline.topics import delete_topics, ensure_topics

STALL_SECONDS = 120
console = Console()
status = Console(stderr=True)


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
    settings: Settings | None
    """Of a Kafka that is there; None: the embedded one."""
    overwrite: bool


def run_job(job: Job) -> None:
    """Run it and print the summary. Raises Wrong, RunFailed and what the parts raise."""
    for path in filter(None, (job.clickstream, job.orders)):
        file_format(path)
    mapping = load_mapping(job.map_file) if job.map_file else None
    _prepare_folder(job)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything started here is ended
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
        topics = _topics(job, broker, stack)
        key = new_key()
        server = stack.enter_context(serve(warehouse, authkey=key.encode()))
        workers = Workers(job.workers, _worker_environment(job, broker, topics, server.url, key), folder)
        stack.callback(workers.kill)
        with _progress() as progress:
            read_count = _replay(job, broker, topics, mapping, progress)
            _wait(_admin(job, broker), topics, job.partitions, warehouse, workers, progress)
        workers.stop()
        show_summary(console, warehouse, job.definitions, read_count, time.monotonic() - started)


def _kafka(job: Job, stack: ExitStack) -> str:
    return job.settings.broker if job.settings else stack.enter_context(EmbeddedKafka()).bootstrap


def _admin(job: Job, broker: str) -> dict[str, Any]:
    return admin_arguments(job.settings) if job.settings else {"bootstrap_servers": [broker]}


def _topics(job: Job, broker: str, stack: ExitStack) -> Topics:
    """The run's topics; on a Kafka that is there they have a name of their own and are deleted at the end."""
    if job.settings is None:
        topics = Topics()
        ensure_topics(_admin(job, broker), topics, job.partitions)
        return topics
    topics = _own_topics()
    stack.callback(delete_topics, _admin(job, broker), topics)
    ensure_topics(_admin(job, broker), topics, job.partitions, job.settings.replication_factor, job.settings.min_insync_replicas)
    return topics


def _worker_environment(job: Job, broker: str, topics: Topics, warehouse: str, key: str) -> dict[str, str]:
    """For the embedded Kafka nothing of the user's settings counts; for another one its security settings do."""
    kept = {k: v for k, v in os.environ.items() if job.settings or not k.startswith("SHOPSTREAM_") or k == "SHOPSTREAM_CACHE"}
    kept.pop("SHOPSTREAM_DEFINITIONS", None)
    given = {
        "SHOPSTREAM_BROKER": broker,
        "SHOPSTREAM_WAREHOUSE": warehouse,
        "SHOPSTREAM_WAREHOUSE_KEY": key,
        "SHOPSTREAM_APP_ID": topics.app_id,
        "SHOPSTREAM_CLICKSTREAM_TOPIC": topics.clickstream,
        "SHOPSTREAM_ORDERS_TOPIC": topics.orders,
        "SHOPSTREAM_IDLE_SECONDS": "0",
        "SHOPSTREAM_METRICS_PORT": "0",
    }
    return kept | given | ({"SHOPSTREAM_DEFINITIONS": str(job.definitions_file.absolute())} if job.definitions_file else {})


def _own_topics() -> Topics:
    name = f"run-{uuid4().hex[:8]}"
    return Topics(f"{name}.clickstream", f"{name}.orders", name)


def _prepare_folder(job: Job) -> None:
    if job.warehouse.is_file():
        raise Wrong(f"{job.warehouse} is a file: --warehouse names a folder.")
    if job.warehouse.exists() and any(job.warehouse.iterdir()):
        if not job.overwrite:
            raise Wrong(f"{job.warehouse} is not empty: a run writes a warehouse of its own. Name another folder, or say --overwrite.")
        if not (job.warehouse / "metadata").is_dir() and not (job.warehouse / "store").is_dir():
            raise Wrong(f"{job.warehouse} is not a warehouse: --overwrite only empties what a run made.")
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
            aiokafka_arguments(job.settings) if job.settings else {"bootstrap_servers": broker},
            _records(job, mapping),
            {"clickstream": topics.clickstream, "orders": topics.orders},
            job.partitions,
            lambda records, _: progress.advance(task, records),
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


def _wait(client: dict[str, Any], topics: Topics, partitions: int, warehouse: Any, workers: Workers, progress: Progress) -> None:
    """Until every record of the source topics, and what was re-keyed from them, is in the warehouse's rows."""
    consumer = KafkaConsumer(**client)
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
