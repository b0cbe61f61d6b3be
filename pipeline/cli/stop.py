"""A wish to end that a signal handler may set at any moment, also while the thread that it interrupts waits for it. `pipeline.cli.demo` has one."""

from __future__ import annotations

import time


class Stop:
    """Not a `threading.Event`: that takes a lock to wait and to be set, and a handler that interrupts the one waits for ever in the other."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, seconds: float) -> None:
        """The whole time, unless it is set already: for short waits."""
        if not self._set:
            time.sleep(seconds)
