"""`shopstream rebuild` beside live workers: one instant shows all new numbers, each equals SQL over the raw events, and every dead letter is sent once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from kafka import KafkaAdminClient

from pipeline.sinks.open import open_warehouse
from pipeline.sinks.revisions import in_force
from tests.faults.conftest import Build
from tests.faults.rig import DEFINITIONS, PARTITIONS, SEED, Day, Rig, day_of, make_day

NEW_FUNNEL = """
[[funnel]]
name = "from_search"
conversion_window = "1d"
[[funnel.step]]
event = "search"
[[funnel.step]]
event = "purchase"
"""
CHANGED = DEFINITIONS + NEW_FUNNEL


@pytest.fixture(scope="module")
def some_day() -> Day:
    return make_day(SEED, users=1500)


def rebuild(rig: Rig, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline.cli.main", "rebuild", *(arguments or ("--from", "earliest"))]
    return subprocess.Popen(command, env=rig.environment(COLUMNS="300"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str], code: int = 0, seconds: float = 120) -> str:
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, said
    return said


@contextmanager
def watched(rig: Rig) -> Iterator[list[dict[str, int]]]:
    """What readers see all the time: users of each funnel's first step, and the events applied."""
    seen: list[dict[str, int]] = []
    over = threading.Event()
    reader = open_warehouse(rig.url, rig.server.password)

    def read() -> None:
        while not over.wait(0.02):
            rows = reader.query("SELECT funnel, sum(users) FROM funnel_report WHERE step = 1 GROUP BY funnel")
            applied = reader.query("SELECT sum(applied) FROM current_progress")
            seen.append({str(name): int(users) for name, users in rows} | {"": int(applied[0][0])})

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        reader.close()


def test_new_definitions_are_computed_beside_live_workers_and_swapped_in(build: Build, some_day: Day) -> None:
    rig = build(events=some_day)
    rig.start()
    rig.start()
    rig.produce(0.5)
    rig.settle()
    rig.definitions = CHANGED
    _ = rig.definitions_file
    with watched(rig) as seen:
        rig.produce_aside(0.8)
        began = time.monotonic()
        said = ended(rebuild(rig))
        print(said, f"{time.monotonic() - began:.1f} s")
        rig.produce_aside(1)
        rig.settle()
    assert in_force(rig.warehouse) == 1
    names = [set(row) for row in seen]
    assert all(names[0] <= more for more in names), "no report lost a name"
    assert "from_search" in names[-1] - names[0]
    for name in names[0]:
        for before, after in zip(seen, seen[1:], strict=False):
            assert before[name] * 0.98 <= after[name] <= seen[-1][name], (name, before, after)
    assert all(worker.poll() is None for worker in rig.workers), rig.log
    rig.stop_workers()
    rig.day = day_of(some_day.messages, definitions=CHANGED)
    rig.check()
    assert rig.log.count("going over to the revision in force") == 2
    print(ended(rebuild(rig, "--drop-old")))
    rig.until(lambda: len(rig.warehouse.query("SELECT DISTINCT revision FROM progress")) == 1, 30, "old rows are deleted")
    rig.check()
