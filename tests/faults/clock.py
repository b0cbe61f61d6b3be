"""A worker whose wall clock is wrong: `python -m tests.faults.clock worker`, WRONG_CLOCK=3600,-3600 (seconds ahead; SIGUSR2 goes on to the next).

The clock is Python's `time.time`, which the worker and its clients read; what must not depend on it reads the monotonic one.
"""

from __future__ import annotations

import os
import signal
import time

VARIABLE = "WRONG_CLOCK"


def go_wrong(ahead: list[float]) -> None:
    """From now on in this process."""
    right, right_ns = time.time, time.time_ns
    time.time = lambda: right() + ahead[0]
    time.time_ns = lambda: right_ns() + int(ahead[0] * 1e9)
    signal.signal(signal.SIGUSR2, lambda *_: ahead.append(ahead.pop(0)))


if __name__ == "__main__":
    go_wrong([float(seconds) for seconds in os.environ[VARIABLE].split(",")])
    from pipeline.cli.main import main

    main()
