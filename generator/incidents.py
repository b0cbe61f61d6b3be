"""When something is broken in the shop: payments fail, or pages do. `generator.visits` asks how likely each is at a moment of event time."""

from __future__ import annotations

import random
from typing import NamedTuple, Protocol

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
PAYMENT_SUCCEEDS = 0.93
PAGE_FAILS = 0.01
DAYS_WITH_INCIDENT = 0.3


class Conditions(Protocol):
    """Probabilities at the event time `ts` (ms)."""

    def payment_succeeds(self, ts: int) -> float: ...

    def page_fails(self, ts: int) -> float:
        """Of each item's page that is looked at."""
        ...


class Calm:
    """Nothing is ever broken beyond the usual."""

    def payment_succeeds(self, ts: int) -> float:
        return PAYMENT_SUCCEEDS

    def page_fails(self, ts: int) -> float:
        return PAGE_FAILS


CALM = Calm()


class Incident(NamedTuple):
    """`kind` is `payments` (most attempts fail) or `pages` (every third item's page fails); [start_ms, end_ms)."""

    kind: str
    start_ms: int
    end_ms: int


class Incidents:
    """Every third day or so an incident of two to five hours by daylight, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._days: dict[int, Incident | None] = {}

    def at(self, ts: int) -> Incident | None:
        """The incident that is going on at `ts`."""
        day = ts // DAY_MS
        if day not in self._days:
            self._days = {d: i for d, i in self._days.items() if d > day - 40} | {day: self._draw(day)}
        incident = self._days[day]
        return incident if incident and incident.start_ms <= ts < incident.end_ms else None

    def _draw(self, day: int) -> Incident | None:
        rng = random.Random(f"incident {self._seed} {day}")  # noqa: S311 repeatable, not secret
        if rng.random() > DAYS_WITH_INCIDENT:
            return None
        start = day * DAY_MS + int(rng.uniform(9, 18) * HOUR_MS)
        return Incident(rng.choice(("payments", "pages")), start, start + int(rng.uniform(2, 5) * HOUR_MS))

    def payment_succeeds(self, ts: int) -> float:
        incident = self.at(ts)
        return 0.3 if incident and incident.kind == "payments" else PAYMENT_SUCCEEDS

    def page_fails(self, ts: int) -> float:
        incident = self.at(ts)
        return 0.33 if incident and incident.kind == "pages" else PAGE_FAILS
