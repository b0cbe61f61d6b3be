"""Memory that runs out at any line of a step: the partition refuses every further one. Who swallowed the error does not matter then."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import pipeline
from pipeline.partition import Partition
from pipeline.steps import TornState
from tests.unit.test_partition import T0, changelog, event, flush, partition, run

OURS = str(Path(pipeline.__file__).parent)
TRIES = 150
Records = list[tuple[bytes | None, bytes | None]]


class MemoryRunsOut:
    """Raises MemoryError at the n-th line of the pipeline's that is executed."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __enter__(self) -> MemoryRunsOut:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, kind: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return self._line if name.startswith(OURS) and not name.endswith("steps.py") else None

    def _line(self, frame: FrameType, kind: str, argument: Any) -> Any:
        if kind == "line":
            self.left -= 1
            if self.left == 0:
                raise MemoryError
        return self._line


def lines_of(step: Callable[[], Any]) -> int:
    """How many lines of the pipeline's a step executes."""
    most = 1 << 60
    with MemoryRunsOut(most) as counting:
        step()
    return most - counting.left


def offer(subject: Partition) -> None:
    subject.offer(
        run(event(2, "add_to_cart", T0 + 9), event(3, "view_item", T0 + 3, "u2"), event(4, "view_item", T0 - 1, "u3"), event(5, "", -1))
    )


def after_a_flush() -> tuple[Partition, Records]:
    subject = partition()
    subject.offer(run(event(0, "view_item", T0), event(1, "add_to_cart", T0 + 5, "u2")))
    return subject, changelog(flush(subject))


def after_an_offer() -> Partition:
    subject, _ = after_a_flush()
    offer(subject)
    return subject


@cache
def records() -> Records:
    return after_a_flush()[1]


@pytest.mark.parametrize(
    ("ready", "step"),
    [
        pytest.param(lambda: after_a_flush()[0], offer, id="offer"),
        pytest.param(after_an_offer, Partition.snapshot, id="snapshot"),
        pytest.param(partition, lambda subject: subject.restore(records()), id="restore"),
    ],
)
def test_step_that_ran_out_of_memory_is_the_last_one(ready: Callable[[], Partition], step: Callable[[Partition], Any]) -> None:
    step(ready())  # kernels are compiled
    untouched = ready()
    lines = lines_of(lambda: step(untouched))
    assert lines > 50
    for at in range(1, lines + 1, max(1, lines // TRIES)):
        subject = ready()
        with pytest.raises(MemoryError), MemoryRunsOut(at):
            step(subject)
        for further in (offer, Partition.snapshot):
            with pytest.raises(TornState):
                further(subject)


def test_flush_that_was_never_committed_is_the_last_one() -> None:
    """A cancelled transaction whose delta is lost: the next delta would follow a hole."""
    subject = after_an_offer()
    assert subject.snapshot() is not None
    with pytest.raises(TornState, match="not committed"):
        subject.snapshot()
