"""What takes long to make and is the same for all processes of a test run: the first that needs it makes it, the others read it.

In: pytest's `tmp_path_factory`, a name, what makes it. Out: what was made, pickled in the run's own temporary folder in between.
"""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from typing import TypeVar

import pytest

Made = TypeVar("Made")


def once(temporary: pytest.TempPathFactory, name: str, make: Callable[[], Made]) -> Made:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make()
    path = temporary.getbasetemp().parent / f"{name}.pickle"  # of the run, not of this process
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            made: Made = pickle.loads(path.read_bytes())
            return made
        made = make()
        part = path.with_suffix(".part")
        part.write_bytes(pickle.dumps(made, pickle.HIGHEST_PROTOCOL))
        part.rename(path)
        return made
