"""No room for what a worker writes beside Kafka and the warehouse: its temporary folder and the compiled kernels. No state is in either."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cache import kernel_cache
from tests.faults import disk
from tests.faults.conftest import Build
from tests.faults.rig import Day


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    with disk.small(folder, 512):
        yield folder


def test_full_disk_under_a_worker_changes_nothing(build: Build, small_day: Day, small_disk: Path) -> None:
    """In the middle, and from the start once the kernels are compiled."""
    shutil.copytree(kernel_cache(), small_disk / "cache" / kernel_cache().name, dirs_exist_ok=True)
    rig = build(events=small_day, settings={"TMPDIR": str(small_disk), "SHOPSTREAM_CACHE": str(small_disk / "cache")})
    worker = rig.start()
    rig.produce_aside(0.6)
    rig.while_applying()
    disk.fill(small_disk)
    rig.produce_aside(0.8)
    rig.settle()
    worker.terminate()
    assert rig.exit_code(worker) == 0, rig.log
    rig.start()
    rig.produce_aside(1)
    rig.finish()


def test_kernels_that_can_not_be_kept_stop_the_worker_at_the_start(build: Build, small_day: Day, small_disk: Path) -> None:
    disk.fill(small_disk)
    rig = build(events=small_day)
    worker = rig.start(SHOPSTREAM_CACHE=str(small_disk))
    assert rig.exit_code(worker) == 1, rig.log
    assert f"compiled kernels can't be kept in {small_disk}" in rig.log.replace("\n", "")
    assert "SHOPSTREAM_CACHE" in rig.log
    assert "Traceback" not in rig.log
