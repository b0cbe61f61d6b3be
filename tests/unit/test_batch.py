"""A batch grouped by user, whatever its spans of time and users."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tables.table import _by_user_and_time


@pytest.mark.parametrize("users", [1, 5, 1 << 30])
@pytest.mark.parametrize("span_ms", [0, 1000, 1 << 41])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1 << 32), n=st.integers(0, 300))
def test_rows_come_by_user_and_time_and_equal_ones_as_they_arrived(users: int, span_ms: int, seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, n).astype(np.int32)
    ts = 1_700_000_000_000 + rng.integers(0, span_ms + 1, n)
    assert _by_user_and_time(user, ts, users).tolist() == np.lexsort((ts, user)).tolist()
