"""Draws a schedule from a seed, runs it, and makes a failing one small. Called by the tests and by `python -m tests.simulation`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random
from typing import NamedTuple

from tests.simulation.case import Case, draw_case
from tests.simulation.check import Wrong, check
from tests.simulation.worker import Worker
from tests.simulation.world import IN_PART, NOT_DONE, REPLIED, REPLY_LOST, STILL_ON_ITS_WAY, Step, World

WEIGHTS = {
    "go": 36, "read": 14, "produce": 4, "flush": 9, "feed": 5, "fetch": 2, "offer": 3, "look": 2, "mark": 2, "land": 1.5,
    "start": 4, "crash": 0.8, "sleep": 0.7, "wake": 1.5, "hold": 0.4, "assign": 1.2, "time_out": 0.2, "idle": 1, "follow": 8,
}  # fmt: skip
KINDS, HEAVY = tuple(WEIGHTS), tuple(accumulate(WEIGHTS.values()))
DRAWS_A_STEP = 3  # most draws are not possible at the moment
TROUBLE = (0.02, 0.1, 0.3)
"""Share of requests that do not simply succeed; one of these a schedule."""


LATE_DELETION = 0.5
"""The same of deletions: they are carried out beside everything else, so they often meet the next owner's restore."""


class Breakage(NamedTuple):
    """What is broken on purpose."""

    worker: type[Worker] = Worker
    fences: bool = True


SOUND = Breakage()


@dataclass(frozen=True, slots=True)
class Schedule:
    """A case, its steps, and in which order the last worker reads the topics. Runs the same way every time."""

    case: Case
    steps: tuple[Step, ...]
    order: tuple[int, ...]


class Failure(NamedTuple):
    schedule: Schedule
    error: Exception

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


def simulate(seed: int, breakage: Breakage = SOUND) -> Failure | None:
    """Draw the schedule of `seed` while running it; None when everything is right in the end."""
    random = Random(seed)
    case = draw_case(random)
    order, trouble = tuple(random.sample(range(3), 3)), random.choice(TROUBLE)
    steps: list[Step] = []
    world = World(case, *breakage)
    try:
        length = random.randint(30, 140)
        kinds = ["produce", "start", *random.choices(KINDS, cum_weights=HEAVY, k=DRAWS_A_STEP * length)]
        for kind in kinds:
            step = _draw_step(random, world, kind, trouble)
            if step is None:
                continue
            steps.append(step)
            if not world.apply(step):
                steps.pop()
            elif len(steps) == length:
                break
        check(world, world.finish(order))
    except Exception as error:
        return Failure(Schedule(case, tuple(steps), order), error)
    return None


def _draw_step(random: Random, world: World, kind: str, trouble: float) -> Step | None:
    """A step of this kind, drawn among those that look possible."""
    case = world.case
    match kind:
        case "go":
            waiting = [(w, *key) for w, found in enumerate(world.workers) if found is not None and not found.asleep for key in found.tasks]
            if not waiting:
                return None
            task = random.choice(waiting)
            smooth = random.random() >= (LATE_DELETION if task[1] == "delete" else trouble)
            outcome = REPLIED if smooth else random.choice((REPLY_LOST, NOT_DONE, STILL_ON_ITS_WAY, IN_PART))
            return "go", *task, outcome, random.randrange(5)
        case "produce":
            return "produce", random.randint(1, 6)
        case "start":
            dead = [w for w, found in enumerate(world.workers) if found is None]
            return ("start", random.choice(dead), random.choice((1, 2, 3, 3, 3)) & (2**case.partitions - 1)) if dead else None
        case "assign":
            alive = [(w, found) for w, found in enumerate(world.workers) if found is not None and not found.asleep]
            if not alive:
                return None
            worker, found = random.choice(alive)
            wanted = sum(1 << number for number in found.wanted)
            return "assign", worker, wanted ^ random.choice((0, 1, 2)) & (2**case.partitions - 1)
        case "mark" | "time_out":
            return kind, random.randrange(case.partitions)
        case "follow":
            others = [(w, n) for w, found in enumerate(world.workers) if found for n in range(case.partitions) if n not in found.owned]
            return (kind, *random.choice(others), random.choice((1, 3, 100))) if others else None
        case "land":
            return (kind, random.randrange(4)) if world.flights else None
        case "read" | "fetch" | "offer" | "look" | "idle" | "flush":
            owned = [(w, n) for w, found in enumerate(world.workers) if found is not None and not found.asleep for n in found.owned]
            return (kind, *random.choice(owned), *_details(random, kind)) if owned else None
        case _:
            return kind, random.randrange(case.workers)


def _details(random: Random, kind: str) -> tuple[int, ...]:
    match kind:
        case "read" | "fetch":
            return random.choice((0, 0, 0, 1, 1, 2)), random.choice((1, 1, 3, 100))
        case "offer" | "look":
            return (random.choice((0, 0, 0, 1, 1, 2)),)
        case "idle":
            return random.randrange(2), random.randrange(2)
        case _:
            return ()


def run(schedule: Schedule, breakage: Breakage = SOUND, shown: list[tuple[Step, bool]] | None = None) -> Exception | None:
    """Run a schedule again; what went wrong. `shown` gets every step and whether it was possible."""
    try:
        world = World(schedule.case, *breakage)
        for step in schedule.steps:
            if shown is not None:
                shown.append((step, True))
            possible = world.apply(step)
            if shown is not None:
                shown[-1] = (step, possible)
        check(world, world.finish(schedule.order))
    except Exception as error:
        return error
    return None


def shrink(failure: Failure, breakage: Breakage = SOUND, tries: int = 3000) -> Failure:
    """Leave out steps and records, many at a time and then one by one, as long as it still fails in the same way."""
    left = [tries]
    best = failure

    def fails(schedule: Schedule) -> bool:
        nonlocal best
        if left[0] <= 0:
            return False
        left[0] -= 1
        error = run(schedule, breakage)
        if error is None or _manner(error) != _manner(failure.error):
            return False
        best = Failure(schedule, error)
        return True

    before = None
    while before != best.schedule:
        before = best.schedule
        for name in ("steps", "records"):
            _leave_out(name, best.schedule, fails)
    return best


def _manner(error: Exception) -> str:
    """Wrong numbers are wrong numbers; of an exception the words count, not the numbers in it."""
    words = "" if isinstance(error, Wrong) else re.sub(r"[^a-z ]+", "", str(error))
    return type(error).__name__ + words


def _leave_out(name: str, schedule: Schedule, fails: Callable[[Schedule], bool]) -> None:
    items = schedule.steps if name == "steps" else schedule.case.records
    size = max(1, len(items) // 2)
    while size:
        at = 0
        while at < len(items):
            fewer = (*items[:at], *items[at + size :])
            tried = replace(schedule, steps=fewer) if name == "steps" else replace(schedule, case=replace(schedule.case, records=fewer))
            if fails(tried):
                schedule, items = tried, fewer
            else:
                at += size
        size //= 2


def failures_of(seeds: Iterable[int], breakage: Breakage = SOUND) -> list[tuple[int, str]]:
    """(seed, what went wrong) of those that fail: what a process of a pool runs."""
    return [(seed, str(failure)) for seed in seeds if (failure := simulate(seed, breakage)) is not None]
