"""The generated shop on its way to Kafka, in a thread of its own: flat out up to a head start, then by the shop's clock, which runs `speed` times as fast.

`pipeline.cli.demo` starts and stops it. The exact answers are kept for what Kafka has acknowledged, and for nothing else.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator

from generator.answers import Answers
from generator.live import LiveShop, Sent
from pipeline.cli.local import Local
from pipeline.cli.workers import RunFailed
from pipeline.files import Keyed
from pipeline.replay import new_producer, send

TICK_SECONDS = 0.1
MOST = 5_000
"""Messages of one step."""
HOLD = 20_000
"""Messages that the pipeline may be behind before the shop's clock waits for it: a slow machine shows a slower shop, not an old one."""


class Feed:
    """`now_ms` is the shop's clock; `fates` counts what was sent by its fate; `answers` may be asked once the feed has stopped."""

    def __init__(self, local: Local, shop: LiveShop, speed: float, head_start_ms: int) -> None:
        self.shop = shop
        self.speed = speed
        self.now_ms = shop.start_ms + head_start_ms
        self.fates: Counter[str] = Counter()
        self.answers = Answers(shop.faults.latest_ms)
        self.behind = 0
        """Messages sent and not yet in the reports; whoever watches the pipeline tells."""
        self._local = local
        self._go = threading.Event()
        self._stop = threading.Event()
        self._caught_up = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="demo-feed", daemon=True)
        self._thread.start()

    @property
    def sent(self) -> int:
        return self.fates.total()

    def go(self) -> None:
        """Let the clock run: the head start is in the reports."""
        self._go.set()

    @property
    def caught_up(self) -> bool:
        """Everything up to the shop's clock has been sent."""
        return self._caught_up

    def check(self) -> None:
        """Raises RunFailed when the feed has ended by itself."""
        if self._error is not None:
            raise RunFailed(f"the demo's events can't be sent: {self._error!r}")

    def stop(self) -> None:
        """Send no more, and wait until Kafka has what was sent. Raises RunFailed."""
        self.end()
        self.check()

    def end(self) -> None:
        """The same, whatever has happened."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._feed())
        except Exception as error:  # told to the main thread, whichever it is
            self._error = error

    async def _feed(self) -> None:
        producer = new_producer(self._local.client)
        await producer.start()
        try:
            messages = self.shop.messages()
            ahead = next(messages)
            while not self._stop.is_set():
                ahead, due = _due(ahead, messages, self.now_ms)
                if due:
                    await self._send(producer, due)
                if len(due) < MOST:
                    self._caught_up = True
                    await self._tick()
        finally:
            await producer.stop()

    async def _tick(self) -> None:
        began = time.monotonic()
        await asyncio.sleep(TICK_SECONDS)
        if self._go.is_set() and self.behind < HOLD:
            self.now_ms += int((time.monotonic() - began) * 1000 * self.speed)

    async def _send(self, producer: object, messages: list[Sent]) -> None:
        keyed = [Keyed(message.topic, message.key, message.value) for message in messages]
        await send(producer, keyed, self._local.topic_of, self._local.partitions)
        for message in messages:
            self.fates[message.fate] += 1
            if message.fact:
                self.answers.add(message.fact)
        self.answers.settle(messages[-1].arrival_ms)


def _due(ahead: Sent, messages: Iterator[Sent], now_ms: int) -> tuple[Sent, list[Sent]]:
    """What has arrived by `now_ms`, at most MOST, and the first message after it."""
    due: list[Sent] = []
    while ahead.arrival_ms <= now_ms and len(due) < MOST:
        due.append(ahead)
        ahead = next(messages)
    return ahead, due
