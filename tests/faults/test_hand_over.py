"""How long a killed worker's partitions stand still, until the other one's rows of them are in the warehouse; and that every number is right afterwards."""

from __future__ import annotations

import time

import pytest

from tests.faults.conftest import Build
from tests.faults.rig import PARTITIONS, Rig

BUSY = 3.0
"""CI machines are shared and slow: what must hold on a quiet one times this. The measured seconds are printed."""


def newest_versions(rig: Rig) -> dict[int, int]:
    rows = rig.warehouse.query('SELECT "partition", max(version) FROM progress GROUP BY "partition"')
    return {int(number): int(version) for number, version in rows}


def hand_over(rig: Rig) -> float:
    """Seconds from the SIGKILL of one of two workers under load until every partition has rows that were inserted after it."""
    workers = [rig.start(), rig.start()]
    rig.produce(0.3)
    rig.wait_until_owned(0, PARTITIONS // 2)
    rig.wait_until_owned(1, PARTITIONS // 2)
    rig.settle()
    rig.produce_steadily(0.9, seconds=25)
    rig.while_applying(5000)
    workers[rig.random.randrange(2)].kill()
    killed = time.monotonic()
    time.sleep(1)  # for inserts on their way
    before = newest_versions(rig)
    assert len(before) == PARTITIONS
    rig.until(lambda: all(version > before[number] for number, version in newest_versions(rig).items()), 60, "rows of every partition")
    return time.monotonic() - killed


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [({"SHOPSTREAM_SESSION_SECONDS": "10"}, 15.0), ({"SHOPSTREAM_SESSION_SECONDS": "3", "SHOPSTREAM_STANDBY_PARTITIONS": "4"}, 5.0)],
    ids=["default", "standby"],
)
def test_killed_workers_partitions_are_live_on_the_other(build: Build, settings: dict[str, str], seconds: float) -> None:
    rig = build(settings=settings)
    took = hand_over(rig)
    print(f"live on the other worker {took:.1f} s after the kill")
    assert took < seconds * BUSY
    rig.produce_aside(1)
    rig.finish()
    assert ("a standby and" in rig.log) == ("SHOPSTREAM_STANDBY_PARTITIONS" in settings)
