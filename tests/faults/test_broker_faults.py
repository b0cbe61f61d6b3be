"""The broker away, killed, with a full disk or not there yet: workers wait for it and go on exactly. Never stuck, never a flood in the log."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedded.kafka import EmbeddedKafka
from tests.clickhouse_server import free_port
from tests.faults import disk
from tests.faults.conftest import Build


@pytest.mark.parametrize("seconds", [2, 62])  # 62: longer than everything that waits a minute
def test_broker_killed_and_started_again(build: Build, fragile_broker: EmbeddedKafka, seconds: int) -> None:
    rig = build(bootstrap=fragile_broker.bootstrap)
    port = free_port()
    workers = [rig.start(SHOPSTREAM_METRICS_PORT=str(port), SHOPSTREAM_STUCK_SECONDS="8"), rig.start()]
    rig.produce(0.6)
    rig.while_applying()
    fragile_broker.kill()
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        time.sleep(2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            assert answer.status == 200, "an outage is not being stuck"
    rig.bring_back(fragile_broker)
    rig.produce_aside(1)
    rig.finish(lived=workers)
    assert rig.log.count("\n") < 600, "an outage does not flood the log"


def test_worker_ended_while_the_broker_is_away(build: Build, fragile_broker: EmbeddedKafka) -> None:
    rig = build(bootstrap=fragile_broker.bootstrap)
    worker = rig.start()
    rig.produce(0.6)
    rig.while_applying()
    fragile_broker.kill()
    time.sleep(1)
    worker.terminate()
    assert rig.exit_code(worker) == 0, rig.log
    rig.bring_back(fragile_broker)
    rig.start()
    rig.produce_aside(1)
    rig.finish()


@pytest.fixture
def on_a_small_disk(tmp_path: Path) -> Iterator[EmbeddedKafka]:
    """A broker whose log has a file system of 256 MiB to itself."""
    logs = tmp_path / "kafka" / "logs"
    logs.mkdir(parents=True)
    with disk.small(logs, 256), EmbeddedKafka(tmp_path / "kafka", quiet=True) as broker:
        yield broker


def test_full_disk_of_the_broker_ends_it_and_nothing_else(build: Build, on_a_small_disk: EmbeddedKafka) -> None:
    rig = build(bootstrap=on_a_small_disk.bootstrap)
    rig.produce(0.6)
    workers = [rig.start(), rig.start()]
    rig.while_applying()
    ballast = disk.fill(on_a_small_disk.folder / "logs")
    rig.until(lambda: not on_a_small_disk.runs, 60, "the broker ends itself")
    ballast.unlink()
    rig.bring_back(on_a_small_disk)
    rig.produce_aside(1)
    rig.finish(lived=workers)


def test_broker_is_not_there_yet(build: Build, fragile_broker: EmbeddedKafka) -> None:
    rig = build(bootstrap=fragile_broker.bootstrap)
    fragile_broker.kill()
    rig.start()
    rig.until(lambda: "can't be reached, trying again" in rig.log, 60, "the worker says what it waits for")
    rig.bring_back(fragile_broker)
    rig.produce(1)
    rig.finish()
