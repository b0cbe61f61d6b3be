"""Random copies of events in random arrival order, with expiry and restores between: judged as by a list of everything accepted."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tables.seen import Seen

EXAMPLES = 300
START = 1_790_000_000_000


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.integers(0, 2**64))
def test_duplicates_are_those_a_full_list_knows(seed: int) -> None:
    r = random.Random(seed)
    window, lateness = r.choice((0, 1, 60_000, 600_000)), r.choice((0, 600_000, 86_400_000))
    span = r.choice((1, 4)) * (window + lateness + 120_000)
    ids = [r.getrandbits(64) | 1 for _ in range(r.choice((1, 5, 200)))] + [64, 128, 192]
    arrivals: list[tuple[int, int]] = []
    for _ in range(r.choice((5, 60, 400))):
        copied = r.choice(arrivals) if arrivals and r.random() < 0.5 else (r.choice(ids), START + r.randrange(span))
        arrivals.append((copied[0], copied[1] + r.choice((0, 0, window, -window, window + 1, -1))))
    r.shuffle(arrivals)
    arrivals.sort(key=lambda a: a[1] + r.randint(0, lateness))
    seen, accepted, at = Seen(window, lateness), list[tuple[int, int]](), 0
    while at < len(arrivals):
        batch = arrivals[at : at + r.choice((1, 7, 100))]
        at += len(batch)
        found = seen.duplicates(np.array([i for i, _ in batch], np.uint64), np.array([ts for _, ts in batch], np.int64))
        for (event_id, ts), duplicate in zip(batch, found.tolist(), strict=True):
            expected = any(i == event_id and abs(ts - t) <= window for i, t in accepted)
            assert duplicate == expected
            if not expected:
                accepted.append((event_id, ts))
        if at < len(arrivals) and r.random() < 0.5:
            seen.expire(min(ts for _, ts in arrivals[at:]))
        if r.random() < 0.2:
            state, seen = seen.dump(), Seen(window, lateness)
            seen.load(state)
