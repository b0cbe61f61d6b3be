"""The `shopstream` command. Exit codes: 0 done, 1 failed while running, 2 wrong use or settings, 128 + n ended by signal n before it was done."""

from __future__ import annotations

import logging
import signal
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pipeline.cli import config, doctor, rejects, report
from pipeline.cli.backup import backup, restore
from pipeline.cli.clients import Failed, Wrong, admin_arguments, open_configured, options_at, patiently, revision_in_force, topics_in_force
from pipeline.cli.demo import demo
from pipeline.cli.rebuild import rebuild
from pipeline.cli.replay import replay
from pipeline.cli.traffic import traffic
from pipeline.definitions import Definitions
from pipeline.reports.text import safe_lines
from pipeline.settings import SettingsError, load_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Exact real-time funnels, retention and KPIs for an online shop.",
)
app.add_typer(report.app, name="report")
app.add_typer(rejects.app, name="rejects")
app.command()(doctor.doctor)
app.command()(config.config)
errors = Console(stderr=True)


def wrong_use() -> tuple[type[Exception], ...]:
    from pipeline.definitions_file import DefinitionsError
    from pipeline.files import FilesError
    from pipeline.mapping import MappingError

    return (Wrong, SettingsError, DefinitionsError, FilesError, MappingError)


def failures() -> tuple[type[Exception], ...]:
    from embedded.jars import EmbeddedKafkaError
    from pipeline.backup import BackupError
    from pipeline.cache import FolderError
    from pipeline.changelog import ChangelogError
    from pipeline.cli.workers import RunFailed
    from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable
    from pipeline.telemetry.server import PortTaken
    from pipeline.topics import TopicsError

    return (
        Failed,
        BackupError,
        ChangelogError,
        FolderError,
        PortTaken,
        RunFailed,
        EmbeddedKafkaError,
        TopicsError,
        SinkRefused,
        SinkUnavailable,
    )


def load_definitions(path: Path | None) -> Definitions:
    from pipeline.definitions_file import load

    return load(path)


@app.command()
def run(
    warehouse: Annotated[Path, typer.Option(help="Folder of the embedded warehouse; new, or --overwrite.")],
    clickstream: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="NDJSON, CSV or Parquet, also gzipped.")] = None,
    orders: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="The same for orders.")] = None,
    definitions: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Funnels, retentions, KPIs; the bundled default if not given.")
    ] = None,
    map_: Annotated[
        Path | None, typer.Option("--map", exists=True, dir_okay=False, help="Renames foreign columns and events, see deploy/maps/.")
    ] = None,
    partitions: Annotated[int, typer.Option(min=1, max=1000)] = 4,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Worker processes.")] = 1,
    broker: Annotated[
        str | None, typer.Option(help="A Kafka that is there (topics of this run get a name of their own) instead of the embedded one.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Empty the warehouse folder first.")] = False,
    sort: Annotated[
        bool,
        typer.Option("--sort", help="Send in order of event time: for files sorted by something else. All of them must fit into memory."),
    ] = False,
) -> None:
    """Replay files through Kafka and the worker into an embedded warehouse; show funnels and retention.

    Example: shopstream run --clickstream sample/clickstream.ndjson.gz --orders sample/orders.ndjson.gz --warehouse build/warehouse
    """
    from pipeline.cli.run import Job, run_job

    if clickstream is None and orders is None:
        raise Wrong("nothing to read: give --clickstream, --orders or both")
    settings = load_settings(broker=broker) if broker else None
    run_job(
        Job(
            warehouse, clickstream, orders, load_definitions(definitions), definitions, map_, partitions, workers, settings, overwrite, sort
        )
    )


@app.command()
def worker(
    broker: Annotated[str | None, typer.Option(help="Bootstrap servers; SHOPSTREAM_BROKER.")] = None,
    warehouse: Annotated[str | None, typer.Option(help="Warehouse URL; SHOPSTREAM_WAREHOUSE.")] = None,
    definitions: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="SHOPSTREAM_DEFINITIONS.")] = None,
    revision: Annotated[int, typer.Option(hidden=True, help="At least this one, though it is not in force yet: for `rebuild`.")] = 0,
) -> None:
    """Run a worker until SIGTERM: events in, numbers out. Start as many as there are partitions, at most.

    Example: SHOPSTREAM_BROKER=kafka:9092 shopstream worker --warehouse clickhouse://worker@clickhouse:9000/shopstream
    """
    import faulthandler
    import time

    from pipeline.cli.quiet import OnceInAWhile
    from pipeline.definitions_version import at_revision
    from pipeline.sinks import revisions
    from pipeline.sinks.catalog import install
    from pipeline.streaming.ending import start_again
    from pipeline.streaming.worker import GO_OVER, run_worker

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while it is still starting it owns nothing
    settings = load_settings(broker=broker, warehouse=warehouse, definitions=definitions)
    if sys.__stderr__:
        faulthandler.enable(sys.__stderr__)  # a crash in compiled code is told, too
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    for noisy in ("faust", "mode", "aiokafka", "kafka", "numba", "pipeline.streaming"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(OnceInAWhile(("faust", "mode", "aiokafka", "asyncio")))
    read = load_definitions(settings.definitions)
    opened = open_configured(settings)
    ancestry = patiently(lambda: revisions.ancestry(opened, max(revision, revision_in_force(opened))))
    one = ancestry[0]
    wanted = at_revision(read, one.revision)
    patiently(lambda: install(opened, wanted, int(time.time() * 1000), one.revision))
    code = run_worker(options_at(settings, ancestry), wanted, opened)
    if code == GO_OVER:
        start_again()
    raise SystemExit(code)


@app.command()
def topics(
    partitions: Annotated[int | None, typer.Option(min=1, max=10_000, help="SHOPSTREAM_PARTITIONS.")] = None,
    broker: Annotated[str | None, typer.Option(help="SHOPSTREAM_BROKER.")] = None,
) -> None:
    """Create the topics, or check that those that are there belong together.

    Example: shopstream topics --broker kafka:9092 --partitions 8
    """
    from pipeline.topics import ensure_topics

    settings = load_settings(partitions=partitions, broker=broker)
    made = ensure_topics(
        admin_arguments(settings), topics_in_force(settings), settings.partitions, settings.replication_factor, settings.min_insync_replicas
    )
    for name, outcome in made.items():
        typer.echo(f"{outcome:8} {name}")


@app.command()
def migrate(
    warehouse: Annotated[str | None, typer.Option(help="Warehouse URL; SHOPSTREAM_WAREHOUSE.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make tables and views again that were dropped; they are empty until `shopstream rebuild`.")
    ] = False,
) -> None:
    """Bring the warehouse's schema up to date.

    Example: shopstream migrate --warehouse clickhouse://migrator@clickhouse:9000/shopstream
    """
    opened = open_configured(load_settings(warehouse=warehouse))
    done = opened.migrate(again=repair)
    opened.close()
    typer.echo("\n".join(f"applied  {name}" for name in done) or "up to date")


app.command()(demo)
app.command()(replay)
app.command()(traffic)
app.command()(backup)
app.command()(restore)
app.command()(rebuild)


@app.command()
def version() -> None:
    """Say which version this is."""
    typer.echo(installed_version("shopstream"))


def _say(what: str, error: Exception) -> None:
    errors.print(Text.assemble((f"{what}: ", "red"), safe_lines(str(error))), soft_wrap=True)


def main() -> None:
    """Entry point: errors of use and of the outside world end in one clear line, bugs in a traceback."""
    try:
        app()
    except SystemExit:
        raise  # every command's end; what follows would import all that can fail
    except wrong_use() as error:
        _say("error", error)
        raise SystemExit(2) from None
    except failures() as error:
        _say("failed", error)
        raise SystemExit(1) from None
    except MemoryError:
        _say("failed", MemoryError("out of memory: give the process more of it, then start it again. Nothing is lost"))
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
