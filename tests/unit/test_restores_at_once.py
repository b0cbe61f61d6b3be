"""Partitions are restored in threads, several at a time: the first restores of a process, too."""

from __future__ import annotations

import subprocess
import sys

FIRST_USE = """
import sys, threading, time
from pipeline.definitions_file import load
from pipeline.partition import Partition

partition = Partition(0, 1, load())
partition.skip("clickstream", 1)
records = [(r.key, r.value) for r in partition.snapshot().records]

def slowly(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "get_class_annotations":  # msgspec learns of a type
        time.sleep(0.05)

def restore(after, done):
    time.sleep(after)
    again = Partition(0, 1, load())
    again.restore(records)
    done.append(again.positions)

done = []
threading.setprofile(slowly)
threads = [threading.Thread(target=restore, args=(after, done)) for after in (0, 0.08, 0.2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(0 if done == [{"clickstream": 1}] * 3 else 1)
"""


def test_first_restores_of_a_process_run_beside_each_other() -> None:
    """It died with SIGSEGV in msgspec, see `decode_position`."""
    ended = subprocess.run([sys.executable, "-c", FIRST_USE], check=False, timeout=120, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
