"""What is not needed any more goes back to the system."""

import asyncio
import gc
import subprocess
import sys
import weakref

from pipeline.streaming.memory import keep_small

HOLES = """
import psutil
import numpy as np
from pipeline.streaming.memory import tidy
rss = lambda: psutil.Process().memory_info().rss >> 20
arrays = [np.ones(12_000) for _ in range(2000)]  # 96 kB each, from the heap; the last one stays and keeps it up
last = arrays.pop()
before = rss()
arrays.clear()
freed = rss()
tidy()
print(before, freed, rss())
"""


def test_free_pages_of_the_heap_go_back_to_the_system() -> None:
    said = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, timeout=60, check=True).stdout
    before, freed, tidied = map(int, said.split())
    assert freed > before - 50, "the allocator gives them back by itself: `tidy` may be deleted"
    assert tidied < before - 150


async def test_cycles_are_collected_although_the_collector_rests() -> None:
    class Node:
        def __init__(self) -> None:
            self.me = self

    gc.disable()
    try:
        gone = weakref.ref(Node())
        assert gone() is not None
        task = asyncio.create_task(keep_small(0.01))
        await asyncio.sleep(0.1)
        assert gone() is None
        task.cancel()
    finally:
        gc.enable()
