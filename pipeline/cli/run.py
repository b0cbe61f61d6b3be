"""`shopstream run`: files through an embedded Kafka and real worker processes into an embedded warehouse, bounded (`pipeline.cli.local`)."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.cli.local import Backlog, Local, Wanted, local_pipeline, prepare_folder
from pipeline.cli.show import show_summary
from pipeline.definitions import Definitions
from pipeline.event_times import time_of
from pipeline.files import Keyed, Mapping, file_format, read
from pipeline.mapping import load_mapping
from pipeline.replay import replay
from pipeline.settings import Settings

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
    sort: bool = False
    """Send in order of event time instead of the files' own."""


def run_job(job: Job) -> None:
    """Run it and print the summary. Raises Wrong, RunFailed and what the parts raise."""
    for path in filter(None, (job.clickstream, job.orders)):
        file_format(path)
    mapping = load_mapping(job.map_file) if job.map_file else None
    prepare_folder(job.warehouse, job.overwrite)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything started here is ended
    started = time.monotonic()
    wanted = Wanted(job.warehouse, job.definitions, job.definitions_file, job.partitions, job.workers, job.settings)
    with ExitStack() as stack:
        with status.status("starting Kafka and the warehouse"):
            local = stack.enter_context(local_pipeline(wanted))
        with _progress() as progress:
            read_count = _replay(job, local, mapping, progress)
            _wait(local, progress)
        local.workers.stop()
        show_summary(console, local.warehouse, job.definitions, read_count, time.monotonic() - started)


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


def _replay(job: Job, local: Local, mapping: Mapping | None, progress: Progress) -> int:
    task = progress.add_task("replayed", total=None)
    records = _records(job, mapping)
    if job.sort:
        records = iter(sorted(records, key=lambda record: time_of(record.value) or 0))
    sent = asyncio.run(replay(local.client, records, local.topic_of, local.partitions, lambda n, _: progress.advance(task, n)))
    progress.update(task, total=sent, completed=sent)
    return sent


def _records(job: Job, mapping: Mapping | None) -> Iterator[Keyed]:
    if job.clickstream:
        yield from read(job.clickstream, "clickstream", mapping)
    if job.orders:
        yield from read(job.orders, "orders", mapping)


def _wait(local: Local, progress: Progress) -> None:
    """Until every record of the source topics, and what was re-keyed from them, is in the warehouse's rows."""
    task = progress.add_task("applied", total=None)
    with Backlog(local) as backlog:
        while not backlog.look():
            progress.update(task, total=backlog.end, completed=backlog.reached)
            time.sleep(0.25)
        progress.update(task, total=backlog.end, completed=backlog.reached)
