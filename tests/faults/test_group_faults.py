"""Workers that share the partitions join, leave, freeze, die and disagree about the time: the others take over, and every number equals SQL."""

from __future__ import annotations

import re
import signal
import time

import pytest

from tests.faults.conftest import Build
from tests.faults.rig import PARTITIONS, SESSION_SECONDS

STANDBYS = ["0", str(PARTITIONS)]


def test_one_of_two_workers_is_killed_and_the_other_goes_on_alone(build: Build) -> None:
    rig = build()
    workers = [rig.start(), rig.start()]
    rig.produce_aside(0.6)
    rig.while_applying(20_000)
    workers[rig.random.randrange(2)].kill()
    rig.produce_aside(1)
    rig.finish()


@pytest.mark.parametrize("standbys", STANDBYS)
def test_frozen_worker_wakes_as_a_zombie_and_changes_nothing(build: Build, standbys: str) -> None:
    rig = build(settings={"SHOPSTREAM_STANDBY_PARTITIONS": standbys})
    frozen = rig.start()
    rig.start()
    rig.produce_aside(0.6)
    rig.while_applying(20_000, everywhere=True)  # a standby of what has written nothing is not worth to be taken over
    frozen.send_signal(signal.SIGSTOP)
    rig.produce_aside(0.8)
    rig.while_applying(1000)
    time.sleep(SESSION_SECONDS + 2)
    frozen.send_signal(signal.SIGCONT)
    rig.produce_aside(1)
    rig.settle()
    assert frozen.poll() is None, "a zombie rejoins the group, it does not end\n" + rig.log
    rig.stop_workers()
    rig.check()
    assert ("a standby and" in rig.log) == (standbys != "0")


@pytest.mark.parametrize("standbys", STANDBYS)
def test_workers_join_and_leave(build: Build, standbys: str) -> None:
    rig = build(settings={"SHOPSTREAM_STANDBY_PARTITIONS": standbys})
    first = rig.start()
    rig.produce_aside(0.3)
    rig.while_applying()
    second = rig.start()
    rig.produce_aside(0.5)
    rig.wait_until_owned(1)
    third = rig.start()
    rig.produce_aside(0.8)
    rig.wait_until_owned(2)
    for leaving in (first, second):
        leaving.terminate()
        assert rig.exit_code(leaving) == 0, rig.log
    rig.produce_aside(1)
    rig.settle()
    assert third.poll() is None, rig.log
    rig.stop_workers()
    rig.check()
    assert "CRITICAL" not in rig.log
    assert ("a standby and" in rig.log) == (standbys != "0")
    assert "thrown away" not in rig.log


def test_rolling_restart(build: Build) -> None:
    rig = build()
    workers = [rig.start(), rig.start()]
    for i in range(2):
        rig.produce_aside((i + 1) * 0.4)
        rig.while_applying()
        workers[i].terminate()
        assert rig.exit_code(workers[i]) == 0, rig.log
        workers.append(rig.start())
        rig.wait_until_owned(len(workers) - 1)
    rig.produce_aside(1)
    rig.finish()
    assert "CRITICAL" not in rig.log


def test_workers_whose_clocks_differ_and_jump_by_hours(build: Build) -> None:
    rig = build()
    clocks = "tests.faults.clock"
    ahead = rig.start(clocks, WRONG_CLOCK="3600,-3600")
    behind = rig.start(clocks, WRONG_CLOCK="-3600,3600")
    for share in (0.2, 0.4, 0.6):
        rig.produce_aside(share)
        rig.while_applying()
        for worker in (ahead, behind):
            worker.send_signal(signal.SIGUSR2)
    ahead.kill()
    rig.produce_aside(0.8)
    rig.while_applying()
    rig.start()  # this one's clock is right
    rig.wait_until_owned(2)
    rig.produce_aside(1)
    rig.settle()
    assert behind.poll() is None, rig.log
    rig.stop_workers()
    rig.check()
    told = {when[:13] for when in re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d", rig.log, re.MULTILINE)}
    assert len(told) >= 3, "three clocks, an hour and two apart"
    assert "CRITICAL" not in rig.log
