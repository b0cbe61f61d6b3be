"""The real thing: files through Kafka, Faust workers and ClickHouse, workers killed at random moments; every number against SQL.

Once with the command and the embedded warehouse, once with workers of our own and a ClickHouse server over TCP.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

from embedded.kafka import EmbeddedKafka
from pipeline.definitions_file import DEFAULT_FILE, load
from pipeline.files import Keyed
from pipeline.replay import replay
from pipeline.sinks.catalog import install
from pipeline.sinks.embedded import EmbeddedWarehouse
from pipeline.sinks.open import open_warehouse
from pipeline.topic_names import Topics
from pipeline.topics import ensure_topics
from tests import clickhouse_server
from tests.integration.driving import reported, same
from tests.oracle import shops
from tests.oracle.sql import Oracle
from tests.seed import SEED

Truth = tuple[dict[Any, int], dict[Any, Any], dict[Any, Any]]
PARTITIONS = 4
COPIES = 0.05


@pytest.fixture(scope="module")
def messages() -> list[Keyed]:
    """Three weeks of a shop, 5% of it twice."""
    r = random.Random(SEED)
    once = [Keyed(m.topic, m.key.decode(), m.value) for m in shops.generated()]
    return [copy for message in once for copy in ([message] * (2 if r.random() < COPIES else 1))]


@pytest.fixture(scope="module")
def truth(messages: list[Keyed]) -> Truth:
    warehouse = EmbeddedWarehouse("")
    try:
        oracle = Oracle(warehouse.query, load(None), [(m.topic, m.value) for m in dict.fromkeys(messages)])
        return oracle.funnels(), oracle.retentions(), oracle.kpis()
    finally:
        warehouse.close()


def equal(warehouse: Any, truth: Truth) -> None:
    for kind, found, wanted in zip(("funnel_report", "retention_report", "kpi_report"), reported(warehouse), truth, strict=True):
        assert wanted
        same(f"{kind} (SHOPSTREAM_TEST_SEED={SEED})", found, wanted)


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent == process.pid and b"pipeline.cli.main\0worker" in command:
            found.append(int(entry.name))
    return found


def test_run_with_workers_killed_equals_sql(tmp_path: Path, messages: list[Keyed], truth: Truth) -> None:
    for topic in ("clickstream", "orders"):
        (tmp_path / f"{topic}.ndjson").write_bytes(b"\n".join(m.value for m in messages if m.topic == topic))
    r = random.Random(SEED)
    command = [sys.executable, "-m", "pipeline.cli.main", "run", "--clickstream", str(tmp_path / "clickstream.ndjson")]
    command += ["--orders", str(tmp_path / "orders.ndjson"), "--warehouse", str(tmp_path / "warehouse"), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    killed = 0
    while process.poll() is None and killed < 3:
        time.sleep(r.uniform(1, 6))
        for pid in r.sample(found := workers_of(process), min(1, len(found))):
            os.kill(pid, 9)
            killed += 1
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    assert killed
    assert f"read {len(messages):,}" in " ".join(output.decode().split())
    warehouse = EmbeddedWarehouse(str(tmp_path / "warehouse"))
    try:
        equal(warehouse, truth)
    finally:
        warehouse.close()


@pytest.fixture
def kafka() -> Iterator[str]:
    with EmbeddedKafka(quiet=True) as broker:
        yield broker.bootstrap


def test_server_warehouse_survives_kills_of_workers(kafka: str, tmp_path: Path, messages: list[Keyed], truth: Truth) -> None:
    clickhouse_server.require()
    r = random.Random(SEED + 1)
    topics = Topics(app_id="faults")
    client = {"bootstrap_servers": [kafka]}
    ensure_topics(client, topics, PARTITIONS)
    with clickhouse_server.ClickHouseServer() as server:
        url = server.url(user="default")
        warehouse = open_warehouse(url, server.password)
        warehouse.migrate()
        install(warehouse, load(None), 1)
        environment = os.environ | {
            "SHOPSTREAM_BROKER": kafka,
            "SHOPSTREAM_APP_ID": topics.app_id,
            "SHOPSTREAM_WAREHOUSE": url,
            "SHOPSTREAM_WAREHOUSE_PASSWORD": server.password,
            "SHOPSTREAM_DEFINITIONS": str(DEFAULT_FILE),
            "SHOPSTREAM_IDLE_SECONDS": "0",
            "SHOPSTREAM_METRICS_PORT": "0",
            "SHOPSTREAM_SESSION_SECONDS": "6",
        }

        def start() -> subprocess.Popen[bytes]:
            with (tmp_path / "worker.log").open("ab") as log:
                return subprocess.Popen([sys.executable, "-m", "pipeline.cli.main", "worker"], env=environment, stdout=log, stderr=log)

        workers = [start(), start()]
        try:
            targets = {"clickstream": topics.clickstream, "orders": topics.orders}
            third = len(messages) // 3 + 1
            for part in range(3):
                asyncio.run(replay(client, messages[part * third : (part + 1) * third], targets, PARTITIONS, lambda *_: None))
                time.sleep(r.uniform(0.5, 6))
                victim = r.randrange(2)
                workers[victim].send_signal(r.choice((9, 15)))
                workers[victim].wait(90)
                workers[victim] = start()
            wait_until_applied(kafka, topics, warehouse, tmp_path / "worker.log")
            for worker in workers:
                worker.terminate()
            for worker in workers:  # one may still have been starting
                assert worker.wait(90) in (0, -15), (tmp_path / "worker.log").read_text()[-3000:]
            equal(warehouse, truth)
        finally:
            for worker in workers:
                worker.kill()
            warehouse.close()


def wait_until_applied(kafka: str, topics: Topics, warehouse: Any, log: Path) -> None:
    consumer = KafkaConsumer(bootstrap_servers=[kafka])
    ends = consumer.end_offsets([TopicPartition(t, p) for t in (topics.clickstream, topics.orders) for p in range(PARTITIONS)])
    consumer.close()
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        rows = warehouse.query('SELECT topic, "partition", argMax(next_offset, version) FROM progress GROUP BY topic, "partition"')
        done = {(topic, int(p)): int(offset) for topic, p, offset in rows}
        if all(done.get((tp.topic, tp.partition), 0) >= end for tp, end in ends.items()):
            return
        time.sleep(0.3)
    pytest.fail(f"not applied within 180 s (SHOPSTREAM_TEST_SEED={SEED}): {done} of {ends}\n{log.read_text()[-3000:]}")
