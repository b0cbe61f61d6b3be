"""Workers that run out of memory: refused by the system at a random moment, wherever that is. They end; a restart with memory is exact.

Killed for memory by the kernel is SIGKILL, see test_worker_faults.
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
import time
from pathlib import Path

from tests.faults.conftest import Build
from tests.faults.rig import Rig

ROUNDS = 3
END_SECONDS = 10.0
PIECE = 1 << 18
NO_RESERVE = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}
"""So that the system is asked for every array: what a worker has freed since its start would last it for the whole day."""


def refuse_memory(rig: Rig, worker: subprocess.Popen[bytes]) -> None:
    """From now on the worker gets a MiB or two more, or nothing."""
    pages = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[0])
    more = rig.random.randrange(8) * PIECE
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + more, resource.RLIM_INFINITY))


def test_memory_is_refused_at_a_random_moment(build: Build) -> None:
    """While it restores, applies, flushes or inserts: the worker ends with a clear word, or needs no more than it has.

    Or zstandard crashes, which does not ask everywhere whether it got what it wanted (python-zstandard issue 298).
    """
    rig = build(may_crash=True)
    rig.produce(0.5)
    codes: list[int | None] = []
    for number in range(ROUNDS):
        worker = rig.start(**NO_RESERVE)
        said = rig.folder / f"worker-{number:02d}.log"
        rig.until(lambda said=said: "started on" in said.read_text(), 60, "the worker has started")  # type: ignore[misc]
        time.sleep(rig.random.uniform(0, 2))
        refuse_memory(rig, worker)
        rig.produce(0.5 + 0.4 * (number + 1) / ROUNDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(END_SECONDS)
        codes.append(worker.poll())
        worker.kill()
        worker.wait()
    assert 0 not in codes, rig.log
    assert codes.count(None) < ROUNDS, rig.log
    assert "CRITICAL" in rig.log
    rig.start()
    rig.produce(1)
    rig.finish()
