"""`shopstream rebuild`: all numbers computed anew from the topics, beside the live ones, and shown in their place at one instant.

A rebuild is the next revision: a worker with a consumer group, internal topics, definition versions and progress rows of its own, in the same warehouse.
One row in the warehouse shows it (`pipeline.sinks.revisions`); the live workers see that and go over by themselves (`pipeline.streaming.succession`).
Until that row nothing of the live pipeline is touched, and whatever interrupts the command, running it again goes on.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from pipeline.cli.clients import (
    Failed,
    Wrong,
    admin_arguments,
    is_outage,
    open_configured,
    patiently,
    revision_in_force,
    said_of,
    topic_names,
)
from pipeline.settings import Settings, load_settings

if TYPE_CHECKING:
    from pipeline.cli.workers import Workers
    from pipeline.definitions import Definitions
    from pipeline.sinks.revisions import Revision
    from pipeline.sinks.warehouse import Warehouse
    from pipeline.topic_names import Topics

LOOK_SECONDS = 0.1
MEET_SECONDS = 0.5
PLAIN_SECONDS = 5.0
COME_SECONDS = 90.0
"""So long the live workers may take to go over: their last flush, and kernels that may have to be compiled."""
console = Console(stderr=True)
Places = dict[tuple[str, int], int]


def rebuild(
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="`earliest`: all that the topics hold. A date or time: windows and cohorts that begin before it keep the numbers that they have at the swap.",
        ),
    ] = None,
    broker: Annotated[str | None, typer.Option(help="Bootstrap servers; SHOPSTREAM_BROKER.", show_default=False)] = None,
    warehouse: Annotated[str | None, typer.Option(help="Warehouse URL; SHOPSTREAM_WAREHOUSE.", show_default=False)] = None,
    definitions: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="SHOPSTREAM_DEFINITIONS; the workers need the same.", show_default=False),
    ] = None,
    drop_old: Annotated[
        bool, typer.Option("--drop-old", help="Delete what an earlier rebuild has replaced: rows, internal topics, groups. No way back.")
    ] = False,
) -> None:
    """Compute all numbers anew from the topics, with the definitions as they are now, and swap them in at one instant.

    The live workers go on meanwhile and then go over to the new numbers by themselves. Ctrl-C changes nothing; the same command goes on.
    What a user did before the topics begin is not known: they count as new there, in cohorts and in KPIs of first events, too.

    Example: shopstream rebuild --from earliest
    """
    if (from_ is None) == (not drop_old):
        raise Wrong("say --from earliest or --from 2026-03-01 to compute anew, or --drop-old to delete what was replaced")
    from kafka.errors import KafkaError

    from pipeline.cli.reading import parse_time
    from pipeline.cli.rebuild_from import EARLIEST
    from pipeline.definitions_file import load

    settings = load_settings(broker=broker, warehouse=warehouse, definitions=definitions)
    wanted = load(settings.definitions)
    if from_ != EARLIEST:
        parse_time("--from", from_, wanted.time_zone)
    if not settings.warehouse.startswith("clickhouse://"):
        raise Wrong("a rebuild works beside live workers, and an embedded warehouse lets in one process: `shopstream run` fills a new one")
    with ExitStack() as stack:
        opened = open_configured(settings)
        stack.callback(opened.close)
        try:
            if from_ is None:
                _drop_old(settings, opened)
            else:
                _Rebuild(settings, wanted, opened, stack).run(from_)
        except KafkaError as error:
            raise Failed(
                f"Kafka refused or did not answer: {error!r}. Check the broker and the rights of the user, then do it again."
            ) from None


@dataclass(slots=True)
class _Bar:
    """A bar on a terminal, else a plain line now and then."""

    bar: Progress
    _started: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)
    _first: int | None = None

    def show(self, done: int, total: int) -> None:
        """Offsets read, and to read before the swap."""
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        rate = (done - self._first) / max(now - self._started, 1e-3)
        text = f"{done:,} of {total:,} records · {rate:,.0f}/s"
        if console.is_terminal:
            self.bar.update(self.bar.task_ids[0], completed=done, total=total, rate=text)
        elif now - self._said >= PLAIN_SECONDS:
            self._said = now
            left = f" · about {(total - done) / rate:,.0f} s left" if rate else ""
            console.print(f"{text}{left}", highlight=False)


class _Rebuild:
    """One run of the command."""

    def __init__(self, settings: Settings, definitions: Definitions, warehouse: Warehouse, stack: ExitStack) -> None:
        from kafka import KafkaConsumer

        from pipeline.topics import connect

        self._settings = settings
        self._warehouse = warehouse
        self._stack = stack
        self._client = admin_arguments(settings)
        self._names = topic_names(settings)
        self._definitions = definitions
        self._revision = revision_in_force(warehouse)
        self._admin = connect(self._client)
        stack.callback(self._admin.close)
        self._consumer = KafkaConsumer(**self._client, enable_auto_commit=False)
        stack.callback(self._consumer.close)
        self._signals: list[int] = []
        self._told = ""
        self._rekeyed: Places | None = None

    def run(self, from_: str) -> None:
        began = time.monotonic()
        partitions = self._partitions()
        one = self._begin(from_, partitions)
        topics = self._names.at(one.revision)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupted)
        workers = self._worker(one)
        wanted = patiently(lambda: self._ends(self._sources(partitions))) if one.moved else {}
        console.print(f"computing revision {one.revision} beside revision {one.follows}", highlight=False)
        if one.since:
            console.print(
                f"windows and cohorts that began before {from_} stay as they are at the swap, those that are still open, too",
                highlight=False,
            )
        self._until_reached(one, topics, partitions, wanted, workers)
        lived = patiently(lambda: self._members(self._names.at(one.follows).app_id)) > 0
        self._show(one)
        console.print(f"revision {one.revision} is in force, {time.monotonic() - began:,.1f} s after the beginning", highlight=False)
        came = self._hand_over(one, topics, partitions, lived, workers)
        workers.stop(end_of_input=False)
        if one.since:
            self._keep(one)  # what the live workers still sent of these windows until they went over
        if came:
            typer.echo(f"revision {one.revision} is in force and its workers are at work. --drop-old deletes what it has replaced.")
        else:
            typer.echo(f"revision {one.revision} is in force, but no worker runs: start `shopstream worker`. Nothing is lost meanwhile.")

    # --- begin -----------------------------------------------------------------------------------------------------------

    def _partitions(self) -> int:
        from pipeline.topics import partition_counts

        counts = partition_counts(self._admin, [self._names.clickstream, self._names.orders])
        if 0 in counts.values() or len(set(counts.values())) > 1:
            listed = ", ".join(f"{name}: {count or 'not there'}" for name, count in counts.items())
            raise Failed(
                f"the source topics need the same number of partitions ({listed}): add partitions where they are missing, then rebuild"
            )
        return counts[self._names.clickstream]

    def _sources(self, partitions: int) -> list[Any]:
        from kafka import TopicPartition

        return [TopicPartition(topic, p) for topic in (self._names.clickstream, self._names.orders) for p in range(partitions)]

    def _begin(self, from_: str, partitions: int) -> Revision:
        """The revision to compute: one that an interrupted run has begun for the same work, or a new one. Makes its topics and its catalog."""
        from pipeline.cli.rebuild_from import since_ms
        from pipeline.definitions_version import at_revision
        from pipeline.sinks import revisions
        from pipeline.sinks.catalog import install
        from pipeline.topics import ensure_topics, grow

        since = since_ms(from_, self._definitions, self._consumer, self._sources(partitions), self._warehouse)
        moved = self._count(self._revision) not in (0, partitions) or self._moved(partitions)
        plan = sha256(repr((self._definitions, partitions)).encode()).hexdigest()[:12]
        known = {one.revision: one for one in revisions.known(self._warehouse)}
        one = self._next(revisions.Revision(self._revision + 1, self._revision, plan, since, moved), known, partitions)
        grow(self._client, self._names.rejected, partitions)
        s = self._settings
        ensure_topics(self._client, self._names.at(one.revision), partitions, s.replication_factor, s.min_insync_replicas)
        if one.revision not in known:
            revisions.write(self._warehouse, one)
        install(self._warehouse, at_revision(self._definitions, one.revision), int(time.time() * 1000), one.revision)
        return one

    def _next(self, wanted: Revision, known: dict[int, Revision], partitions: int) -> Revision:
        """`wanted` under the first number that nothing is known of, or under that of the newest one, if that is the same and its topics are there."""
        while wanted.revision in known or self._count(wanted.revision):
            newest = wanted.revision == max(known, default=0)
            if newest and known[wanted.revision] == wanted and self._count(wanted.revision) == partitions:
                break
            wanted = wanted._replace(revision=wanted.revision + 1)
        return wanted

    def _count(self, revision: int) -> int:
        """Partitions of a revision's changelog, 0 when it is not there."""
        from pipeline.topics import partition_counts

        changelog = self._names.at(revision).changelog
        return partition_counts(self._admin, [changelog])[changelog]

    def _moved(self, partitions: int) -> bool:
        """Whether the warehouse knows of another number of partitions (the changelog has got more of them, or is gone), or of re-keyed events."""
        last, rekeyed = self._warehouse.query('SELECT max("partition"), sum(rekeyed) FROM current_progress')[0]
        return int(rekeyed) > 0 or int(last) not in (0, partitions - 1)

    def _worker(self, one: Revision) -> Workers:
        from pipeline.cli.workers import Workers

        s = self._settings
        given = {"SHOPSTREAM_BROKER": s.broker, "SHOPSTREAM_WAREHOUSE": s.warehouse, "SHOPSTREAM_METRICS_HOST": "127.0.0.1"}
        if s.definitions:
            given["SHOPSTREAM_DEFINITIONS"] = str(s.definitions.absolute())
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="shopstream-rebuild-")))
        workers = Workers([0], os.environ | given, folder, ["--revision", str(one.revision)])
        self._stack.callback(workers.kill)
        return workers

    # --- until the swap --------------------------------------------------------------------------------------------------

    def _until_reached(self, one: Revision, topics: Topics, partitions: int, wanted: Places, workers: Workers) -> None:
        begin = patiently(lambda: self._consumer.beginning_offsets(self._sources(partitions)))
        firsts = {(p.topic, p.partition): first for p, first in begin.items()}
        columns = SpinnerColumn(), TextColumn("{task.fields[rate]}"), BarColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            progress.add_task("rebuild", total=None, rate="the worker starts")
            bar = _Bar(progress)
            while True:
                self._end_if_asked(one, workers)
                workers.look_after()
                with self._outage_is_waited_for():
                    live, own = self._positions(one, partitions)
                    target = {place: max(offset, live.get(place, 0), wanted.get(place, 0)) for place, offset in firsts.items()}
                    read = {place: min(max(own.get(place, 0), firsts[place]), end) for place, end in target.items()}
                    bar.show(sum(read.values()) - sum(firsts.values()), sum(target.values()) - sum(firsts.values()))
                    if read == target and self._sent_on(topics, partitions, own):
                        return
                time.sleep(LOOK_SECONDS)

    def _positions(self, one: Revision, partitions: int) -> tuple[Places, Places]:
        """Next offsets of the revision that is followed and of `one`, asked at one instant."""
        rows = self._warehouse.query(
            'SELECT revision, topic, "partition", argMax(next_offset, version) FROM progress WHERE revision IN %(both)s '
            'GROUP BY revision, topic, "partition"',
            {"both": (one.follows, one.revision)},
        )
        live, own = ({(str(t), int(p)): int(at) for r, t, p, at in rows if int(r) == which} for which in (one.follows, one.revision))
        return {place: at for place, at in live.items() if place[1] < partitions}, own

    def _sent_on(self, topics: Topics, partitions: int, own: Places) -> bool:
        """Whether events that one partition sent on to another have been applied there: those that were sent on when this was last asked."""
        from kafka import TopicPartition

        ends, self._rekeyed = self._rekeyed, self._ends([TopicPartition(topics.rekeyed, p) for p in range(partitions)])
        return ends is not None and all(own.get(place, 0) >= end for place, end in ends.items())

    def _ends(self, places: list[Any]) -> Places:
        return {(place.topic, place.partition): int(end) for place, end in self._consumer.end_offsets(places).items()}

    # --- the swap, and after it ------------------------------------------------------------------------------------------

    def _show(self, one: Revision) -> None:
        from pipeline.sinks import revisions

        if one.since:
            self._keep(one)
        patiently(lambda: revisions.write(self._warehouse, one._replace(shown_at=int(time.time() * 1000))))

    def _keep(self, one: Revision) -> None:
        from pipeline.sinks import revisions

        patiently(lambda: revisions.keep_before(self._warehouse, self._definitions, one))

    def _hand_over(self, one: Revision, topics: Topics, partitions: int, lived: bool, workers: Workers) -> bool:
        """Work on until another worker is there to take over (True), or none comes and all is applied (False)."""
        began = time.monotonic()
        while True:
            self._end_if_asked(one, workers, shown=True)
            workers.look_after()
            with self._outage_is_waited_for():
                gone = self._members(self._names.at(one.follows).app_id) == 0
                if gone and self._members(topics.app_id) > 1:
                    return True
                if gone and (not lived or time.monotonic() - began > COME_SECONDS):
                    own = self._positions(one, partitions)[1]
                    if all(own.get(place, 0) >= end for place, end in self._ends(self._sources(partitions)).items()):
                        return False
            time.sleep(MEET_SECONDS)

    @contextmanager
    def _outage_is_waited_for(self) -> Iterator[None]:
        """What is asked in it is asked again in the next round when the warehouse or Kafka is away; each outage is told once."""
        try:
            yield
        except Exception as error:
            if not is_outage(error):
                raise
            if self._told != (said := said_of(error)):
                console.print(said, highlight=False)
            self._told = said
            time.sleep(1)

    def _members(self, group: str) -> int:
        from pipeline.topics import members

        return members(self._admin, group)

    def _interrupted(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)

    def _end_if_asked(self, one: Revision, workers: Workers, shown: bool = False) -> None:
        if not self._signals:
            return
        workers.stop(end_of_input=False)
        if shown:
            console.print(f"revision {one.revision} is in force; the workers go over to it by themselves", highlight=False)
        else:
            console.print(f"stopped: revision {one.follows} is in force as before; the same command goes on", highlight=False)
        raise typer.Exit(128 + self._signals[0])


def _drop_old(settings: Settings, warehouse: Warehouse) -> None:
    """What belongs to another revision than the one in force. Raises Failed while one of them has workers."""
    from pipeline.sinks import revisions
    from pipeline.topics import connect, delete_topics, members

    revision, names = revision_in_force(warehouse), topic_names(settings)
    others = [names.at(number) for number in {0, *(one.revision for one in revisions.known(warehouse))} - {revision}]
    if not others:
        typer.echo("there is nothing to drop: no rebuild has replaced anything")
        return
    admin = connect(admin_arguments(settings))
    try:
        for topics in others:
            if n := members(admin, topics.app_id):
                raise Failed(
                    f"revision {topics.revision} has {n} worker{'s' if n > 1 else ''} (group {topics.app_id}): nothing was dropped"
                )
        groups = [topics.app_id for topics in others if topics.app_id in {group["group_id"] for group in admin.list_groups()}]
        if groups:
            admin.delete_groups(groups)
    finally:
        admin.close()
    revisions.drop_others(warehouse, revision)
    dropped = delete_topics(admin_arguments(settings), [name for topics in others for name in (topics.changelog, topics.rekeyed)])
    typer.echo(
        f"only revision {revision} is left; deleted: its predecessors' rows (in the background), {', '.join(dropped) or 'no topics'}"
    )
