"""For every test: Ctrl-C means what it says, also where the suite was started in the background and its processes would inherit that it is ignored.

And the run's seed is made before the processes are that share its work.
"""

from __future__ import annotations

import signal

import pytest

from tests.seed import SEED

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"SHOPSTREAM_TEST_SEED={SEED}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Kernels are compiled before this run divides itself: its processes would all do it, half a minute of a core each."""
    if session.config.getoption("numprocesses", None):
        from pipeline.definitions_file import load
        from pipeline.streaming.warm_up import warm_up

        warm_up(load(None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The simulation begins first: it takes longest, and whoever begins it last waits for it alone."""
    items.sort(key=lambda item: "tests/simulation/" not in item.nodeid)
