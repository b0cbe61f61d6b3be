"""A real worker on a real Kafka, scraped by a real Prometheus: every count is what the warehouse says. And the watchdog fires only when it should."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

from embedded.kafka import EmbeddedKafka
from pipeline.definitions_file import DEFAULT_FILE, load
from pipeline.replay import replay
from pipeline.sinks.catalog import install
from pipeline.sinks.embedded import EmbeddedWarehouse
from pipeline.sinks.shared import new_key, serve
from pipeline.topic_names import Topics
from pipeline.topics import ensure_topics
from tests.sample_warehouse import sample_records

PARTITIONS = 2
QUICK = "import pipeline.streaming.watchdog as w; w.Watchdog.__init__.__defaults__ = (1.0, *w.Watchdog.__init__.__defaults__[1:]);"
START = "import sys; sys.argv = ['shopstream', 'worker']; from pipeline.cli.main import main; main()"
STAND_STILL = """
from pipeline.streaming.owner import Owner
async def offer(self, run): pass
Owner.offer = offer
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        time.sleep(0.2)
    return found


@dataclass
class Place:
    kafka: EmbeddedKafka
    warehouse: Any
    environment: dict[str, str]
    folder: Path

    def start(self, code: str = "", **settings: str) -> subprocess.Popen[bytes]:
        environment = self.environment | settings
        with (self.folder / "worker.log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-c", QUICK + code + "\n" + START], env=environment, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return (self.folder / "worker.log").read_text(errors="replace")

    def ends(self) -> dict[tuple[str, int], int]:
        consumer = KafkaConsumer(bootstrap_servers=[self.kafka.bootstrap])
        found = consumer.end_offsets([TopicPartition(t, p) for t in Topics().sources for p in range(PARTITIONS)])
        consumer.close()
        return {(tp.topic, tp.partition): end for tp, end in found.items()}

    def applied(self) -> bool:
        rows = self.warehouse.query('SELECT topic, "partition", argMax(next_offset, version) FROM progress GROUP BY topic, "partition"')
        reached = {(topic, int(p)): int(offset) for topic, p, offset in rows}
        return all(reached.get(tp, 0) >= end for tp, end in self.ends().items())

    def produce(self, messages: list[Any]) -> None:
        names = {"clickstream": "clickstream", "orders": "orders"}
        asyncio.run(replay({"bootstrap_servers": self.kafka.bootstrap}, messages, names, PARTITIONS, lambda *_: None))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("metrics")
    warehouse = EmbeddedWarehouse("")
    warehouse.migrate()
    install(warehouse, load(None), 1)
    key = new_key()
    with EmbeddedKafka(folder / "kafka", quiet=True) as kafka, serve(warehouse, authkey=key.encode()) as server:
        ensure_topics({"bootstrap_servers": [kafka.bootstrap]}, Topics(), PARTITIONS)
        environment = os.environ | {
            "SHOPSTREAM_BROKER": kafka.bootstrap,
            "SHOPSTREAM_WAREHOUSE": server.url,
            "SHOPSTREAM_WAREHOUSE_KEY": key,
            "SHOPSTREAM_DEFINITIONS": str(DEFAULT_FILE),
            "SHOPSTREAM_IDLE_SECONDS": "1",
            "SHOPSTREAM_SESSION_SECONDS": "6",
            "SHOPSTREAM_METRICS_PORT": str(free_port()),
        }
        yield Place(kafka, warehouse, environment, folder)
    warehouse.close()


@dataclass
class Prometheus:
    url: str

    def all(self, query: str) -> dict[tuple[str, ...], float]:
        """Values by label values, in the order of the labels' names."""
        body = get(f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}")[1]
        series = json.loads(body)["data"]["result"] if body else []
        return {
            tuple(v for k, v in sorted(s["metric"].items()) if k not in ("__name__", "instance", "job")): float(s["value"][1])
            for s in series
        }

    def one(self, query: str) -> float:
        return self.all(query).get((), -1.0)


@pytest.fixture(scope="module")
def prometheus(place: Place) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        told = "prometheus is not installed: apt-get install prometheus"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(told)
    config = place.folder / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 1s}\nscrape_configs:\n- job_name: shopstream\n  static_configs:\n"
        f"  - targets: ['127.0.0.1:{place.environment['SHOPSTREAM_METRICS_PORT']}']\n"
    )
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={place.folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (place.folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: get(f"{url}/-/ready")[0] == 200, 20, "Prometheus is ready")
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait(20)


def test_every_series_agrees_with_the_warehouse_and_an_outage_is_not_being_stuck(place: Place, prometheus: Prometheus) -> None:
    messages = sample_records()
    url = f"http://127.0.0.1:{place.environment['SHOPSTREAM_METRICS_PORT']}"
    worker = place.start(SHOPSTREAM_STUCK_SECONDS="8")
    try:
        until(lambda: get(f"{url}/readyz")[0] == 503, 90, "the worker serves and is not ready")
        assert get(f"{url}/healthz")[0] == 200
        until(lambda: get(f"{url}/readyz")[0] == 200, 40, f"ready\n{place.log}")
        place.produce(messages)
        until(place.applied, 60, "everything applied")
        settled = time.time()
        until(lambda: prometheus.one("max(shopstream_warehouse_read_timestamp_seconds)") > settled + 1, 40, "the warehouse was read")
        until(lambda: prometheus.one("sum(shopstream_consumer_lag_events)") == 0, 20, "no lag")
        _counts_agree(place, prometheus)
        _kpis_agree(place, prometheus)
        _sizes_agree(place, prometheus)
        _checked_by_promtool(f"{url}/metrics")

        place.kafka.kill()
        time.sleep(20)
        assert get(f"{url}/healthz")[0] == 200
        place.kafka.start()
        place.produce(messages[:100])
        until(place.applied, 60, "it goes on")
        assert worker.poll() is None, place.log
    finally:
        worker.terminate()
        assert worker.wait(60) == 0, place.log


def _counts_agree(place: Place, prometheus: Prometheus) -> None:
    names = {"applied": "applied_events", "duplicates": "duplicate_events", "too_late": "too_late_events", "rekeyed": "rekeyed_records"}
    newest = ", ".join(f"argMax({column}, version)" for column in names)
    rows = place.warehouse.query(f'SELECT topic, "partition", {newest} FROM progress GROUP BY topic, "partition"')
    for i, metric in enumerate(names.values()):
        wanted = {(str(p), str(topic)): float(counts[i]) for topic, p, *counts in rows}
        found = prometheus.all(f"shopstream_{metric}_total")
        assert {k: v for k, v in found.items() if v} == {k: v for k, v in wanted.items() if v}, metric
    reasons = place.warehouse.query("SELECT reason, uniqExact(topic, partition, offset) FROM rejects GROUP BY reason")
    assert reasons
    assert prometheus.all("sum by (reason) (shopstream_rejected_records_total)") == {(str(r),): float(n) for r, n in reasons}
    total = sum(end for (topic, _), end in place.ends().items() if topic != Topics().rekeyed)
    assert prometheus.one('sum(shopstream_consumed_records_total{topic!~".*rekeyed"})') == total
    assert prometheus.one("sum(shopstream_run_records_sum)") == prometheus.one("sum(shopstream_consumed_records_total)")
    assert prometheus.one("shopstream_end_to_end_latency_seconds_count") == prometheus.one("shopstream_run_records_count") > 0
    assert prometheus.one("shopstream_partitions_owned") == PARTITIONS
    assert prometheus.one("sum(shopstream_unacknowledged_flushes)") == 0


def _kpis_agree(place: Place, prometheus: Prometheus) -> None:
    found = prometheus.all('shopstream_kpi{window!="1m"}')
    assert found
    starts = {}
    for window, size in (("1h", 3_600_000), ("1d", 86_400_000)):
        largest = int(place.warehouse.query("SELECT largest FROM watermarks")[0][0])
        starts[window, "newest"] = (largest // size - 1) * size // 1000
        starts[window, "week_before"] = starts[window, "newest"] - 7 * 86_400
    rows = place.warehouse.query(
        "SELECT kpi, window, toUnixTimestamp(window_start), value FROM kpi_report WHERE dimension = '' AND currency IN ('', 'EUR')"
    )
    report = {(str(kpi), str(window), int(start)): float(value) for kpi, window, start, value in rows}
    held = 0
    for (age, kpi, window), value in found.items():
        wanted = report.get((kpi, window, starts[window, age]), 0.0)
        assert value == pytest.approx(wanted, rel=1e-12), (kpi, window, age)
        held += bool(wanted)
    assert held > 10
    funnel = prometheus.all('shopstream_funnel_users{funnel="checkout"}')
    assert funnel
    largest = int(place.warehouse.query("SELECT largest FROM watermarks")[0][0])
    newest = ((largest - 86_400_000) // 86_400_000 - 1) * 86_400
    rows = place.warehouse.query(
        f"SELECT step, sum(users) FROM funnel_report WHERE funnel = 'checkout' AND toUnixTimestamp(window_start) = {newest} GROUP BY step"
    )
    assert {(a, f, s): v for (a, f, s), v in funnel.items() if a == "newest"} == {
        ("newest", "checkout", str(step)): float(n) for step, n in rows
    }


def _sizes_agree(place: Place, prometheus: Prometheus) -> None:
    found = prometheus.all("shopstream_warehouse_rows")
    assert found["rejects",] == place.warehouse.query("SELECT count() FROM rejects")[0][0] > 0
    inserted = prometheus.all("shopstream_inserted_rows_total")
    assert inserted["kpi_cells",] >= found["kpi_cells",] > 0
    largest = int(place.warehouse.query("SELECT largest FROM watermarks")[0][0])
    assert prometheus.one("max(shopstream_watermark_timestamp_seconds)") * 1000 >= largest
    assert prometheus.one("shopstream_freshness_seconds") == pytest.approx(
        time.time() - prometheus.one("max(shopstream_watermark_timestamp_seconds)"), abs=5
    )


def _checked_by_promtool(url: str) -> None:
    checked = subprocess.run(["promtool", "check", "metrics"], input=get(url)[1], capture_output=True, text=True, check=False)
    ours = [line for line in (checked.stdout + checked.stderr).splitlines() if "shopstream_" in line]
    assert not ours, ours


def test_a_port_in_use_stops_the_start_and_names_the_setting(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        worker = place.start(SHOPSTREAM_METRICS_PORT=str(taken.getsockname()[1]))
        assert worker.wait(60) == 1
    assert "SHOPSTREAM_METRICS_PORT=0 serves none" in " ".join(place.log.split())


def test_a_worker_that_stands_still_ends_itself(place: Place) -> None:
    place.produce(sample_records()[:50])
    worker = place.start(STAND_STILL, SHOPSTREAM_STUCK_SECONDS="4", SHOPSTREAM_METRICS_PORT="0")
    try:
        assert worker.wait(90) == 1, place.log
        assert "stuck: " in place.log
        assert "the worker ends so that it is started again" in place.log
    finally:
        worker.kill()
