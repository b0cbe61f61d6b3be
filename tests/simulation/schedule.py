"""Draws a schedule from a seed, runs it, and makes a failing one small. Called by the tests and by `python -m tests.simulation`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

from tests.simulation.case import Case, draw_case
from tests.simulation.check import check
from tests.simulation.worker import Worker
from tests.simulation.world import IN_PART, NOT_DONE, REPLIED, REPLY_LOST, STILL_ON_ITS_WAY, Step, World

OUTCOMES = (REPLIED,) * 12 + (REPLY_LOST, NOT_DONE, STILL_ON_ITS_WAY, IN_PART)
WEIGHTS = {
    "go": 40, "read": 14, "produce": 6, "flush": 9, "feed": 8, "fetch": 2, "offer": 3, "look": 3, "mark": 5, "land": 2,
    "start": 4, "crash": 1.5, "sleep": 1, "wake": 2, "hold": 0.7, "assign": 1, "time_out": 0.5, "idle": 1,
}  # fmt: skip


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
    steps: list[Step] = []
    world = World(case, *breakage)
    order = tuple(random.sample(range(3), 3))
    try:
        length = random.randint(20, 120)
        kinds = random.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()), k=3 * length)
        for kind in kinds:
            step = _draw_step(random, world, kind)
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


def _draw_step(random: Random, world: World, kind: str) -> Step | None:
    """A step of this kind that looks possible."""
    case = world.case
    worker, number = random.randrange(case.workers), random.randrange(case.partitions)
    match kind:
        case "go":
            waiting = [(w, *key) for w, found in enumerate(world.workers) if found is not None and not found.asleep for key in found.tasks]
            return ("go", *random.choice(waiting), random.choice(OUTCOMES), random.randrange(5)) if waiting else None
        case "produce":
            return "produce", random.randint(1, 6)
        case "read" | "fetch":
            return kind, worker, number, random.randrange(3), random.choice((1, 3, 100))
        case "offer" | "look":
            return kind, worker, number, random.randrange(3)
        case "idle":
            return kind, worker, number, random.randrange(2), random.random() < 0.5
        case "start" | "assign":
            return kind, worker, random.choice((1, 2, 3, 3)) if case.partitions > 1 else 1
        case "flush":
            return kind, worker, number
        case "mark" | "time_out":
            return kind, number
        case "land":
            return kind, random.randrange(4)
        case _:
            return kind, worker


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
        if error is None or type(error) is not type(failure.error):
            return False
        best = Failure(schedule, error)
        return True

    before = None
    while before != best.schedule:
        before = best.schedule
        for name in ("steps", "records"):
            _leave_out(name, best.schedule, fails)
    return best


def _leave_out(name: str, schedule: Schedule, fails: object) -> None:
    items = schedule.steps if name == "steps" else schedule.case.records
    size = max(1, len(items) // 2)
    while size:
        at = 0
        while at < len(items):
            fewer = (*items[:at], *items[at + size :])
            tried = replace(schedule, steps=fewer) if name == "steps" else replace(schedule, case=replace(schedule.case, records=fewer))
            if fails(tried):  # type: ignore[operator]
                schedule, items = tried, fewer
            else:
                at += size
        size //= 2


def failures_of(seeds: Iterable[int], breakage: Breakage = SOUND) -> list[tuple[int, str]]:
    """(seed, what went wrong) of those that fail: what a process of a pool runs."""
    return [(seed, str(failure)) for seed in seeds if (failure := simulate(seed, breakage)) is not None]
