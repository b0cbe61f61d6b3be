"""The embedded broker is Apache Kafka itself: it serves, and it is gone with its owner, however that went."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer

from embedded import jars, kafka
from embedded.jars import EmbeddedKafkaError, kafka_jars, pinned_jars, wrong_jars
from embedded.kafka import EmbeddedKafka
from pipeline.topic_names import Topics
from pipeline.topics import ensure_topics

OWNER = """
import sys, time
from embedded.kafka import EmbeddedKafka
broker = EmbeddedKafka(quiet=True)
broker.start()
print(broker.bootstrap, broker.folder, flush=True)
time.sleep(600)
"""

OWNER_OF_THREE = """
import sys, time
from embedded.cluster import EmbeddedCluster
cluster = EmbeddedCluster(quiet=True)
cluster.start()
print(cluster.bootstrap, cluster.folder, flush=True)
sys.stdin.readline()
cluster.nodes[1].kill()
print("killed", flush=True)
time.sleep(600)
"""


def listening(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, int(port))) == 0


def until(condition: object, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False


def test_what_is_produced_is_consumed_and_the_data_go_with_the_broker() -> None:
    with EmbeddedKafka(quiet=True) as broker:
        client = {"bootstrap_servers": [broker.bootstrap]}
        ensure_topics(client, Topics(), 2)
        producer = KafkaProducer(**client, max_request_size=8 << 20)
        large = b"x" * (2 << 20)
        for value in (b"small", large):
            producer.send("clickstream", value, partition=0, timestamp_ms=1_000_000_000_000).get(20)  # 2001: older than any retention
        producer.close()
        consumer = KafkaConsumer("clickstream", **client, auto_offset_reset="earliest", consumer_timeout_ms=10_000)
        values = [next(consumer).value, next(consumer).value]
        consumer.close()
        folder, address = broker.folder, broker.bootstrap
    assert values == [b"small", large]
    assert not folder.exists()
    assert not listening(address)


def test_a_named_folder_keeps_its_records(tmp_path: Path) -> None:
    with EmbeddedKafka(tmp_path, quiet=True) as broker:
        ensure_topics({"bootstrap_servers": [broker.bootstrap]}, Topics(), 1)
        producer = KafkaProducer(bootstrap_servers=[broker.bootstrap])
        producer.send("orders", b"kept").get(20)
        producer.close()
    with EmbeddedKafka(tmp_path, quiet=True) as broker:
        consumer = KafkaConsumer("orders", bootstrap_servers=[broker.bootstrap], auto_offset_reset="earliest", consumer_timeout_ms=10_000)
        value = next(consumer).value
        consumer.close()
    assert value == b"kept"


def test_the_broker_dies_with_an_owner_that_is_killed() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        assert owner.stdout is not None
        address, folder = owner.stdout.readline().split()
        assert listening(address)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert until(lambda: not listening(address))
        assert until(lambda: not Path(folder).exists())
    finally:
        owner.kill()


def test_a_cluster_keeps_what_a_lost_broker_had_and_dies_with_an_owner_that_is_killed() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER_OF_THREE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert owner.stdout is not None
        assert owner.stdin is not None
        bootstrap, folder = owner.stdout.readline().split()
        servers = bootstrap.split(",")
        assert len(servers) == 3
        ensure_topics({"bootstrap_servers": servers}, Topics(), 1, 3, 2)
        producer = KafkaProducer(bootstrap_servers=servers, acks="all")
        producer.send("orders", b"kept").get(20)
        producer.close()
        owner.stdin.write("kill the first\n")
        owner.stdin.flush()
        assert owner.stdout.readline() == "killed\n"
        assert [listening(address) for address in servers] == [False, True, True]
        consumer = KafkaConsumer("orders", bootstrap_servers=servers[1:], auto_offset_reset="earliest", consumer_timeout_ms=30_000)
        value = next(consumer).value
        consumer.close()
        assert value == b"kept"
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert until(lambda: not any(map(listening, servers)))
        assert until(lambda: not Path(folder).exists())
    finally:
        owner.kill()


def test_a_port_taken_in_the_meantime_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        taken, real, first = squatter.getsockname()[1], kafka.free_ports, [True]

        def ports(count: int) -> list[int]:
            controller = real(count)[1]
            return [taken, controller] if first and first.pop() else real(count)

        monkeypatch.setattr(kafka, "free_ports", ports)
        with EmbeddedKafka(quiet=True) as broker:
            assert not broker.bootstrap.endswith(f":{taken}")


def test_a_failed_start_shows_the_end_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka, "PROPERTIES", kafka.PROPERTIES + "process.roles=nonsense\n")
    with pytest.raises(EmbeddedKafkaError, match=r"(?s)nonsense.*--broker"), EmbeddedKafka(quiet=True):
        pass


def test_an_altered_jar_is_found(tmp_path: Path) -> None:
    jar = kafka_jars(quiet=True)[0]
    altered = tmp_path / jar.name
    shutil.copy(jar, altered)
    pinned = {jar.name: pinned_jars()[jar.name]}
    assert wrong_jars(pinned, {jar.name: altered}) == []
    with altered.open("ab") as file:
        file.write(b"!")
    assert wrong_jars(pinned, {jar.name: altered}) == [jar.name]
    assert wrong_jars(pinned, {}) == [jar.name]
    assert wrong_jars({}, {jar.name: jar}) == [jar.name]


def test_kafka_that_is_installed_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jars.INSTALLED_VARIABLE, str(tmp_path))
    with pytest.raises(EmbeddedKafkaError, match="KAFKA_HOME"):
        kafka_jars()
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "kafka.jar").touch()
    assert kafka_jars() == [tmp_path / "libs" / "kafka.jar"]
