"""Which partitions a worker stands by for."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipeline.streaming.standby import nearest


@pytest.mark.parametrize(
    ("own", "partitions", "most", "expected"),
    [
        ({0, 1}, 4, 4, {2, 3}),
        ({2, 3}, 4, 1, {1}),
        ({4, 5, 6, 7}, 12, 4, {2, 3, 8, 9}),
        ({4, 5, 6, 7}, 12, 0, set()),
        (set(), 4, 2, {0, 1}),
        ({0, 1, 2, 3}, 4, 4, set()),
    ],
)
def test_those_next_to_its_own_come_first(own: set[int], partitions: int, most: int, expected: set[int]) -> None:
    assert nearest(own, partitions, most) == expected


@pytest.mark.parametrize("workers", range(2, 8))
@pytest.mark.parametrize("partitions", [8, 12, 24])
def test_twice_its_share_covers_the_death_of_any_one_worker(workers: int, partitions: int) -> None:
    before = ranges(partitions, workers)
    for dead in range(workers):
        living = before[:dead] + before[dead + 1 :]
        for was, now in zip(living, ranges(partitions, workers - 1), strict=True):
            assert now - was <= nearest(was, partitions, 2 * -(-partitions // workers))


def ranges(partitions: int, workers: int) -> list[set[int]]:
    """As the range assignor cuts them: the first ones get one more."""
    least, more = divmod(partitions, workers)
    firsts = [i * least + min(i, more) for i in range(workers + 1)]
    return [set(range(a, b)) for a, b in pairwise(firsts)]
