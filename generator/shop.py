"""The shop's messages in the order they arrive at Kafka: late ones, duplicates and bad records among them.

In: a seed and sizes. Out: `Message`s. Called by `generator.sample`, the demo, and tests.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from generator.catalog import items
from generator.visits import DAY_MS, HOUR_MS, Visitor

START_MS = 1_772_323_200_000  # 2026-03-01, four weeks before Europe's clocks change


class Message(NamedTuple):
    topic: str
    value: bytes
    key: bytes
    arrival_ms: int


@dataclass(frozen=True)
class Faults:
    """Shares of all events. Every message arrives some seconds after its ts; a late one up to `latest_ms` after it."""

    late: float = 0.02
    duplicated: float = 0.01
    bad: float = 0.001
    latest_ms: int = 20 * HOUR_MS


def shop(seed: int, users: int, days: int, start_ms: int = START_MS, faults: Faults | None = None) -> Iterator[Message]:
    """About 25 events a user in two weeks. Days begin at `start_ms`; nothing happens after the last of them."""
    faults = faults or Faults()
    rng = random.Random(f"shop {seed}")  # noqa: S311 repeatable, not secret
    goods = items(rng)
    events = []
    for number in range(users):
        visitor = Visitor(random.Random(f"visitor {seed} {number}"), number, start_ms, days, goods)  # noqa: S311
        events += [event for event in visitor.events() if event[1] < start_ms + days * DAY_MS]
    events.sort(key=lambda event: event[1])
    messages = [message for n, event in enumerate(events) for message in _sent(rng, n, event, faults)]
    messages.sort(key=lambda message: message.arrival_ms)
    yield from messages


def _sent(rng: random.Random, number: int, event: tuple[str, int, dict[str, Any]], faults: Faults) -> Iterator[Message]:
    topic, ts, body = event
    key = body["user_id"].encode()
    value = msgspec.json.encode({"event_id": f"{topic[0]}{number:08x}", "event": body.pop("event"), "ts": ts, **body})
    arrival = ts + 500 + int(rng.expovariate(1 / 1500))
    if rng.random() < faults.late:
        arrival = ts + min(int(rng.lognormvariate(13.5, 1.5)), faults.latest_ms)
    yield Message(topic, value, key, arrival)
    if rng.random() < faults.duplicated:
        yield Message(topic, value, key, arrival + rng.randrange(1, 240_000))
    if rng.random() < faults.bad:
        yield Message(topic, spoiled(rng, value), key, arrival)


def spoiled(rng: random.Random, value: bytes) -> bytes:
    """A copy that no decoder may accept."""
    return rng.choice((
        value[: rng.randrange(1, len(value))],
        value.replace(b'"ts":', b'"ts":-'),
        value.replace(b'"user_id"', b'"user"'),
        value.replace(b'"event_id":"', b'"event_id":[],"was":"'),
        b"\xff\xfe" + value,
        b"",
    ))  # fmt: skip
