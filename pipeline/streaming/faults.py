"""Points at which a test can have a worker hurt itself: SHOPSTREAM_FAULT=name:n kills it (SIGKILL) when it reaches `name` for the n-th time, name:n:stop
freezes it there (SIGSTOP) until it is sent SIGCONT.

Names: before_commit, in_transaction (every record acknowledged, the end not asked for), after_commit, before_insert, after_insert, restore. In
production a point costs one comparison of strings.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "SHOPSTREAM_FAULT"
_name, _times, _how = [*os.environ.get(VARIABLE, "").split(":"), "", ""][:3]
_left = int(_times or 1)


def reach(name: str) -> None:
    """The worker is at `name`."""
    global _left
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGSTOP if _how == "stop" else signal.SIGKILL)
