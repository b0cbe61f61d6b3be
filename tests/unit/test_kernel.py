"""The compiled primitives against the libraries and rules they repeat."""

from __future__ import annotations

import numpy as np
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.partitioner.default import murmur2

from pipeline.tables.hashes import hash64, murmur2_partitions, text_rows
from pipeline.tables.kernel import (
    HISTOGRAM_UPPER,
    Arena,
    Cells,
    UserIndex,
    arena_give,
    arena_take,
    block_class,
    block_words,
    cells_add,
    cells_room,
    histogram_bucket,
    jit,
)

TEXTS = st.lists(st.text(max_size=80), min_size=1, max_size=30)


@settings(deadline=None, max_examples=200)
@given(TEXTS)
def test_hash64_is_xxhash64(texts: list[str]) -> None:
    data, ends = text_rows(texts)
    out = np.empty(len(texts), np.uint64)
    hash64(data, ends, out)
    assert out.tolist() == [xxhash.xxh64_intdigest(text.encode()) if text else 0 for text in texts]


@settings(deadline=None, max_examples=200)
@given(TEXTS, st.integers(1, 64))
def test_partitions_are_kafkas(texts: list[str], partitions: int) -> None:
    data, ends = text_rows(texts)
    out = np.empty(len(texts), np.int32)
    murmur2_partitions(data, ends, partitions, out)
    assert out.tolist() == [(murmur2(text.encode()) & 0x7FFFFFFF) % partitions for text in texts]


@jit
def _add_all(cells, keys, deltas, start):  # type: ignore[no-untyped-def]
    for i in range(start, len(deltas)):
        if not cells_room(cells, 1):
            return i
        cells_add(cells, keys[i, 0], keys[i, 1], keys[i, 2], deltas[i])
    return len(deltas)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3), st.integers(0, 3), st.integers(-5, 5)), min_size=1, max_size=400))
def test_cells_add_up_through_growth_dump_and_eviction(adds: list[tuple[int, int, int, int]]) -> None:
    cells = Cells(4)
    keys = np.array([add[:3] for add in adds], np.int64)
    deltas = np.array([add[3] for add in adds], np.int64)
    done = 0
    while (done := _add_all(cells.arrays, keys, deltas, done)) < len(adds):
        cells.grow(1)
    expected: dict[tuple[int, ...], int] = {}
    for *key, delta in adds:
        expected[tuple(key)] = expected.get(tuple(key), 0) + delta
    cells.stamp(7)
    loaded = Cells()
    loaded.load(cells.dump())
    for one in (cells, loaded):
        n = len(one)
        assert {tuple(k): v for k, v in zip(one.arrays.keys[:n].tolist(), one.arrays.values[:n].tolist(), strict=True)} == expected
    assert len(cells.above(6)) == len(expected)
    assert len(cells.above(7)) == 0
    keep = loaded.arrays.values[: len(loaded)] > 0
    loaded.keep(keep)
    assert sorted(loaded.arrays.values[: len(loaded)].tolist()) == sorted(v for v in expected.values() if v > 0)


def test_users_keep_their_index_through_growth_and_reload() -> None:
    hashes = np.random.default_rng(1).integers(0, 2**63, (5000, 2)).astype(np.uint64)
    users = UserIndex()
    assert users.resolve(hashes).tolist() == list(range(5000))
    reloaded = UserIndex(users.dump().copy())
    assert reloaded.resolve(hashes[::-1].copy()).tolist() == list(range(4999, -1, -1))


def test_arena_reuses_a_block_given_back() -> None:
    arena = Arena(64)
    size = block_class(5)
    assert block_words(size) >= 5
    first = arena_take(arena.arrays, size)
    arena_give(arena.arrays, first, size)
    assert arena_take(arena.arrays, size) == first
    while arena_take(arena.arrays, size) >= 0:
        pass
    arena.grow(10)
    assert arena_take(arena.arrays, size) >= 0


def test_histogram_bucket_is_the_first_whose_upper_bound_is_not_below() -> None:
    for ms in [0, 1, 2, 3, 1000, 86_400_000, int(HISTOGRAM_UPPER[-1]), 2**62]:
        expected = min(int(np.searchsorted(HISTOGRAM_UPPER, ms)), len(HISTOGRAM_UPPER) - 1)
        assert histogram_bucket(HISTOGRAM_UPPER, ms) == expected
