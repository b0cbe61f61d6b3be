"""Workers stopped and killed while they apply, at any moment and at the worst ones: every number equals SQL over the raw events."""

from __future__ import annotations

import os
import signal

import pytest

from tests.faults.conftest import Build


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_worker_ended_half_way_and_started_again(build: Build, how: signal.Signals) -> None:
    rig = build()
    worker = rig.start()
    rig.produce_aside(0.6)
    rig.while_applying()
    worker.send_signal(how)
    assert rig.exit_code(worker) == (0 if how == signal.SIGTERM else -signal.SIGKILL), rig.log
    rig.start()
    rig.produce_aside(1)
    rig.finish()


def test_workers_are_killed_every_few_seconds(build: Build) -> None:
    rig = build()
    workers = [rig.start(), rig.start()]
    for part in range(1, 5):
        rig.produce_aside(part / 5)
        rig.while_applying()
        victim = rig.random.randrange(2)
        workers[victim].kill()
        workers[victim] = rig.start()
    rig.produce_aside(1)
    rig.finish()


@pytest.mark.parametrize("point", ["before_commit", "after_commit", "before_insert", "after_insert"])
def test_worker_kills_itself_at(build: Build, point: str) -> None:
    rig = build()
    times = rig.random.randint(1, 3) if point.endswith("commit") else 1  # a fast worker needs no more than one insert for all of it
    worker = rig.start(SHOPSTREAM_FAULT=f"{point}:{times}")
    rig.produce(rig.random.uniform(0.2, 0.8))
    assert rig.exit_code(worker) == -signal.SIGKILL, rig.log
    rig.start()
    rig.produce_aside(1)
    rig.finish()


def test_worker_ended_in_a_transaction_finishes_it(build: Build) -> None:
    rig = build()
    worker = rig.start(SHOPSTREAM_FAULT=f"in_transaction:{rig.random.randint(1, 4)}:stop")
    rig.produce(0.6)
    rig.wait_until_frozen(worker)
    worker.terminate()
    worker.send_signal(signal.SIGCONT)
    assert rig.exit_code(worker) == 0, rig.log
    assert "its transaction failed" not in rig.log
    rig.start()
    rig.produce_aside(1)
    rig.finish()


def test_worker_kills_itself_during_restore(build: Build) -> None:
    rig = build()
    worker = rig.start()
    rig.produce_aside(0.6)
    rig.while_applying()
    worker.kill()
    for n in (1, 3):
        worker = rig.start(SHOPSTREAM_FAULT=f"restore:{n}")
        assert rig.exit_code(worker) == -signal.SIGKILL, rig.log
    rig.start()
    rig.produce_aside(1)
    rig.finish()


def test_fault_points_are_off_without_the_variable() -> None:
    assert "SHOPSTREAM_FAULT" not in os.environ
