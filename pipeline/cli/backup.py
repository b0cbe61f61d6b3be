"""`shopstream backup` and `shopstream restore`: definitions, state, warehouse and positions into a folder, and back, checked on both ways.

The workers must be stopped: then the state in the changelog is at one position, and the warehouse holds nothing that is newer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pipeline.cli.clients import Failed, Wrong, admin_arguments, aiokafka_arguments, open_configured, revision_in_force, topic_names
from pipeline.settings import Settings, load_settings

if TYPE_CHECKING:
    from pipeline.backup import Manifest, Records
    from pipeline.sinks.warehouse import Warehouse
    from pipeline.topic_names import Topics

status = Console(stderr=True)
T = TypeVar("T")

BrokerOption = Annotated[str | None, typer.Option(help="Bootstrap servers; SHOPSTREAM_BROKER.", show_default=False)]
WarehouseOption = Annotated[str | None, typer.Option(help="Warehouse URL; SHOPSTREAM_WAREHOUSE.", show_default=False)]


def backup(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.", show_default=False)],
    broker: BrokerOption = None,
    warehouse: WarehouseOption = None,
    definitions: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="SHOPSTREAM_DEFINITIONS.")] = None,
) -> None:
    """Save definitions, state, warehouse and positions to a folder. Stop the workers first.

    The events themselves stay in Kafka: what arrives after the backup is read again after a restore, as long as the topics keep it.

    Example: shopstream backup /backups/2026-03-01 --broker kafka:9092 --warehouse clickhouse://worker@clickhouse:9000/shopstream
    """
    from pipeline.backup import DEFINITIONS, FORMAT, MANIFEST, Archive, Manifest
    from pipeline.definitions_file import DEFAULT_FILE, load
    from pipeline.definitions_version import at_revision
    from pipeline.sinks import catalog, copy, revisions
    from pipeline.streaming.state import grown, read_state
    from pipeline.topics import describe
    from schemas.rows import COLUMNS

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Wrong(f"{folder} is there and not an empty folder: name a new one. A backup overwrites nothing.")
    started = time.monotonic()
    settings = load_settings(broker=broker, warehouse=warehouse, definitions=definitions)
    read, names, client = load(settings.definitions), topic_names(settings), aiokafka_arguments(settings)
    _no_workers(settings, names)
    opened = open_configured(settings)
    one = revisions.find(opened, revision_in_force(opened))
    wanted, topics = at_revision(read, one.revision), names.at(one.revision)
    _no_workers(settings, topics)
    partitions = describe(admin_arguments(settings), topics)[topics.changelog]
    if not partitions:
        raise Failed(f"there is no topic {topics.changelog} at {settings.broker}: check SHOPSTREAM_BROKER and SHOPSTREAM_APP_ID")
    counts = copy.count_rows(opened)
    archive, positions, ends = Archive(folder), [], []
    archive.definitions((settings.definitions or DEFAULT_FILE).read_bytes())
    archive.catalog(catalog.read(opened))
    with _progress() as progress:
        task = progress.add_task("state", total=partitions)
        for number in range(partitions):
            records, end = _kafka(read_state(client, topics, number))
            positions.append(_positions(number, partitions, records, wanted, topics))
            ends.append(end)
            archive.state(number, records)
            progress.advance(task)
        task = progress.add_task("warehouse", total=sum(counts[table] for table in COLUMNS))
        for table in COLUMNS:
            for number, columns in enumerate(copy.chunks(opened, table, counts[table])):
                archive.rows(table, columns, number)
                progress.advance(task, archive.files[-1].rows)
    reports = copy.digest(opened)
    opened.close()
    _no_workers(settings, topics)
    if moved := _kafka(grown(client, topics, ends)):
        raise Failed(
            f"a worker wrote to partition {moved[0]} meanwhile: stop all workers and take another backup. {folder} has no {MANIFEST}."
        )
    archive.finish(Manifest(FORMAT, names.app_id, names.clickstream, names.orders, partitions, positions, reports, archive.files, one))
    size = sum(stored.size for stored in archive.files)
    typer.echo(
        f"saved {partitions} partitions, {sum(counts[t] for t in COLUMNS):,} rows and {DEFINITIONS} to {folder}: {size / 1e6:,.1f} MB, "
        f"{time.monotonic() - started:.1f} s. Start the workers again."
    )


def restore(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="What `shopstream backup` made.", show_default=False)],
    broker: BrokerOption = None,
    warehouse: WarehouseOption = None,
) -> None:
    """Fill an empty warehouse and an empty changelog from a backup; the same app id and topics. Then start the workers: they go on exactly.

    Every file is checked before anything is written, every report and every partition's state afterwards.

    Example: shopstream restore /backups/2026-03-01 --broker kafka:9092 --warehouse clickhouse://worker@clickhouse:9000/shopstream
    """
    from pipeline.backup import DEFINITIONS, MANIFEST, read_manifest, verify
    from pipeline.topics import ensure_topics

    if not (folder / MANIFEST).is_file():
        raise Wrong(f"{folder} is no finished backup: it has no {MANIFEST}. Name one that `shopstream backup` has finished.")
    started = time.monotonic()
    settings = load_settings(broker=broker, warehouse=warehouse)
    manifest, names, client = read_manifest(folder), topic_names(settings), aiokafka_arguments(settings)
    _same_names(manifest, names)
    topics = names.at(manifest.revision[0])
    with _progress() as progress:
        task = progress.add_task("verified", total=len(manifest.files))
        for _ in verify(folder, manifest):
            progress.advance(task)
        _no_workers(settings, topics)
        _sources_hold(settings, manifest, topics)
        opened = open_configured(settings)
        opened.migrate()
        _empty_warehouse(opened, settings)
        ensure_topics(admin_arguments(settings), topics, manifest.partitions, settings.replication_factor, settings.min_insync_replicas)
        _empty_changelog(client, manifest, topics)
        _fill_warehouse(opened, folder, manifest, progress)
        opened.close()
        _fill_changelog(client, folder, manifest, topics, progress)
    rows = sum(stored.rows for stored in manifest.files if stored.table)
    typer.echo(
        f"restored {manifest.partitions} partitions and {rows:,} rows in {time.monotonic() - started:.1f} s; every report and every state is as saved. "
        f"Start the workers with SHOPSTREAM_DEFINITIONS={folder / DEFINITIONS}."
    )


def _fill_warehouse(warehouse: Warehouse, folder: Path, manifest: Manifest, progress: Progress) -> None:
    from pipeline.backup import read_catalog, read_rows
    from pipeline.sinks import catalog, copy, revisions
    from pipeline.streaming.faults import reach

    # `progress` first: it is by its rows that a worker without changelog knows that it must not begin anew here, should this be interrupted.
    stored = sorted((file for file in manifest.files if file.table), key=lambda file: file.table != "progress")
    task = progress.add_task("warehouse", total=sum(file.rows for file in stored))
    catalog.write(warehouse, read_catalog(folder))
    if manifest.revision[0]:
        revisions.write(warehouse, revisions.Revision(*manifest.revision))
    for file in stored:
        reach("before_insert")
        warehouse.insert({file.table: read_rows(folder, file)})
        progress.advance(task, file.rows)
    found = copy.digest(warehouse)
    for name, wanted in manifest.reports.items():
        if found[name] != wanted:
            raise Failed(
                f"{name} has {found[name].rows:,} rows that are not the {wanted.rows:,} of the backup: does something else write to this warehouse, or "
                "does a retention delete old rows (retain_days)? The state was not written. Drop the database and restore again."
            )


def _fill_changelog(client: dict[str, Any], folder: Path, manifest: Manifest, topics: Topics, progress: Progress) -> None:
    from pipeline.backup import read_state
    from pipeline.streaming import state

    task = progress.add_task("state", total=manifest.partitions)
    for file in manifest.files:
        if file.partition >= 0:
            records = read_state(folder, file)
            if records:
                _kafka(state.write_state(client, topics, file.partition, records))
            if _kafka(state.read_state(client, topics, file.partition))[0] != records:
                raise Failed(
                    f"{topics.changelog}[{file.partition}] does not hold what was written: does something else write to it? Delete the topic, drop the "
                    "database and restore again."
                )
            progress.advance(task)


def _positions(number: int, partitions: int, records: Records, definitions: Any, topics: Topics) -> dict[str, int]:
    """The state read as a worker would: a backup that can't be restored is found now."""
    from pipeline.partition import Partition

    partition = Partition(number, partitions, definitions, topics)
    partition.restore(records)
    return partition.positions


def _no_workers(settings: Settings, topics: Topics) -> None:
    from pipeline.topics import connect, members

    admin = connect(admin_arguments(settings))
    try:
        n = members(admin, topics.app_id)
    finally:
        admin.close()
    if n:
        raise Failed(
            f"group {topics.app_id} has {n} worker{'s' if n > 1 else ''}: stop them with SIGTERM first. One that was killed leaves the "
            f"group after {settings.session_seconds:g} s."
        )


def _same_names(manifest: Manifest, topics: Topics) -> None:
    for setting, saved, now in (
        ("APP_ID", manifest.app_id, topics.app_id),
        ("CLICKSTREAM_TOPIC", manifest.clickstream, topics.clickstream),
        ("ORDERS_TOPIC", manifest.orders, topics.orders),
    ):
        if saved != now:
            raise Wrong(f"the backup is of SHOPSTREAM_{setting}={saved}, the setting is {now}: positions count in topics of the same name")


def _sources_hold(settings: Settings, manifest: Manifest, topics: Topics) -> None:
    from pipeline.streaming.state import end_offsets
    from pipeline.topics import describe

    there = {name: count for name, count in describe(admin_arguments(settings), topics).items() if count}
    if wrong := {name: count for name, count in there.items() if count != manifest.partitions}:
        name, count = next(iter(wrong.items()))
        raise Failed(
            f"{name} has {count} partitions, the backup {manifest.partitions}: state belongs to a partition number. Use the Kafka it was made with."
        )
    ends = _kafka(end_offsets(aiokafka_arguments(settings), [(t, p) for t in topics.sources if t in there for p in range(there[t])]))
    for number, positions in enumerate(manifest.positions):
        for topic, position in positions.items():
            if position > (end := ends.get((topic, number), 0)):
                raise Failed(
                    f"the backup has read {topic}[{number}] up to offset {position}, but it ends at {end}: it is not the topic the backup was made from. "
                    "A backup holds no events: bring the topic back first. Nothing was written."
                )


def _empty_warehouse(warehouse: Warehouse, settings: Settings) -> None:
    from pipeline.sinks.copy import count_rows

    if full := {table: count for table, count in count_rows(warehouse).items() if count}:
        table, count = next(iter(full.items()))
        raise Failed(
            f"the warehouse {settings.warehouse} is not empty ({table} has {count:,} rows): name another database, or drop this one. Nothing was restored."
        )


def _empty_changelog(client: dict[str, Any], manifest: Manifest, topics: Topics) -> None:
    from pipeline.streaming.state import read_state

    for number in range(manifest.partitions):
        if _kafka(read_state(client, topics, number))[0]:
            raise Failed(
                f"{topics.changelog}[{number}] holds a state: delete that topic, if the backup is to replace it. Nothing was restored."
            )


def _kafka(work: Coroutine[Any, Any, T]) -> T:
    from pipeline.streaming.state import KAFKA_TROUBLE

    try:
        return asyncio.run(work)
    except KAFKA_TROUBLE as error:
        raise Failed(
            f"Kafka refused or did not answer: {error!r}. Check the broker and the rights of the user, then do it again."
        ) from None


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=status,
        transient=True,
    )
