"""Points at which a test can have a worker kill itself: SHOPSTREAM_FAULT=name:n ends it (SIGKILL) when it reaches `name` for the n-th time.

Names: before_commit, after_commit, before_insert, after_insert, restore. In production a point costs one comparison of strings.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "SHOPSTREAM_FAULT"
_name, _, _times = os.environ.get(VARIABLE, "").partition(":")
_left = int(_times or 1)


def reach(name: str) -> None:
    """The worker is at `name`."""
    global _left
    if name == _name:
        _left -= 1
        if _left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
