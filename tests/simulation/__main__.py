"""`python -m tests.simulation`: many schedules over some processes with a progress bar, or one seed step by step, made small."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.simulation.case import TOPICS, Case
from tests.simulation.mutations import MUTATIONS
from tests.simulation.schedule import SOUND, Breakage, Failure, failures_of, run, shrink, simulate
from tests.simulation.world import Step

CHUNK = 250
LINE = 2500  # schedules between two lines where there is no terminal for a bar
OUTCOMES = ("replied", "done, reply lost", "not done", "no reply yet, may be done later", "insert done in part, no reply")
console = Console(highlight=False)


def chunks(seed: int, schedules: int) -> Iterator[range]:
    """The seeds from `seed` on, so many at a time as a process takes."""
    for at in range(seed, seed + schedules, CHUNK):
        yield range(at, min(at + CHUNK, seed + schedules))


def simulate_many(
    seed: int, schedules: int, processes: int, progress: Progress | None = None, most: int = 20
) -> tuple[int, list[tuple[int, str]]]:
    """How many schedules ran, and (seed, what went wrong) of those that failed; ends early after `most` failures."""
    task = progress.add_task("schedules", total=schedules) if progress else None
    failed: list[tuple[int, str]] = []
    done, todo = 0, chunks(seed, schedules)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        running: dict[Future[list[tuple[int, str]]], int] = {}
        while len(failed) < most:
            while len(running) < 2 * processes and (seeds := next(todo, None)) is not None:
                running[pool.submit(failures_of, seeds)] = len(seeds)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                count = running.pop(future)
                done += count
                failed += future.result()
                if progress and task is not None:
                    progress.update(task, advance=count, description=f"schedules, {len(failed)} failed")
                    if not console.is_terminal and done % LINE == 0:
                        console.print(f"{done:,} of {schedules:,} schedules, {len(failed)} failed")
        pool.shutdown(cancel_futures=True)
    return done, failed


def main(
    schedules: Annotated[int, typer.Option(help="How many schedules to run.")] = 20_000,
    processes: Annotated[int, typer.Option(help="Processes to run them in.")] = os.cpu_count() or 1,
    seed: Annotated[int | None, typer.Option(help="The first seed; alone, without --schedules, the one schedule to replay.")] = None,
    broken: Annotated[str, typer.Option(help="Replay with the protocol broken: a part of the name of a mutation.")] = "",
    replay: Annotated[bool, typer.Option(help="Show the schedule of --seed step by step, and what is left of it when it fails.")] = False,
) -> None:
    """Simulate the protocol of a partition. Ends with 1 when a schedule fails."""
    if replay:
        breakage = next((b for name, b in MUTATIONS.items() if broken and broken in name), SOUND)
        raise typer.Exit(_replay(seed or 0, breakage))
    first = seed if seed is not None else time.time_ns() % 1_000_000_000
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns, console=console) as progress:
        done, failed = simulate_many(first, schedules, processes, progress)
    took = time.monotonic() - started
    console.print(f"{done:,} schedules from seed {first} in {took:.0f} s ({1000 * took / max(done, 1):.1f} ms each), {len(failed)} failed")
    for at, message in failed:
        console.print(f"[red]--seed {at} --replay[/red]: {message}", soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


def _replay(seed: int, breakage: Breakage) -> int:
    failure = simulate(seed, breakage)
    if failure is None:
        console.print(f"seed {seed}: everything is right in the end")
        return 0
    steps, records = len(failure.schedule.steps), len(failure.schedule.case.records)
    console.print(f"seed {seed}: {failure}\n{steps} steps, {records} records; leaving out what is not needed", soft_wrap=True)
    small = shrink(failure, breakage)
    show(small, breakage)
    return 1


def show(failure: Failure, breakage: Breakage) -> None:
    """A failing schedule, step by step."""
    case = failure.schedule.case
    show_case(case)
    shown: list[tuple[Step, bool]] = []
    error = run(failure.schedule, breakage, shown)
    for number, (step, possible) in enumerate(shown, 1):
        console.print(f"{number:4} {worded(step)}{'' if possible else '  (not possible)'}")
    console.print(f"     recovery, topics read in the order {[TOPICS.sources[i] for i in failure.schedule.order]}")
    console.print(f"[red]{type(error).__name__}: {error}[/red]", soft_wrap=True)


def show_case(case: Case) -> None:
    console.print(
        f"{case.partitions} partitions, {case.workers} workers, {len(case.definitions.kpis)} KPIs, snapshot after {case.snapshot_bytes} bytes, "
        f"parts of {case.part_bytes} bytes, {case.send_at_once} records at once{', evicting' if case.evict else ''}{', late events' if case.late else ''}",
        soft_wrap=True,
    )
    for record in case.records:
        console.print(f"     {record.topic}[{record.partition}] {record.body or record.value}", soft_wrap=True)


def worded(step: Step) -> str:
    """A step in words."""
    kind, *arguments = step
    match kind:
        case "go":
            worker, task, number, outcome, part = arguments
            in_part = f" ({part} tables)" if outcome == 4 else ""
            return f"worker {worker}: {task} {number if number >= 0 else ''} goes on: {OUTCOMES[outcome]}{in_part}"
        case "read" | "fetch" | "offer" | "look" | "idle":
            worker, number, topic, *rest = arguments
            return f"worker {worker}: {kind} {TOPICS.sources[topic]}[{number}] {rest or ''}"
        case "start" | "assign":
            return f"worker {arguments[0]}: {kind} with partitions {[n for n in range(8) if arguments[1] >> n & 1]}"
        case "produce" | "mark" | "time_out" | "land":
            return f"{kind} {arguments[0]}"
        case _:
            return f"worker {arguments[0]}: {kind} {arguments[1] if len(arguments) > 1 else ''}"


if __name__ == "__main__":
    typer.run(main)
