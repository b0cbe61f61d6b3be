"""The seed of a run: SHOPSTREAM_TEST_SEED, or the clock. Processes that a run starts inherit it, so that all of it is repeated with one number."""

from __future__ import annotations

import os
import time

SEED = int(os.environ.setdefault("SHOPSTREAM_TEST_SEED", str(time.time_ns() % 1_000_000_000)))
