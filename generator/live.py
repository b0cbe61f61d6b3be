"""The shop without an end: messages in the order they arrive at Kafka, drawn as they are needed, and what is true of each.

In: a seed and the number of new visitors a day. Out: `Sent` messages, each with the event that a correct pipeline counts once. Called by
`shopstream demo`; tests hold its answers (`generator.answers`) against SQL.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from generator.catalog import items
from generator.incidents import DAY_MS, HOUR_MS, Incidents
from generator.shop import spoiled
from generator.visits import CAMPAIGN_DAY, Event, Visitor

START_MS = 1_704_067_200_000
"""2024-01-01, a Monday: far enough back that a shop whose days last seconds takes hours to get to where the broker's clock calls it the future."""
LAST_VISIT = 0.05
"""Of a returning customer, each visit is the last with this chance."""
WEEKDAYS = (0.9, 0.95, 1.0, 1.0, 1.05, 1.25, 1.15)


class Fact(NamedTuple):
    """An event that counts."""

    topic: str
    ts: int
    body: dict[str, Any]


class Sent(NamedTuple):
    """`fact` is None for what a pipeline must not count: `fate` says why ('duplicate', 'bad', 'too_late'; else 'late' or '')."""

    topic: str
    key: str
    value: bytes
    arrival_ms: int
    fact: Fact | None
    fate: str


@dataclass(frozen=True)
class LiveFaults:
    """Shares of all events. Late ones arrive at most `latest_ms` after their ts; too late ones (clickstream only) days after it.

    Whoever counts must allow more than `latest_ms` of lateness and less than `too_late_ms`, and know duplicates for as long.
    """

    late: float = 0.02
    duplicated: float = 0.008
    bad: float = 0.0008
    too_late: float = 0.0004
    latest_ms: int = 20 * HOUR_MS
    too_late_ms: int = 72 * HOUR_MS


class LiveShop:
    """An endless shop. The same arguments make the same messages."""

    def __init__(self, seed: int, visitors_a_day: int = 400, start_ms: int = START_MS, faults: LiveFaults | None = None) -> None:
        self.start_ms = start_ms
        self.faults = faults or LiveFaults()
        self.incidents = Incidents(seed)
        self._seed = seed
        self._visitors_a_day = visitors_a_day
        self._rng = random.Random(f"live {seed}")  # noqa: S311 repeatable, not secret
        self._life = random.Random()  # noqa: S311 of whichever visitor is looked at, seeded anew each time: a generator each would be 2.5 kB each
        self._goods = items(self._rng)
        self._visitors = 0
        self._numbers = 0
        self._visits: list[tuple[int, int, Visitor]] = []
        self._events: list[tuple[int, int, Event]] = []
        self._arrivals: list[tuple[int, int, Sent]] = []

    def messages(self) -> Iterator[Sent]:
        """For ever, by arrival. An hour at a time: what a later hour brings has a later ts, and nothing arrives before its ts."""
        hour = self.start_ms
        while True:
            if (hour - self.start_ms) % DAY_MS == 0:
                self._new_visitors(hour)
            hour += HOUR_MS
            while self._visits and self._visits[0][0] < hour:
                self._visit(*heapq.heappop(self._visits))
            while self._events and self._events[0][0] < hour:
                self._send(heapq.heappop(self._events)[2])
            while self._arrivals and self._arrivals[0][0] < hour:
                yield heapq.heappop(self._arrivals)[2]

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    def _promotion(self, ts: int) -> bool:
        return (ts - self.start_ms) // DAY_MS % 7 == CAMPAIGN_DAY

    def _new_visitors(self, midnight: int) -> None:
        share = WEEKDAYS[(midnight - self.start_ms) // DAY_MS % 7] * self._rng.uniform(0.85, 1.15)
        for _ in range(round(self._visitors_a_day * share)):
            self._visitors += 1
            self._life.seed(f"live visitor {self._seed} {self._visitors}")
            visitor = Visitor(self._life, self._visitors, self.start_ms, 0, self._goods, self.incidents)
            heapq.heappush(self._visits, (midnight + visitor.time_of_day(), self._number(), visitor))

    def _visit(self, ts: int, _: int, visitor: Visitor) -> None:
        self._life.seed(f"live visit {self._seed} {visitor.user_id} {visitor.sessions}")
        for event in visitor.visit(ts, self._promotion(ts)):
            heapq.heappush(self._events, (event[1], self._number(), event))
        if visitor.stays and visitor.rng.random() > LAST_VISIT:
            day = ts - ts % DAY_MS + int(visitor.days_away()) * DAY_MS
            again = max(day + visitor.time_of_day(), ts + 2 * HOUR_MS)
            heapq.heappush(self._visits, (again, self._number(), visitor))

    def _send(self, event: Event) -> None:
        topic, ts, body = event
        rng, faults = self._rng, self.faults
        number = self._number()
        value = msgspec.json.encode({"event_id": f"{topic[0]}{number:08x}", "event": body["event"], "ts": ts, **body})
        fact = Fact(topic, ts, body)
        key = body["user_id"]

        def arrives(at: int, what: bytes, of: Fact | None, fate: str) -> None:
            heapq.heappush(self._arrivals, (at, self._number(), Sent(topic, key, what, at, of, fate)))

        if topic == "clickstream" and rng.random() < faults.too_late:
            arrives(ts + faults.too_late_ms, value, None, "too_late")
            return
        if late := rng.random() < faults.late:
            arrival = ts + min(60_000 + int(rng.lognormvariate(14.5, 1.5)), faults.latest_ms)
        else:
            arrival = ts + 500 + int(rng.expovariate(1 / 1500))
        arrives(arrival, value, fact, "late" if late else "")
        if rng.random() < faults.duplicated:
            arrives(arrival + rng.randrange(1, 240_000), value, None, "duplicate")
        if rng.random() < faults.bad:
            arrives(arrival, spoiled(rng, value), None, "bad")
