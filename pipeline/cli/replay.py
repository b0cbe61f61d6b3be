"""`shopstream replay`: a file to the Kafka topics, paced or flat out, exactly once however often it is interrupted (`pipeline.resumable`)."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pipeline.cli.clients import Wrong, admin_arguments, aiokafka_arguments, topic_names
from pipeline.settings import Settings, load_settings

PLAIN_SECONDS = 5.0
console = Console(stderr=True)


class Topic(StrEnum):
    """Kinds of source topics."""

    CLICKSTREAM = "clickstream"
    ORDERS = "orders"


@dataclass(slots=True)
class Report:
    """What the progress line tells: a bar on a terminal, else a plain line now and then."""

    share: Any
    """() -> how much of the file has been read, 0 to 1."""
    bar: Progress | None
    sent: int = 0
    _started: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)

    def add(self, records: int) -> None:
        self.sent += records
        now = time.monotonic()
        rate = self.sent / max(now - self._started, 1e-3)
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=self.share(), rate=f"{self.sent:,} records · {rate:,.0f}/s")
        elif now - self._said >= PLAIN_SECONDS:
            self._said = now
            left = (now - self._started) * (1 - self.share()) / max(self.share(), 1e-6)
            console.print(
                f"{self.sent:,} records · {self.share():.0%} of the file · {rate:,.0f}/s · about {left:,.0f} s left", highlight=False
            )


def replay(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="NDJSON, CSV or Parquet, also gzipped.")],
    topic: Annotated[Topic | None, typer.Option(help="What the file holds; with --map the map says it.")] = None,
    speed: Annotated[
        float | None, typer.Option(min=0.001, help="By event time, so many times as fast as it happened; not given: flat out.")
    ] = None,
    shift_to_now: Annotated[
        bool, typer.Option("--shift-to-now", help="Move all event times by one amount, so that the newest event happens when it is sent.")
    ] = False,
    map_: Annotated[
        Path | None, typer.Option("--map", exists=True, dir_okay=False, help="Renames foreign columns and events, see deploy/maps/.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="From the beginning, though (part of) this file has been sent.")] = False,
    broker: Annotated[str | None, typer.Option(help="Bootstrap servers; SHOPSTREAM_BROKER.")] = None,
) -> None:
    """Send a file's events to Kafka, each exactly once.

    Interrupted by Ctrl-C, a kill or a lost broker, the same command goes on where it stopped.
    A file that was sent is not sent again unless you say --again; with changed content it is another file.

    A recorded day in an hour, as if it happened now.
    Example: shopstream replay day.ndjson.gz --topic clickstream --speed 24 --shift-to-now
    """
    from pipeline.files import file_format
    from pipeline.mapping import load_mapping

    if topic is None and map_ is None:
        raise Wrong(f"what does {file} hold? Say --topic clickstream or --topic orders (or --map, whose file says it)")
    if topic is not None and map_ is not None:
        raise Wrong("--map says which topic each event goes to: leave --topic out")
    file_format(file)
    settings = load_settings(broker=broker)
    for noisy in ("aiokafka", "asyncio"):  # what they complain of is raised, too, and told in a sentence
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    source = _Source(file, topic.value if topic else "clickstream", load_mapping(map_) if map_ else None, map_)
    asyncio.run(_replay(source, settings, speed or 0.0, shift_to_now, again))


@dataclass(frozen=True, slots=True)
class _Source:
    file: Path
    topic: str
    mapping: Any
    map_file: Path | None

    def read(self, reading: Any = None) -> Iterator[Any]:
        from pipeline.files import read

        return read(self.file, self.topic, self.mapping, reading)


async def _replay(source: _Source, settings: Settings, speed: float, shift: bool, again: bool) -> None:
    from pipeline.cli.workers import RunFailed
    from pipeline.files import Reading
    from pipeline.resumable import Position, Replay, ReplayError, identity_of

    target = target_of(settings)
    reading = Reading()
    with _bar() as bar:
        report = Report(lambda: reading.share, bar if console.is_terminal else None)
        going = Replay(target, identity_of(source.file, source.map_file, source.topic, target), source.file.name, speed, report.add)
        signals = stop_on_signals(going.stop)
        try:
            position = await going.begin()
            if again:
                position = Position(source.file.name)
            position = _from_there(source, position, speed, shift)
            before = position.sent
            if not position.done:
                position = await going.send(source.read(reading), position)
        except ReplayError as error:
            raise RunFailed(str(error)) from error
        finally:
            await going.close()
    if position.done and position.sent == before:
        console.print(
            f"{source.file} was sent before ({position.sent:,} records); nothing to do. --again sends it once more.", highlight=False
        )
    elif position.done:
        now = f", {position.sent - before:,} of them sent now" if before else ""
        console.print(f"{source.file}: all {position.sent:,} records are in Kafka{now}.", highlight=False)
    else:
        console.print(f"stopped: {position.sent:,} records are in Kafka; the same command goes on from there.", highlight=False)
        raise typer.Exit(128 + signals[0])


def target_of(settings: Settings) -> Any:
    """The topics as they are on the broker; makes the one of positions. Raises Wrong when there are none to send to."""
    from pipeline.resumable import Target
    from pipeline.topics import describe, ensure_compacted

    names = topic_names(settings)
    client = admin_arguments(settings)
    counts = describe(client, names)
    kinds = {"clickstream": names.clickstream, "orders": names.orders}
    partitions = {counts[name] for name in kinds.values()}
    if 0 in partitions or len(partitions) > 1:
        found = ", ".join(f"{name}: {counts[name] or 'not there'}" for name in kinds.values())
        raise Wrong(
            f"{settings.broker} has no topics to send to, all of one number of partitions ({found}): create them with `shopstream topics`"
        )
    target = Target(aiokafka_arguments(settings), kinds, partitions.pop(), names.app_id)
    ensure_compacted(client, target.positions, settings.replication_factor, settings.min_insync_replicas)
    return target


def _from_there(source: _Source, position: Any, speed: float, shift: bool) -> Any:
    """The position with the shift that belongs to it: a file that has been begun keeps its own."""
    import msgspec

    from pipeline.resumable import shift_to_now

    if position.sent == 0 and not position.done:
        moved = shift_to_now(source.read(), speed, int(time.time() * 1000)) if shift else None
        return msgspec.structs.replace(position, moved_ms=moved)
    if (position.moved_ms is not None) != shift and not position.done:
        used = "with" if position.moved_ms is not None else "without"
        raise Wrong(
            f"{source.file} was begun {used} --shift-to-now, {position.sent:,} records ago: go on {used} it, or start over with --again"
        )
    if position.sent:
        console.print(f"going on after {position.sent:,} records", highlight=False)
    return position


def stop_on_signals(stop: asyncio.Event) -> list[int]:
    """The first SIGINT or SIGTERM ends the replay after its transaction; which one came."""
    came: list[int] = []

    def end(number: int) -> None:
        came.append(number)
        stop.set()

    if sys.platform != "win32":
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, end, number)
    return came


def _bar() -> Progress:
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[rate]}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    progress.add_task("replay", total=1.0, rate="looking how far it is")
    return progress
