"""docker-compose.yml without Docker: its services as plain processes, with their own commands, settings and configuration files, work together.

Kafka is the same version with the same settings, ClickHouse is Debian's 18.16, whose users are those of `deploy/clickhouse/users.d`; hosts and ports are
this machine's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from kafka import KafkaConsumer

from embedded.kafka import EmbeddedKafka
from embedded.watchdog import die_with_parent
from pipeline.settings import PREFIX
from pipeline.topic_names import Topics
from tests import clickhouse_server
from tests.clickhouse_server import ClickHouseServer, free_port
from tests.command_line import shopstream
from tests.compose_file import ROOT, SERVICES, checked_address, commands_of, settings_of

PASSWORD = "of the worker"
SMALLER = {"2000": "200"}
"""Visitors a day."""


class ComposeKafka(EmbeddedKafka):
    """The broker with the settings of the compose file, as its image reads them: KAFKA_NODE_ID is node.id."""

    def _configure(self, port: int, controller: int) -> Path:
        here = {
            "kafka:9092": f"127.0.0.1:{port}",
            "kafka:9093": f"127.0.0.1:{controller}",
            "/var/lib/kafka/data": str(self.folder / "logs"),
        }
        here |= {"HOST://:29092": f"HOST://127.0.0.1:{free_port()}", "PLAINTEXT://:9092": f"PLAINTEXT://127.0.0.1:{port}"}
        here |= {"CONTROLLER://:9093": f"CONTROLLER://127.0.0.1:{controller}"}
        lines = []
        for variable, value in SERVICES["kafka"]["environment"].items():
            for there, instead in here.items():
                value = value.replace(there, instead)
            lines.append(f"{variable.removeprefix('KAFKA_').lower().replace('_', '.')}={value}\n")
        config = self.folder / "server.properties"
        config.write_text("".join(lines))
        return config


class Stack:
    def __init__(self, folder: Path, kafka: EmbeddedKafka, server: ClickHouseServer) -> None:
        self.folder, self.server, self.broker = folder, server, kafka.bootstrap
        (folder / "password").write_text(PASSWORD + "\n")
        self.ports = {name: free_port() for name in ("worker-1", "worker-2", "prometheus")}
        self._here = {"kafka:9092": kafka.bootstrap, "clickhouse:9000": f"127.0.0.1:{server.port}"}
        # 18.16 knows no migrator: the worker's user may do everything within the database.
        self._here |= {"shopstream_migrator": "shopstream_worker", "/tmp/alive": str(folder / "alive"), "0.0.0.0": "127.0.0.1"}

    def place(self, text: str) -> str:
        for there, instead in self._here.items():
            text = text.replace(there, instead)
        return text

    def environment(self, service: str) -> dict[str, str]:
        found = {name: self.place(value) for name, value in settings_of(SERVICES[service]).items()}
        if f"{PREFIX}WAREHOUSE_PASSWORD_FILE" in found:
            found[f"{PREFIX}WAREHOUSE_PASSWORD_FILE"] = str(self.folder / "password")
        if service in self.ports:
            found[f"{PREFIX}METRICS_PORT"] = str(self.ports[service])
        return found

    def start(self, service: str) -> subprocess.Popen[bytes]:
        (words,) = commands_of(SERVICES[service])
        words = [SMALLER.get(word, word) for word in words]
        with (self.folder / f"{service}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline.cli.main", *map(self.place, words)],
                env=os.environ | self.environment(service), stdout=log, stderr=log, preexec_fn=die_with_parent,
            )  # fmt: skip

    def logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in sorted(self.folder.glob("*.log")))

    def address(self, service: str) -> str:
        """What its health check asks for."""
        parts = urllib.parse.urlsplit(checked_address(SERVICES[service]))
        return parts._replace(netloc=f"127.0.0.1:{self.ports[service]}").geturl()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    clickhouse_server.require()
    folder = tmp_path_factory.mktemp("compose")
    settings = (ROOT / "deploy" / "compose" / "clickhouse-server.xml").read_text()
    inner = settings[settings.index("<yandex>") + len("<yandex>") : settings.index("</yandex>")]
    server = ClickHouseServer(extra=inner)
    (server.folder / "users.d").mkdir()
    shutil.copy(ROOT / "deploy" / "compose" / "clickhouse-admin.xml", server.folder / "users.d")
    shutil.copy(ROOT / "deploy" / "clickhouse" / "users.d" / "shopstream-before-20.5.xml", server.folder / "users.d")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        for role, password in (("WORKER", PASSWORD), ("READER", "of the reader")):
            patch.setenv(f"SHOPSTREAM_{role}_PASSWORD_SHA256", hashlib.sha256(password.encode()).hexdigest())
        running.enter_context(server)
        for role in ("WORKER", "READER"):
            patch.delenv(f"SHOPSTREAM_{role}_PASSWORD_SHA256")
        kafka = running.enter_context(ComposeKafka(folder / "kafka", quiet=True))
        yield Stack(folder, kafka, server)


def get(url: str) -> str:
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())
    return ""


def until(done: Callable[[], Any], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, what()
        time.sleep(0.3)


def test_the_services_of_the_compose_file_work_together(stack: Stack) -> None:
    for words in commands_of(SERVICES["setup"]):
        said = shopstream(*words, **stack.environment("setup"))
        assert said.code == 0, said.all
    names = ("worker-1", "worker-2", "traffic")
    running = {name: stack.start(name) for name in names}
    running["prometheus"] = _prometheus(stack)
    try:
        until(lambda: all(get(stack.address(name)) for name in stack.ports), 90, stack.logs)
        query = urllib.parse.urlencode(
            {"query": "sum(up) * sum(shopstream_partitions_owned) * (sum(shopstream_consumer_lag_events) < bool 1000)"}
        )
        base = f"http://127.0.0.1:{stack.ports['prometheus']}"

        def seen() -> float:
            result = json.loads(get(f"{base}/api/v1/query?{query}") or '{"data": {"result": []}}')["data"]["result"]
            return float(result[0]["value"][1]) if result else 0.0

        alive = stack.folder / "alive"
        until(lambda: alive.exists() and time.time() - alive.stat().st_mtime < 5 and seen() == 2 * 4, 90, stack.logs)
        environment = stack.environment("worker-1")
        found = shopstream("report", "kpi", "--name", "paid_orders", "--window", "1d", "--json", **environment)
        assert found.code == 0, found.all
        (report,) = json.loads(found.out)["kpis"]
        days = [float(point["value"] or 0) for series in report["series"] for point in series["points"]]
        assert len(days) >= 14, found.out[:500]
        assert sum(days) > 100
        doctor = shopstream("doctor", "--json", **environment)
        states = {finding["check"]: finding for finding in json.loads(doctor.out)["findings"] if finding["state"] == "fail"}
        assert doctor.code == 0, states
        assert {name: process.poll() for name, process in running.items()} == dict.fromkeys(running)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        codes = {name: process.wait(60) for name, process in running.items()}
    assert codes == {"worker-1": 0, "worker-2": 0, "traffic": 128 + signal.SIGTERM, "prometheus": 0}, stack.logs()
    _traffic_goes_on_without_doubling(stack)


def _traffic_goes_on_without_doubling(stack: Stack) -> None:
    log = stack.folder / "traffic.log"
    before = int(re.findall(r"stopped: ([\d,]+) events", log.read_text())[-1].replace(",", ""))
    again = stack.start("traffic")
    until(lambda: f"going on after {before:,} events" in log.read_text(), 30, stack.logs)
    until(lambda: time.time() - (stack.folder / "alive").stat().st_mtime < 0.5, 30, stack.logs)
    again.send_signal(signal.SIGTERM)
    assert again.wait(30) == 128 + signal.SIGTERM, stack.logs()
    after = int(re.findall(r"stopped: ([\d,]+) events", log.read_text())[-1].replace(",", ""))
    consumer = KafkaConsumer(
        *Topics().sources, bootstrap_servers=[stack.broker], isolation_level="read_committed",
        auto_offset_reset="earliest", group_id=None, consumer_timeout_ms=3_000,
    )  # fmt: skip
    kinds = Counter(message.topic for message in consumer)
    consumer.close()
    assert kinds[Topics().clickstream] + kinds[Topics().orders] == after >= before > 10_000


def _prometheus(stack: Stack) -> subprocess.Popen[bytes]:
    if not shutil.which("prometheus"):
        assert not os.environ.get("CI"), "in CI Debian's package prometheus must be there"
        pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{stack.ports[name]}" for name in ("worker-1", "worker-2")]
    (stack.folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={stack.folder / 'prometheus.yml'}", f"--storage.tsdb.path={stack.folder / 'tsdb'}"]
    with (stack.folder / "prometheus.log").open("wb") as log:
        return subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{stack.ports['prometheus']}"], stdout=log, stderr=log, preexec_fn=die_with_parent
        )
