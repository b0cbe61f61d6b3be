"""`shopstream rejects`: what was not applied and why, from the warehouse; and back to its topic, bounded and counted."""

from __future__ import annotations

import csv
import io
import sys
from typing import Annotated

import typer
from rich.text import Text

from pipeline.cli.clients import Failed, Wrong, admin_arguments, topic_names
from pipeline.cli.reading import (
    CsvOption,
    JsonOption,
    WarehouseOption,
    check_output,
    parse_time,
    plain_console,
    reading,
    warehouse_url,
    write,
)
from pipeline.cli.resending import read_again, send
from pipeline.definitions_file import load
from pipeline.pseudonyms import is_withheld
from pipeline.reports import queries
from pipeline.reports.export import to_json
from pipeline.reports.rejects import (
    Reject,
    Wanted,
    as_fields,
    count_by_reason,
    find,
    reject_panel,
    rejects_table,
    replayable,
)
from pipeline.reports.render import reasons_line
from pipeline.settings import Settings, load_settings
from pipeline.sinks.warehouse import Warehouse
from schemas.rejects import Reason

app = typer.Typer(no_args_is_help=True, help="Records that were not applied: look at them, send them again.", rich_markup_mode=None)
MOST = 10_000
GONE = "Kafka no longer holds it: its topic's retention has deleted it. Its dead-letter topic may still have it."

TopicOption = Annotated[str | None, typer.Option(help="Only of this topic.")]
ReasonOption = Annotated[str | None, typer.Option(help="Only of this reason, like malformed_json.")]
BrokerOption = Annotated[str | None, typer.Option(help="Bootstrap servers; SHOPSTREAM_BROKER.", show_default=False)]
SinceOption = Annotated[str | None, typer.Option(help="Only records sent at or after it: 2026-03-01 or 2026-03-01T14:00.", metavar="DATE")]


@app.command("list")
def list_(
    topic: TopicOption = None,
    reason: ReasonOption = None,
    since: SinceOption = None,
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="So many of the newest.")] = 20,
    warehouse: WarehouseOption = None,
    as_json: JsonOption = False,
    as_csv: CsvOption = False,
) -> None:
    """How many records were rejected for which reason, and the newest of them.

    Example: shopstream rejects list --reason missing_field --since 2026-03-01 --limit 50
    """
    check_output(as_json, as_csv, None)
    _check_reason(reason)
    settings = load_settings(warehouse=warehouse_url(warehouse))
    with reading(settings) as opened:
        zone = _zone(opened, settings)
        wanted = Wanted(topic, reason, parse_time("--since", since, zone))
        reasons, found = count_by_reason(opened, wanted), find(opened, wanted, zone, limit)
    if as_json:
        total = sum(n for _, n in reasons)
        write(to_json({"total": total, "reasons": dict(reasons), "rejects": [as_fields(reject) for reject in found]}))
    elif as_csv:
        write(_csv(found))
    else:
        console = plain_console()
        console.print(rejects_table(found, reasons, console.width))


@app.command()
def show(
    topic: Annotated[str, typer.Argument(help="As `rejects list` names it.", show_default=False)],
    partition: Annotated[int, typer.Argument(min=0, show_default=False)],
    offset: Annotated[int, typer.Argument(min=0, show_default=False)],
    everything: Annotated[bool, typer.Option("--all", help="All bytes, however many.")] = False,
    from_kafka: Annotated[
        bool, typer.Option("--from-kafka", help="Its key and bytes from Kafka: where user ids don't leave it, they are nowhere else.")
    ] = False,
    warehouse: WarehouseOption = None,
    broker: BrokerOption = None,
    as_json: JsonOption = False,
) -> None:
    """One record: why it was rejected, its key and its bytes. What a terminal would obey is shown escaped.

    Example: shopstream rejects show clickstream 1 2389

    Its exact bytes: shopstream rejects show clickstream 1 2389 --json | jq -r .rejects[0].raw | base64 -d
    """
    settings = load_settings(warehouse=warehouse_url(warehouse), broker=broker)
    with reading(settings) as opened:
        found = find(opened, Wanted(topic, partition=partition, offset=offset), _zone(opened, settings), len(Reason), whole=True)
    if not found:
        raise Wrong(f"no reject of {topic} {partition} {offset}: `shopstream rejects list --topic {topic}` says which there are")
    if from_kafka:
        found, gone = read_again(admin_arguments(settings), found)
        if gone:
            raise Failed(GONE)
    if as_json:
        write(to_json({"rejects": [as_fields(reject) for reject in found]}))
        return
    console = plain_console()
    for reject in found:
        console.print(reject_panel(reject, everything))


@app.command()
def replay(
    topic: TopicOption = None,
    reason: ReasonOption = None,
    since: SinceOption = None,
    partition: Annotated[int | None, typer.Option(min=0, help="Only of this partition.")] = None,
    offset: Annotated[int | None, typer.Option(min=0, help="Only this record; with --topic and --partition.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="So many at most, the oldest first.")] = 100,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, send nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    warehouse: WarehouseOption = None,
    broker: BrokerOption = None,
) -> None:
    """Send rejected records back to the topic and partition they came from, with their key, byte for byte.

    It helps once the cause is gone: a worker of a newer version, a raised max_future or allowed_lateness, a clock that was wrong. What is still wrong is
    rejected again, as a new record, and too many of them trip the worker's brake.

    Sending a record twice counts it once: the copy has the same event_id and time and is dropped as a duplicate as long as it is not
    older than the allowed lateness, and as too late from then on. The old rows stay in the warehouse's rejects.

    Example: shopstream rejects replay --reason from_the_future --since 2026-03-01 --dry-run
    """
    _check_reason(reason)
    if offset is not None and (topic is None or partition is None):
        raise Wrong("--offset needs --topic and --partition: an offset counts within a topic partition")
    settings = load_settings(warehouse=warehouse_url(warehouse), broker=broker)
    console = plain_console()
    with reading(settings) as opened:
        zone = _zone(opened, settings)
        wanted = Wanted(topic, reason, parse_time("--since", since, zone), partition, offset)
        reasons = count_by_reason(opened, wanted)
        found = find(opened, wanted, zone, limit, oldest_first=True, whole=True)
    names = topic_names(settings)
    good, left = replayable(found, (names.clickstream, names.orders))
    console.print(reasons_line(reasons))
    for why, n in left.items():
        console.print(Text(f"not sent: {n:,} {why}"))
    total = sum(n for _, n in reasons)
    if total > len(found):
        console.print(
            f"the oldest {len(found):,} of {total:,}: raise --limit (at most {MOST:,}), or go on with --since {found[-1].record_at.isoformat()}"
        )
    if not good:
        console.print("nothing to send")
        return
    if dry_run:
        console.print(f"would send {len(good):,} records to {_places(good)}")
        return
    withheld = [reject for reject in good if is_withheld(reject.key)]
    if withheld:
        again, gone = read_again(admin_arguments(settings), withheld)
        good = [reject for reject in good if not is_withheld(reject.key)] + again
        console.print(f"read again from Kafka, as user ids don't leave it: {len(again):,}" + (f"; gone there: {gone:,}" if gone else ""))
    if not good:
        raise Failed(GONE)
    _confirm(good, yes)
    sent = send(admin_arguments(settings), good)
    console.print(f"sent {sent:,} records to {_places(good)}")


def _confirm(good: list[Reject], yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise Wrong("there is no terminal to ask on: say --yes to send, --dry-run to see what would be")
    if not typer.confirm(f"send {len(good):,} records to {_places(good)}?"):
        raise Failed("nothing was sent")


def _places(rejects: list[Reject]) -> str:
    counts: dict[str, int] = {}
    for reject in rejects:
        counts[reject.topic] = counts.get(reject.topic, 0) + 1
    return ", ".join(f"{topic} ({n:,})" for topic, n in sorted(counts.items()))


def _check_reason(reason: str | None) -> None:
    if reason is not None and reason not in list(Reason):
        raise Wrong(f"there is no reason {reason!r}: there are {', '.join(Reason)}")


def _zone(warehouse: Warehouse, settings: Settings) -> str:
    return queries.of_shop(warehouse, load(settings.definitions)).time_zone


def _csv(found: list[Reject]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("topic", "partition", "offset", "reason", "cause", "record_at", "size")
    writer.writerow(names)
    for reject in found:
        writer.writerow([value.isoformat() if name == "record_at" else value for name, value in as_fields(reject).items() if name in names])
    return out.getvalue()
