"""The network between a worker and Kafka cut, slow, or torn again and again. The numbers stay exact."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from embedded.kafka import EmbeddedKafka, Place, free_ports
from tests.faults.conftest import Build
from tests.faults.proxy import Proxy
from tests.faults.rig import PARTITIONS, SESSION_SECONDS, Rig

LATENCY_SECONDS = 0.2
RESETS_SECONDS = 20


@dataclass
class Far:
    """A broker with two doors: `near` for the test and for workers that nothing hurts, `far` behind the proxy."""

    near: str
    proxy: Proxy

    @property
    def far(self) -> str:
        return f"127.0.0.1:{self.proxy.port}"


@pytest.fixture(scope="module")
def far() -> Iterator[Far]:
    port, door, controller = free_ports(3)
    with Proxy(door) as proxy:
        more = {
            "listeners": f"PLAINTEXT://127.0.0.1:{port},FAR://127.0.0.1:{door},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port},FAR://127.0.0.1:{proxy.port}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,FAR:PLAINTEXT",
        }
        with EmbeddedKafka(quiet=True, place=Place(1, port, {1: controller}, more)) as broker:
            yield Far(broker.bootstrap, proxy)


def take_overs(rig: Rig) -> int:
    return rig.log.count("taken over at")


def test_worker_cut_off_for_longer_than_its_session_changes_nothing_afterwards(build: Build, far: Far) -> None:
    """The other one takes its partitions over meanwhile; then all that the cut one had sent arrives."""
    rig = build(bootstrap=far.near)
    cut = rig.start(SHOPSTREAM_BROKER=far.far)
    rig.start()
    rig.produce_aside(0.6)
    for number in range(2):
        rig.wait_until_owned(number)
    rig.while_applying(20_000)
    before = take_overs(rig)
    far.proxy.hold()
    try:
        rig.produce_aside(0.8)
        rig.until(lambda: take_overs(rig) > before, SESSION_SECONDS + 30, "the other one takes over")
        rig.while_applying(1000)
    finally:
        far.proxy.release()
    rig.produce_aside(1)
    rig.settle()
    assert cut.poll() is None, "it rejoins the group, it does not end\n" + rig.log
    rig.stop_workers()
    rig.check()


def test_connections_that_are_dead_without_a_word(build: Build, far: Far) -> None:
    """Nobody hangs up, nothing arrives: each request must have a time limit of its own."""
    rig = build(bootstrap=far.near)
    workers = [rig.start(SHOPSTREAM_BROKER=far.far), rig.start(SHOPSTREAM_BROKER=far.far)]
    rig.produce_aside(0.6)
    rig.while_applying()
    far.proxy.forget()
    rig.produce_aside(1)
    rig.finish(lived=workers)


def test_slow_network_costs_time_only(build: Build, far: Far) -> None:
    rig = build(bootstrap=far.near)
    far.proxy.delay_seconds = LATENCY_SECONDS
    try:
        worker = rig.start(SHOPSTREAM_BROKER=far.far)
        rig.wait_until_owned(0, PARTITIONS)
        rig.produce(1)
        rig.settle()
        assert worker.poll() is None, rig.log
        rig.stop_workers()
    finally:
        far.proxy.delay_seconds = 0.0
    rig.check()
    assert take_overs(rig) == PARTITIONS, "no rebalance, no failed transaction\n" + rig.log


def test_connections_reset_again_and_again(build: Build, far: Far) -> None:
    rig = build(bootstrap=far.near)
    workers = [rig.start(SHOPSTREAM_BROKER=far.far), rig.start(SHOPSTREAM_BROKER=far.far)]
    rig.produce_aside(0.3)
    rig.while_applying()
    over = time.monotonic() + RESETS_SECONDS
    while (left := over - time.monotonic()) > 0:
        rig.produce_aside(0.9 - 0.6 * left / RESETS_SECONDS)
        time.sleep(rig.random.expovariate(1.0))
        far.proxy.cut_all()
    rig.produce_aside(1)
    rig.finish(lived=workers)
