"""Funnels by brute force, from the definitions alone: every attempt of a user is followed from its first event on.

In: plain events of one user. Out: the best attempt of each entry window. Called by property and unit tests.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from zoneinfo import ZoneInfo

from pipeline.definitions import Funnel


@dataclass(frozen=True)
class PlainEvent:
    ts: int
    event_id: int  # uint64
    steps: frozenset[int]  # 1-based steps it matches
    exclusions: frozenset[int]  # indices of the exclusions it matches
    segment: str = ""
    hold: str = ""
    topic: int = 0


@dataclass(frozen=True)
class Outcome:
    level: int
    duration: int
    start: int
    event_id: int
    segment: str


def window_start_of(ts: int, window: str, zone: str) -> int:
    """Start of the entry window that holds `ts`, by calendar arithmetic."""
    if window in ("1m", "1h"):
        size = 60_000 if window == "1m" else 3_600_000
        return ts - ts % size
    local = datetime.fromtimestamp(ts // 1000, ZoneInfo(zone)).date()
    if window == "1w":
        local -= timedelta(days=local.weekday())
    if window == "1mo":
        local = local.replace(day=1)
    return int(datetime(local.year, local.month, local.day, tzinfo=ZoneInfo(zone)).timestamp()) * 1000


def best_outcomes(funnel: Funnel, events: list[PlainEvent], zone: str, topics: frozenset[int]) -> dict[int, Outcome]:
    """Entry window start → the user's best attempt."""
    best: dict[int, Outcome] = {}
    for outcome in _outcomes(funnel, events, topics):
        window = window_start_of(outcome.start, funnel.entry_window, zone)
        if window not in best or _rank(outcome) < _rank(best[window]):
            best[window] = outcome
    return best


def _rank(o: Outcome) -> tuple[int, int, int, int]:
    return -o.level, o.duration, -o.start, o.event_id


def _outcomes(funnel: Funnel, events: list[PlainEvent], topics: frozenset[int]) -> list[Outcome]:
    if funnel.hold_constant:
        blank = [e for e in events if not e.hold]
        events = [e for e in events if e.hold] + [PlainEvent(e.ts, e.event_id, frozenset(), frozenset(), topic=e.topic) for e in blank]

    def sequence(e: PlainEvent) -> tuple[int, int, int]:
        rank = min(e.steps, default=99) if funnel.order == "strict" else 0
        return e.ts, rank, e.event_id

    events = sorted(events, key=sequence)
    follow = {"ordered": _ordered, "strict": _strict, "any": _any}[funnel.order]
    out = []
    for i, first in enumerate(events):
        if first.steps if funnel.order == "any" else 1 in first.steps:
            level, at = follow(funnel, events, i, topics)
            out.append(Outcome(level, at - first.ts, first.ts, first.event_id, first.segment if funnel.breakdown else ""))
    return out


def _excluded(funnel: Funnel, group: list[PlainEvent], first: PlainEvent, level: int) -> bool:
    return any(
        x.after <= level < x.before
        for e in group
        for i, x in enumerate(funnel.exclusions)
        if i in e.exclusions and (not funnel.hold_constant or e.hold == first.hold)
    )


def _window(funnel: Funnel, events: list[PlainEvent], i: int) -> list[tuple[int, list[PlainEvent]]]:
    """Groups of equal time from the first event's on to the end of its conversion window, the first event itself left out."""
    first = events[i]
    end = bisect_right(events, first.ts + funnel.conversion_ms, key=lambda e: e.ts)
    rest = events[bisect_left(events, first.ts, key=lambda e: e.ts) : i] + events[i + 1 : end]
    return [(ts, list(group)) for ts, group in groupby(rest, key=lambda e: e.ts)]


def _optional(funnel: Funnel, level: int, target: int) -> bool:
    return all(funnel.steps[s - 1].optional for s in range(level + 1, target))


def _ordered(funnel: Funnel, events: list[PlainEvent], i: int, topics: frozenset[int]) -> tuple[int, int]:
    first = events[i]
    level, at = 1, first.ts
    for ts, group in _window(funnel, events, i):
        if ts > first.ts and _excluded(funnel, group, first, level):
            break
        usable = [e for e in group if not funnel.hold_constant or e.hold == first.hold]
        for target in range(len(funnel.steps), level, -1):
            needed = [s for s in range(level + 1, target) if not funnel.steps[s - 1].optional] + [target]
            if _assign(needed, usable):
                level, at = target, ts
                break
    return level, at


def _assign(needed: list[int], events: list[PlainEvent]) -> bool:
    """Whether each needed step can have an event of its own: all assignments tried."""
    if not needed:
        return True
    return any(needed[0] in e.steps and _assign(needed[1:], events[:k] + events[k + 1 :]) for k, e in enumerate(events))


def _strict(funnel: Funnel, events: list[PlainEvent], i: int, topics: frozenset[int]) -> tuple[int, int]:
    first = events[i]
    level, at = 1, first.ts
    level_before_group, group_ts = 1, first.ts
    for e in events[i + 1 :]:
        if e.ts > first.ts + funnel.conversion_ms:
            break
        if e.ts != group_ts:
            group_ts, level_before_group = e.ts, level
            if _excluded(funnel, [x for x in events if x.ts == e.ts], first, level_before_group):
                break
        if e.topic not in topics and not e.steps:
            continue
        same = not funnel.hold_constant or e.hold == first.hold
        targets = [s for s in e.steps if s > level and _optional(funnel, level, s)] if same else []
        if not targets:
            break
        level, at = max(targets), e.ts
        if level == len(funnel.steps):
            break
    return level, at


def _any(funnel: Funnel, events: list[PlainEvent], i: int, topics: frozenset[int]) -> tuple[int, int]:
    first = events[i]
    done = {min(first.steps)}
    at = first.ts
    for ts, group in groupby(events[i + 1 :], key=lambda e: e.ts):
        members = list(group)
        if ts > first.ts + funnel.conversion_ms or (ts > first.ts and _excluded(funnel, members, first, len(done))):
            break
        for e in members:
            still = sorted(e.steps - done)
            if still and (not funnel.hold_constant or e.hold == first.hold):
                done.add(still[0])
                at = ts
    return len(done), at
