"""`shopstream demo`: a generated shop through a whole pipeline on this machine, live on the terminal, and every number checked at the end."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline.cli.clients import Failed
from pipeline.cli.stop import Stop

LOOK_SECONDS = 1.0
LOOK_SHARE, LOOK_MOST_SECONDS = 0.25, 3.0
"""Of the time, at most, the screen asks the warehouse, the rest belongs to the worker; but it is never older than a few seconds."""
REDRAW_SECONDS = 0.2
PLAIN_SECONDS = 5.0
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
FUTURE_MS = 365 * DAY_MS
"""The definitions file lets events be 366 days ahead of the broker's clock; the demo ends before."""


@dataclass(frozen=True, slots=True)
class Show:
    """What the demo was asked for."""

    minutes: float | None
    speed: float
    visitors: int
    seed: int
    head_start_days: int
    partitions: int
    workers: int
    warehouse: Path | None
    overwrite: bool
    metrics_port: int | None


def demo(
    minutes: Annotated[float | None, typer.Option(min=0.01, help="End by itself after so long; else Ctrl-C ends it.")] = None,
    speed: Annotated[
        float, typer.Option(min=1, max=100_000, help="How many times as fast the shop's time runs; 8640: a day in 10 s.")
    ] = 8640,
    visitors: Annotated[int, typer.Option(min=50, max=20_000, help="New visitors a day; many come back.")] = 400,
    seed: Annotated[int, typer.Option(help="Another seed is another shop.")] = 1,
    head_start: Annotated[int, typer.Option(min=0, max=365, help="Days that the shop has behind it when you first see it.")] = 7,
    workers: Annotated[int, typer.Option(min=1, max=16, help="Worker processes.")] = 1,
    partitions: Annotated[int, typer.Option(min=1, max=64)] = 4,
    warehouse: Annotated[
        Path | None, typer.Option(help="Keep the numbers in this folder (new, or --overwrite) for `shopstream report`; else nothing stays.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Empty the warehouse folder first.")] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65_535, show_default="9464, or a free one", help="The first worker's port of /metrics, others the next; 0: none."
        ),
    ] = None,
) -> None:
    """Watch a generated shop live: funnel, retention, KPIs. Needs nothing but this machine.

    Starts Kafka, workers and ClickHouse of its own and sends them a shop whose days last seconds.
    Some of its events come late, twice or broken, and now and then payments or pages fail.
    At the end every number is compared with the generator's own exact answers; exit code 1 when one differs.
    Ctrl-C ends it and leaves nothing behind; a second Ctrl-C ends it at once.

    Example: shopstream demo --minutes 2 --speed 43200 --warehouse build/demo
    """
    _Demo(Show(minutes, speed, visitors, seed, head_start, partitions, workers, warehouse, overwrite, metrics_port)).run()


class _Demo:
    def __init__(self, show: Show) -> None:
        self.show = show
        self.console = Console()
        self.on_screen = self.console.is_terminal and not self.console.is_dumb_terminal
        self.stop = Stop()

    def run(self) -> None:
        """Until a signal or the time is over; then finish, compare, say so. Raises Failed, RunFailed and what the parts raise."""
        from generator.answers import DEMO_FILE
        from generator.live import LiveShop
        from pipeline.cli.demo_check import verdict
        from pipeline.cli.demo_feed import Feed
        from pipeline.cli.demo_look import Watcher
        from pipeline.cli.local import Backlog, Wanted, local_pipeline, prepare_folder
        from pipeline.definitions_file import load

        show, definitions = self.show, load(DEMO_FILE)
        if show.warehouse:
            prepare_folder(show.warehouse, show.overwrite)
        with ExitStack() as stack:
            stack.enter_context(_ending_on_sigterm())
            folder = show.warehouse or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shopstream-demo-")))
            wanted = Wanted(folder, definitions, DEMO_FILE, show.partitions, show.workers, metrics_port=show.metrics_port)
            with self._waiting("starting Kafka, ClickHouse and a worker"):
                local = stack.enter_context(local_pipeline(wanted))
            feed = Feed(local, LiveShop(show.seed, show.visitors), show.speed, show.head_start_days * DAY_MS)
            stack.callback(feed.end)
            backlog = stack.enter_context(Backlog(local))
            watcher = Watcher(local, definitions, feed, backlog)
            stack.enter_context(self._signals())
            with self._waiting(f"{show.head_start_days} days of the shop go ahead (the first time a worker compiles for a minute)"):
                self._until_applied(feed, backlog)
            if self.stop.is_set():
                self._print("stopped before the first number")
                return
            if local.metrics and not self.on_screen:
                self._print(*(f"metrics at http://127.0.0.1:{port}/metrics" for port in local.metrics))
            feed.go()
            self._watch(watcher, feed)
            with self._waiting("finishing what was sent"):
                feed.stop()
                while not backlog.look():
                    time.sleep(0.1)
                last = watcher.look(everything=True)
                compared = verdict(local.warehouse, feed.answers, feed.fates)
                local.workers.stop()
            self._summary(last, compared, feed)

    def _until_applied(self, feed: Any, backlog: Any) -> None:
        """Until the head start is in the reports."""
        while not self.stop.is_set():
            feed.check()
            all_sent = feed.caught_up
            if backlog.look() and all_sent:
                return
            self.stop.wait(0.25)

    def _watch(self, watcher: Any, feed: Any) -> None:
        ends = time.monotonic() + self.show.minutes * 60 if self.show.minutes else float("inf")
        latest = int(time.time() * 1000) + FUTURE_MS
        with self._outlet() as show:
            snapshot, next_look = None, 0.0
            while not self.stop.is_set() and time.monotonic() < ends and feed.now_ms < latest:
                feed.check()
                began = time.monotonic()
                if snapshot is None or began >= next_look:
                    snapshot = watcher.look()
                    took = time.monotonic() - began
                    next_look = max(began + LOOK_SECONDS, time.monotonic() + min(LOOK_MOST_SECONDS, took * (1 / LOOK_SHARE - 1)))
                show(snapshot)
                self.stop.wait(max(0.0, min(REDRAW_SECONDS, ends - time.monotonic())))

    @contextmanager
    def _outlet(self) -> Iterator[Callable[[Any], None]]:
        """Where snapshots are shown: a screen of its own on a terminal, which comes back as it was; plain lines elsewhere."""
        if not self.on_screen:
            yield _PlainLines(self._print).show
            return
        from rich.live import Live

        with Live(console=self.console, screen=True, auto_refresh=False) as live:
            yield _Screen(self.console, live).show

    @contextmanager
    def _waiting(self, for_what: str) -> Iterator[None]:
        if self.on_screen:
            with self.console.status(for_what):
                yield
        else:
            self._print(f"{for_what} …")
            yield

    def _summary(self, last: Any, compared: Any, feed: Any) -> None:
        from pipeline.cli.demo_view import plain_reports, summary

        if self.on_screen:
            self.console.print(summary(last, self.console.width))
        else:
            self._print(*plain_reports(last))
        fates = feed.fates
        self._print(
            f"sent {feed.sent:,} events of {(feed.now_ms - feed.shop.start_ms) / DAY_MS:.1f} days: {fates['late']:,} late, "
            f"{fates['duplicate']:,} twice, {fates['bad']:,} broken, {fates['too_late']:,} too late"
        )
        if compared.different:
            shown = "\n".join(
                f"  {report} {key}: {found}, the generator says {true}" for report, key, found, true in compared.different[:10]
            )
            raise Failed(f"{len(compared.different):,} of {compared.numbers:,} numbers differ from the generator's:\n{shown}")
        self._print(f"all {compared.numbers:,} numbers equal the generator's")
        if self.show.warehouse:
            self._print(f"kept: shopstream report funnel --name checkout --warehouse {self.show.warehouse}")

    def _print(self, *lines: str) -> None:
        for line in lines:
            self.console.print(line, highlight=False, soft_wrap=True)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first signal ends the show in good order; a second one ends it at once."""

        def end(number: int, _: Any) -> None:
            if self.stop.is_set():
                raise SystemExit(128 + number)
            self.stop.set()

        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Screen:
    """Draws when there is something new, or the terminal has another size."""

    def __init__(self, console: Console, live: Any) -> None:
        self._console, self._live = console, live
        self._shown: tuple[Any, Any] = (None, None)

    def show(self, snapshot: Any) -> None:
        from pipeline.cli.demo_view import screen

        size = self._console.size
        if self._shown[0] is not snapshot or self._shown[1] != size:
            self._shown = (snapshot, size)
            self._live.update(screen(snapshot, size.width, size.height), refresh=True)


class _PlainLines:
    """A line every few seconds, and funnel and retention once a day of the shop."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say = say
        self._next = 0.0
        self._told: Any = None
        self._day: Any = None

    def show(self, snapshot: Any) -> None:
        from pipeline.cli.demo_view import plain_line, plain_reports

        now = time.monotonic()
        if snapshot is self._told or now < self._next:
            return
        self._told, self._next = snapshot, now + PLAIN_SECONDS
        self._say(plain_line(snapshot))
        if self._day != snapshot.clock.date():
            self._day = snapshot.clock.date()
            self._say(*plain_reports(snapshot))


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """While the parts are starting there is nothing to finish: both signals end everything that was started."""

    def end(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
