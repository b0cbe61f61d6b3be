"""Steps that leave their object changed wholly or not used again: what fails half way (out of memory, a bug) may be swallowed by whoever called it.

`pipeline.partition` marks its steps; an asynchronous runtime has many places that log an exception and go on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class TornState(Exception):
    """An earlier step failed half way. Going on would make wrong numbers, so the process ends; a restart is exact."""


class Stepping(Protocol):
    torn: str  # the step that failed half way, '' while the state is whole


S = TypeVar("S", bound=Stepping)


def step(*unchanged: type[Exception]) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Marks a method that changes the state; exceptions in `unchanged` are raised before it has changed anything. Raises TornState after any other."""

    def mark(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        def taken(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            if self.torn:
                raise TornState(f"{self.torn} failed half way before: the state in memory is not used any more")
            self.torn = method.__name__
            try:
                result = method(self, *args, **kwargs)
            except unchanged:
                self.torn = ""
                raise
            self.torn = ""
            return result

        update_wrapper(taken, method)
        return taken

    return mark
