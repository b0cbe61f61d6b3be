"""Whole numbers by series and window, eight bytes each: what `generator.answers` keeps of what is over, however long the shop goes on."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

Series = TypeVar("Series", bound=Hashable)


class Tally(Generic[Series]):
    """Sums. A window is its number since the epoch; each series reaches from its first window to its last. 0 is no number, and is not told."""

    def __init__(self) -> None:
        self._first: dict[Series, int] = {}
        self._sums: dict[Series, array[int]] = {}

    def add(self, series: Series, window: int, number: int = 1) -> None:
        first, sums = self._first.setdefault(series, window), self._sums.setdefault(series, array("q"))
        if window < first:
            self._sums[series] = sums = array("q", bytes(8 * (first - window))) + sums
            self._first[series] = first = window
        if window >= first + len(sums):
            sums.frombytes(bytes(8 * (window + 1 - first - len(sums))))
        sums[window - first] += number

    def update(self, cells: Iterable[tuple[Series, int]]) -> None:
        for series, window in cells:
            self.add(series, window)

    def __iter__(self) -> Iterator[tuple[Series, int, int]]:
        """(series, window, sum)."""
        for series, sums in self._sums.items():
            for window, number in enumerate(sums, self._first[series]):
                if number:
                    yield series, window, number
