"""What the reading commands share: options with one meaning, a warehouse opened only for reading, dates of the shop's zone, output once or again and again."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit
from zoneinfo import ZoneInfo

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from pipeline.cli.clients import Wrong, open_configured
from pipeline.reports.queries import UnknownName
from pipeline.settings import Settings
from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable, Warehouse

WarehouseOption = Annotated[
    str | None,
    typer.Option(help="A warehouse's URL, or the folder of an embedded one; SHOPSTREAM_WAREHOUSE.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
CsvOption = Annotated[bool, typer.Option("--csv", help="CSV with a header on stdout, nothing else.")]
WatchOption = Annotated[
    float | None,
    typer.Option(min=0.2, max=86_400, help="Draw again every so many seconds, until Ctrl-C.", metavar="SECONDS", show_default=False),
]
EARLIEST, LATEST = 2000, 2100
FRAMES_A_SECOND = 4
_UNKNOWN_TABLE = ("UNKNOWN_TABLE", "Code: 60")


def warehouse_url(given: str | None) -> str | None:
    """An option's value as a URL: a plain path is a folder, as it is for `run --warehouse`."""
    return f"chdb://{Path(given).absolute()}" if given and "://" not in given else given


@contextmanager
def reading(settings: Settings) -> Iterator[Warehouse]:
    """The warehouse in force, closed at the end. An embedded one must be there: reading makes none. Errors get their remedy."""
    check_folder(settings.warehouse)
    try:
        warehouse = open_configured(settings)
    except SinkRefused as error:
        raise SinkRefused(f"{error}. End the process that has it open, or ask that one (a live demo serves its own numbers).") from None
    try:
        yield warehouse
    except UnknownName as error:
        raise Wrong(str(error)) from None
    except SinkUnavailable as error:
        raise SinkUnavailable(f"{error}. Check SHOPSTREAM_WAREHOUSE, or say --warehouse FOLDER for an embedded one.") from None
    except SinkRefused as error:
        if any(sign in str(error) for sign in _UNKNOWN_TABLE):
            raise SinkRefused(f"the warehouse lacks tables of this version: run `shopstream migrate`. ({error})") from None
        raise
    finally:
        warehouse.close()


def embedded_folder(url: str) -> str | None:
    """The folder of an embedded warehouse ('' in memory); None for any other URL, also one that is none."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return unquote(parts.netloc + parts.path) if parts.scheme == "chdb" else None


def masked(url: str) -> str:
    """A warehouse's URL without a password that somebody put into it."""
    return re.sub(r"(://[^/@]*?):[^/]*@", r"\1:***@", url)


def check_folder(url: str) -> None:
    folder = embedded_folder(url)
    if folder is None:
        return
    if not folder:
        raise Wrong("chdb:// is an empty warehouse in memory: name a folder, like --warehouse build/sample-warehouse")
    if not Path(folder).is_dir():
        raise Wrong(f"{folder} is no folder: give the one that `shopstream run --warehouse FOLDER` wrote")
    if not (Path(folder) / "metadata").is_dir() and not (Path(folder) / "store").is_dir():
        raise Wrong(f"{folder} is no warehouse: give the folder that `shopstream run --warehouse FOLDER` wrote")


def parse_time(option: str, text: str | None, time_zone: str) -> datetime | None:
    """An ISO date or time, of the shop's zone unless it names another. Raises Wrong."""
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise Wrong(f"{option} {text!r} is no date: write it like 2026-03-01 or 2026-03-01T14:00 (in {time_zone})") from None
    if not EARLIEST <= when.year < LATEST:
        raise Wrong(f"{option} {text}: dates are between {EARLIEST} and {LATEST}")
    return when if when.tzinfo else when.replace(tzinfo=ZoneInfo(time_zone))


def parse_span(begin: str | None, end: str | None, time_zone: str) -> tuple[datetime | None, datetime | None]:
    """--from and --to as aware times, half-open. Raises Wrong when nothing can lie between them."""
    first, last = parse_time("--from", begin, time_zone), parse_time("--to", end, time_zone)
    if first and last and last <= first:
        raise Wrong(
            f"--to {end} is not after --from {begin}: --from is included, --to is not, so one day is --from 2026-03-01 --to 2026-03-02"
        )
    return first, last


def check_output(as_json: bool, as_csv: bool, watch: float | None) -> None:
    if as_json and as_csv:
        raise Wrong("--json and --csv exclude each other: give one of them")
    if as_csv and watch is not None:
        raise Wrong("--csv can't be watched: leave --watch out, or take --json, which then gives a line a time")


def write(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def plain_console() -> Console:
    """Stdout for people: characters that its encoding lacks become question marks rather than an error."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)


def watch_text(seconds: float, line: Callable[[], str]) -> None:
    """A line now and every so many seconds, until Ctrl-C."""
    try:
        while True:
            write(line())
            time.sleep(seconds)
    except KeyboardInterrupt:
        return


def watch_screen(console: Console, seconds: float, ask: Callable[[], Any], draw: Callable[[Any, int], RenderableType]) -> None:
    """Ask every so many seconds and draw on the alternate screen, following its size; Ctrl-C leaves the last state on the normal one.

    Not a terminal: one state after the other. A warehouse that goes away once it was there is said, and asked again.
    """
    state, trouble = ask(), ""

    def frame() -> RenderableType:
        note = Text(trouble, "red") if trouble else Text(f"every {seconds:g} s, Ctrl-C ends", "bright_black")
        return Group(note, draw(state, console.width))  # the note first: what does not fit is cut off at the end

    live = Live(get_renderable=frame, console=console, screen=True, refresh_per_second=FRAMES_A_SECOND) if console.is_terminal else None
    try:
        if live:
            live.start(refresh=True)
        while True:
            if live is None:
                console.print(draw(state, console.width), Text(), sep="\n")
            time.sleep(seconds)
            try:
                state, trouble = ask(), ""
            except SinkUnavailable as error:
                trouble = f"asked again in {seconds:g} s: {error}"
    except KeyboardInterrupt:
        pass
    finally:
        if live:
            live.stop()
            console.print(draw(state, console.width))
