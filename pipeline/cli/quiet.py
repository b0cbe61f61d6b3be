"""A log that can be read during an outage: a library's complaint stands in it once in a while, not at every attempt of every client of aiokafka's (4,000 lines
a minute). The worker's handlers have it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

QUIET_SECONDS = 30.0


@dataclass(slots=True)
class OnceInAWhile(logging.Filter):
    """Lets a warning or error of these loggers through once in `seconds`; the next one says how many were left out.

    Those are alike whose logger and text are the same before the arguments are put in.
    """

    prefixes: tuple[str, ...]
    seconds: float = QUIET_SECONDS
    clock: Callable[[], float] = time.monotonic
    _seen: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # by logger and text: when it last came through, how many since

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(self.prefixes) or record.levelno < logging.WARNING:
            return True
        now = self.clock()
        told = self._seen.setdefault((record.name, str(record.msg)), [-self.seconds, 0])
        if now - told[0] < self.seconds:
            told[1] += 1
            return False
        if told[1]:
            record.msg = f"{record.msg} ({told[1]:.0f} more like it)"
        told[0], told[1] = now, 0
        return True
