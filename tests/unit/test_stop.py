"""A signal may come at any moment of a wait."""

from __future__ import annotations

import subprocess
import sys

SIGNALS = """
import random, signal, sys, time
from {module} import {name}
stop = {name}()
signal.signal(signal.SIGALRM, lambda *_: stop.set())
ends = time.monotonic() + 4
while time.monotonic() < ends:
    stop.__init__()
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 2e-4))
    while not stop.is_set():
        stop.wait(1e-5)
print("every signal was noticed")
"""


def test_a_signal_at_any_moment_of_a_wait_is_noticed() -> None:
    script = SIGNALS.format(module="pipeline.cli.stop", name="Stop")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "every signal was noticed\n", "")
