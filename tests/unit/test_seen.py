"""Deduplication, fact by fact."""

from __future__ import annotations

import numpy as np

from pipeline.tables.seen import Seen

MINUTE, DAY = 60_000, 86_400_000
NOW = 1_790_000_000_000


def _judge(seen: Seen, *events: tuple[int, int]) -> list[bool]:
    ids, ts = zip(*events, strict=True)
    return seen.duplicates(np.array(ids, np.uint64), np.array(ts, np.int64)).tolist()


def test_copy_is_a_duplicate_in_its_batch_and_later() -> None:
    seen = Seen(10 * MINUTE, DAY)
    assert _judge(seen, (7, NOW), (8, NOW), (7, NOW)) == [False, False, True]
    assert _judge(seen, (8, NOW + 5)) == [True]


def test_window_includes_its_edge_both_ways() -> None:
    seen = Seen(10 * MINUTE, DAY)
    assert _judge(seen, (7, NOW), (7, NOW + 10 * MINUTE), (7, NOW - 10 * MINUTE)) == [False, True, True]
    assert _judge(seen, (7, NOW + 10 * MINUTE + 1), (7, NOW - 10 * MINUTE - 1)) == [False, False]


def test_duplicate_does_not_stretch_the_window() -> None:
    seen = Seen(10 * MINUTE, DAY)
    assert _judge(seen, (7, NOW), (7, NOW + 6 * MINUTE), (7, NOW + 12 * MINUTE)) == [False, True, False]


def test_exact_copy_is_recognised_until_it_is_too_late() -> None:
    seen = Seen(10 * MINUTE, DAY)
    _judge(seen, (7, NOW))
    seen.expire(NOW)
    assert _judge(seen, (7, NOW)) == [True]


def test_what_no_copy_can_follow_is_forgotten() -> None:
    seen = Seen(10 * MINUTE, DAY)
    _judge(seen, (7, NOW))
    seen.expire(NOW + 10 * MINUTE + seen.slice_ms)
    assert len(seen) == 0


def test_restored_memory_judges_alike() -> None:
    seen, restored = Seen(10 * MINUTE, DAY), Seen(10 * MINUTE, DAY)
    ids = np.arange(1, 5000, dtype=np.uint64) << np.uint64(32)
    ts = np.full(len(ids), NOW)
    seen.remember(ids, ts)
    restored.load(seen.dump())
    assert restored.duplicates(ids, ts).all()
    assert len(restored) == len(ids)
