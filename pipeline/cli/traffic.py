"""`shopstream traffic`: a generated shop's events to the Kafka topics, as if the shop were open now, each exactly once however often it is interrupted.

The same seed makes the same events, so how many were sent says which come next: that number is in Kafka (`pipeline.resumable`), beside the events.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline.cli.clients import Wrong
from pipeline.cli.replay import stop_on_signals, target_of
from pipeline.settings import load_settings

DAY_MS = 86_400_000
WEEK_MS = 7 * DAY_MS
MOST = 5_000
"""Messages of one transaction."""
TICK_SECONDS = 0.5
console = Console(stderr=True)


def traffic(
    visitors: Annotated[int, typer.Option(min=10, max=20_000, help="New visitors a day; many come back.")] = 400,
    history: Annotated[int, typer.Option(min=0, max=365, help="Days, at least, that the shop has behind it at its first start.")] = 14,
    seed: Annotated[int, typer.Option(help="Another seed is another shop.")] = 1,
    alive: Annotated[
        Path | None, typer.Option(dir_okay=False, help="A file touched whenever all that is due is in Kafka; for a health check.")
    ] = None,
    broker: Annotated[str | None, typer.Option(help="Bootstrap servers; SHOPSTREAM_BROKER.")] = None,
) -> None:
    """Send a generated shop's events to Kafka: its past flat out, then every event when it happens, until Ctrl-C.

    For trying out a Kafka and a ClickHouse of your own before your shop's events are there. Some events come late, twice or broken, as in life.
    Interrupted, the same command goes on where it stopped, and catches up. (`shopstream demo` needs no Kafka, and no patience.)

    Example: shopstream traffic --visitors 2000 --broker kafka:9092
    """
    _touch(alive)
    for noisy in ("aiokafka", "asyncio"):  # what they complain of is raised, too, and told in a sentence
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    asyncio.run(_send(target_of(load_settings(broker=broker)), visitors, history, seed, alive))


async def _send(target: Any, visitors: int, history: int, seed: int, alive: Path | None) -> None:
    import msgspec

    from generator.live import START_MS, LiveShop
    from pipeline.cli.workers import RunFailed
    from pipeline.resumable import Replay, ReplayError

    sending = Replay(target, f"traffic-{seed}-{visitors}-{target.partitions}", f"traffic of shop {seed}")
    came = stop_on_signals(sending.stop)
    try:
        position = await sending.begin()
        moved_ms = position.moved_ms
        if moved_ms is None:
            moved_ms = _moved_ms(START_MS, history, int(time.time() * 1000))
            position = msgspec.structs.replace(position, moved_ms=moved_ms)
        else:
            console.print(f"going on after {position.sent:,} events", highlight=False)
        messages = LiveShop(seed, visitors).messages()
        for _ in range(position.sent):
            next(messages)
        position = await sending.send_chunks(_due(messages, moved_ms, sending.stop, alive), position)
    except ReplayError as error:
        raise RunFailed(str(error)) from error
    finally:
        await sending.close()
    console.print(f"stopped: {position.sent:,} events are in Kafka; the same command goes on from there.", highlight=False)
    raise typer.Exit(128 + came[0])


def _moved_ms(start_ms: int, history_days: int, now_ms: int) -> int:
    """By how much the shop's times are moved: whole weeks, so that its nights are nights and its Mondays Mondays, and at least `history_days` are past."""
    return (now_ms - history_days * DAY_MS - start_ms) // WEEK_MS * WEEK_MS


async def _due(messages: Iterator[Any], moved_ms: int, stop: asyncio.Event, alive: Path | None) -> AsyncIterator[list[Any]]:
    """Chunks of those that have arrived by now, for ever."""
    from contextlib import suppress

    from pipeline.files import Keyed

    ahead = next(messages)
    while not stop.is_set():
        now_ms = int(time.time() * 1000) - moved_ms
        due: list[Keyed] = []
        while ahead.arrival_ms <= now_ms and len(due) < MOST:
            due.append(Keyed(ahead.topic, ahead.key, ahead.value))
            ahead = next(messages)
        if due:
            yield due
        if len(due) < MOST:
            _touch(alive)
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), TICK_SECONDS)


def _touch(alive: Path | None) -> None:
    try:
        if alive is not None:
            alive.touch()
    except OSError as error:
        raise Wrong(f"--alive {alive} can't be written: {error.strerror}") from error
