"""A pipeline that tests scrape: a real Kafka and ClickHouse server, workers as processes with ports of their own, and a real Prometheus (Debian's)."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from embedded.kafka import EmbeddedKafka
from pipeline.definitions_file import DEFAULT_FILE, load
from pipeline.files import Keyed
from pipeline.replay import replay
from pipeline.sinks.catalog import install
from pipeline.sinks.open import open_warehouse
from pipeline.sinks.warehouse import SinkUnavailable
from pipeline.topic_names import Topics
from pipeline.topics import ensure_topics
from tests.clickhouse_server import ClickHouseServer, free_port

PARTITIONS = 2
START = "import sys; sys.argv = ['shopstream', 'worker']; from pipeline.cli.main import main; main()"

Labels = dict[str, str]


def get(url: str) -> tuple[int, str]:
    """Status and text; 0 when nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (urllib.error.URLError, OSError):
        return 0, ""


def until(done: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)
    return found


@dataclass
class Worker:
    """One process and its port."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> bool:
        return get(f"{self.url}/readyz")[0] == 200

    def partitions(self) -> set[str]:
        return set(json.loads(get(f"{self.url}/readyz")[1] or "{}").get("partitions", ()))

    def series(self) -> Iterator[tuple[str, Labels, float]]:
        """Name, labels and value of what it exposes now."""
        for family in text_string_to_metric_families(get(f"{self.url}/metrics")[1]):
            for sample in family.samples:
                yield sample.name, sample.labels, sample.value

    def value(self, name: str, **labels: str) -> float:
        """Sum of the series with these labels."""
        return sum(value for found, has, value in self.series() if found == name and labels.items() <= has.items())

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@dataclass
class Place:
    kafka: EmbeddedKafka
    server: ClickHouseServer
    warehouse: Any
    folder: Path

    def start(self, code: str = "", **settings: str) -> Worker:
        """A worker; `code` runs in it beforehand."""
        port = int(settings.get("SHOPSTREAM_METRICS_PORT", free_port()))
        environment = os.environ | {
            "SHOPSTREAM_BROKER": self.kafka.bootstrap,
            "SHOPSTREAM_WAREHOUSE": self.server.url(user="default"),
            "SHOPSTREAM_WAREHOUSE_PASSWORD": self.server.password,
            "SHOPSTREAM_DEFINITIONS": str(DEFAULT_FILE),
            "SHOPSTREAM_IDLE_SECONDS": "1",
            "SHOPSTREAM_SESSION_SECONDS": "6",
            "SHOPSTREAM_METRICS_PORT": str(port),
            **settings,
        }
        with (self.folder / "worker.log").open("ab") as log:
            return Worker(subprocess.Popen([sys.executable, "-c", f"{code}\n{START}"], env=environment, stdout=log, stderr=log), port)

    @property
    def log(self) -> str:
        return (self.folder / "worker.log").read_text(errors="replace")

    def ends(self) -> dict[tuple[str, int], int]:
        consumer = KafkaConsumer(bootstrap_servers=[self.kafka.bootstrap])
        found = consumer.end_offsets([TopicPartition(t, p) for t in Topics().sources for p in range(PARTITIONS)])
        consumer.close()
        return {(tp.topic, tp.partition): end for tp, end in found.items()}

    def applied(self) -> bool:
        """Whether the warehouse has heard of everything that is in the topics."""
        try:
            rows = self.warehouse.query('SELECT topic, "partition", argMax(next_offset, version) FROM progress GROUP BY topic, "partition"')
        except SinkUnavailable:  # it was just started again
            return False
        reached = {(topic, int(p)): int(offset) for topic, p, offset in rows}
        return all(reached.get(tp, 0) >= end for tp, end in self.ends().items())

    def produce(self, messages: list[Keyed]) -> None:
        names = {"clickstream": "clickstream", "orders": "orders"}
        asyncio.run(replay({"bootstrap_servers": self.kafka.bootstrap}, messages, names, PARTITIONS, lambda *_: None))

    def largest(self) -> int:
        """Largest event time that the warehouse knows, ms."""
        return int(self.warehouse.query("SELECT largest FROM watermarks")[0][0])


@contextmanager
def pipeline(folder: Path, kafka: EmbeddedKafka, server: ClickHouseServer) -> Iterator[Place]:
    """Topics and a migrated warehouse on what runs already."""
    warehouse = open_warehouse(server.url(user="default"), server.password)
    warehouse.migrate()
    install(warehouse, load(None), 1)
    ensure_topics({"bootstrap_servers": [kafka.bootstrap]}, Topics(), PARTITIONS)
    yield Place(kafka, server, warehouse, folder)
    warehouse.close()


@dataclass
class Prometheus:
    url: str

    def all(self, query: str) -> dict[tuple[str, ...], float]:
        """Values by label values, in the order of the labels' names; without those that Prometheus adds."""
        body = get(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}")[1]
        series = json.loads(body)["data"]["result"] if body else []
        return {
            tuple(v for k, v in sorted(s["metric"].items()) if k not in ("__name__", "instance", "job")): float(s["value"][1])
            for s in series
        }

    def one(self, query: str) -> float:
        return self.all(query).get((), -1.0)


@contextmanager
def prometheus_of(folder: Path, ports: list[int]) -> Iterator[Prometheus]:
    """One that scrapes these ports every second; skips the test, in CI fails it, where none is installed."""
    if shutil.which("prometheus") is None:
        told = "prometheus is not installed: apt-get install prometheus"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(told)
    config = folder / "prometheus.yml"
    targets = ", ".join(f"'127.0.0.1:{port}'" for port in ports)
    config.write_text(
        f"global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: shopstream\n  static_configs:\n  - targets: [{targets}]\n"
    )
    port = free_port()
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: get(f"{url}/-/ready")[0] == 200, 20, "Prometheus is ready")
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait(20)
