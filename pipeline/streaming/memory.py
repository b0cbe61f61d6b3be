"""How a worker's memory stays flat: what the collector and the allocator must be told by a process that lives for months.

`streaming.warm_up` calls `settle` at its end, `streaming.worker` runs `keep_small` beside Faust. Measured by `python -m tests.faults.soak`.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
from collections.abc import Callable

GC_THRESHOLDS = (100_000, 50, 1000)
"""A fetch makes 16,000 records a partition, none of them in a cycle: at Python's default of 700 the collector walks them again and again."""
SECONDS = 30.0


def settle() -> None:
    """What lives now lives for good; the collector hardly ever runs by itself from here on."""
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


async def keep_small(seconds: float = SECONDS) -> None:
    """For ever: collect the cycles that broken connections and cancelled tasks leave, and hand free pages back to the system.

    Arrays of some hundred kB come and go between small objects that stay, so glibc's heap would only grow: by 10 to 30 MiB within 30 s. About 10 ms a time.
    """
    while True:
        await asyncio.sleep(seconds)
        tidy()


def tidy() -> None:
    gc.collect()
    if _trim is not None:
        _trim(0)


def _find_trim() -> Callable[[int], int] | None:
    """glibc's; other C libraries have none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None


_trim = _find_trim()
