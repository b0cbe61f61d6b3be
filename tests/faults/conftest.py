"""One Kafka, one ClickHouse server and one known day for all cases; each case gets a pipeline of its own on them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embedded.cluster import EmbeddedCluster
from embedded.kafka import EmbeddedKafka
from pipeline.definitions_file import loads
from pipeline.streaming.warm_up import warm_up
from tests import clickhouse_server
from tests.clickhouse_server import ClickHouseServer
from tests.faults.rig import DEFINITIONS, Day, Rig, make_day
from tests.once import once
from tests.seed import SEED

Build = Callable[..., Rig]


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Compiled before the first case's time runs: that takes a minute, once."""
    warm_up(loads(DEFINITIONS))


@pytest.fixture(scope="session")
def kafka() -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka(quiet=True) as broker:
        yield broker


@pytest.fixture
def fragile_broker(tmp_path: Path) -> Iterator[EmbeddedKafka]:
    """A broker of the case's own, whose data outlive it."""
    with EmbeddedKafka(tmp_path / "kafka", quiet=True) as broker:
        yield broker


@pytest.fixture(scope="session")
def cluster() -> Iterator[EmbeddedCluster]:
    """A frozen broker is out of the replicas in sync after 3 s, long before the others lead in its place (9 s).

    A coordinator whose own log has too few replicas in sync for a moment tries again after request.timeout.ms (30 s by default).
    """
    with EmbeddedCluster(quiet=True, more={"replica.lag.time.max.ms": "2000", "request.timeout.ms": "5000"}) as three:
        yield three


@pytest.fixture(scope="session")
def server() -> Iterator[ClickHouseServer]:
    clickhouse_server.require()
    with ClickHouseServer() as running:
        yield running


@pytest.fixture(scope="session")
def day(tmp_path_factory: pytest.TempPathFactory) -> Day:
    return once(tmp_path_factory, "day", lambda: make_day(SEED))


@pytest.fixture(scope="session")
def small_day(tmp_path_factory: pytest.TempPathFactory) -> Day:
    """For cases in which something else than events takes the time."""
    return once(tmp_path_factory, "small-day", lambda: make_day(SEED, users=1500))


@pytest.fixture
def build(request: pytest.FixtureRequest, server: ClickHouseServer, tmp_path: Path) -> Iterator[Build]:
    """A pipeline named after the case; on the shared broker and server unless told otherwise."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:60]
    built: list[Rig] = []

    def make(
        bootstrap: str | None = None,
        clickhouse: ClickHouseServer | None = None,
        prepare: bool = True,
        events: Day | None = None,
        **more: object,
    ) -> Rig:
        day = events or request.getfixturevalue("day")
        address = bootstrap or request.getfixturevalue("kafka").bootstrap
        rig = Rig(address, clickhouse or server, day, tmp_path, f"{name}-{len(built)}", **more)  # type: ignore[arg-type]
        built.append(rig)
        if prepare:
            rig.prepare()
        return rig

    yield make
    for rig in built:
        rig.close()
