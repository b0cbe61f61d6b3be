"""`shopstream replay` on a real Kafka: what is read committed is the file, once, however the command was ended in between."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet
import pytest
from kafka import KafkaConsumer, TopicPartition

from embedded.kafka import EmbeddedKafka
from generator.bench import events
from pipeline.cli.main import main
from pipeline.topic_names import Topics
from pipeline.topics import ensure_topics
from tests.seed import SEED

PARTITIONS = 3
SMALL_CHUNKS = """
import pipeline.cli.replay, pipeline.resumable
pipeline.resumable.CHUNK, pipeline.cli.replay.PLAIN_SECONDS = 200, 0
from pipeline.cli.main import main
main()
"""
"""A transaction every 200 records, and a line after each."""


@pytest.fixture(scope="module")
def kafka() -> Iterator[str]:
    with EmbeddedKafka(quiet=True) as broker:
        yield broker.bootstrap


@pytest.fixture
def topics(kafka: str) -> Topics:
    name = f"t{uuid4().hex[:8]}"
    made = Topics(f"{name}.clickstream", f"{name}.orders", name)
    ensure_topics({"bootstrap_servers": [kafka]}, made, PARTITIONS)
    return made


class Shell:
    """Runs the command against the broker and topics: in a process of its own, or (`run`) within this one, which starts sooner."""

    def __init__(self, kafka: str, topics: Topics, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.environment = {
            "SHOPSTREAM_BROKER": kafka,
            "SHOPSTREAM_APP_ID": topics.app_id,
            "SHOPSTREAM_CLICKSTREAM_TOPIC": topics.clickstream,
            "SHOPSTREAM_ORDERS_TOPIC": topics.orders,
            "COLUMNS": "300",
        }
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SMALL_CHUNKS, "replay", *map(str, arguments)]
        environment = os.environ | self.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *arguments: str | Path) -> tuple[int, str]:
        for name, value in self.environment.items():
            self._monkeypatch.setenv(name, value)
        self._monkeypatch.setattr(sys, "argv", ["shopstream", "replay", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = self._capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err


@pytest.fixture
def shell(kafka: str, topics: Topics, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(kafka, topics, monkeypatch, capsys)


def committed(kafka: str, topic: str) -> list[tuple[bytes | None, bytes]]:
    """Everything in the topic that is committed, partition by partition."""
    consumer = KafkaConsumer(bootstrap_servers=[kafka], isolation_level="read_committed", auto_offset_reset="earliest")
    places = [TopicPartition(topic, p) for p in range(PARTITIONS)]
    consumer.assign(places)
    ends = consumer.end_offsets(places)
    found = []
    deadline = time.monotonic() + 90  # an open transaction of a killed command is given up after 60 s
    while any(consumer.position(place) < ends[place] for place in places):
        assert time.monotonic() < deadline
        for records in consumer.poll(timeout_ms=500).values():
            found += [(record.key, record.value) for record in records]
    consumer.close()
    return found


def lines(n: int, seed: int) -> list[bytes]:
    return events(n, 500, seed=seed)[1]


def ndjson(path: Path, values: list[bytes]) -> Path:
    data = b"\n".join(values)
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def by_user(values: list[bytes]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for value in values:
        found.setdefault(json.loads(value)["user_id"], []).append(value)
    return found


def test_killed_at_random_moments_it_sends_every_record_once_and_in_order(kafka: str, topics: Topics, shell: Shell, tmp_path: Path) -> None:
    r = random.Random(SEED)
    values = lines(12_000, SEED)
    file = ndjson(tmp_path / "events.ndjson.gz", values)
    resumed = 0
    for _ in range(3):
        process = shell.start(file, "--topic", "clickstream")
        assert process.stdout is not None
        for _ in range(r.randint(1, 16)):
            said = process.stdout.readline()
            resumed += "going on after" in said
        time.sleep(r.uniform(0, 0.02))
        process.kill()
        process.communicate()
    code, said = shell.run(file, "--topic", "clickstream")
    assert code == 0, said
    assert resumed, f"SHOPSTREAM_TEST_SEED={SEED}"
    assert f"all {len(values):,} records are in Kafka" in said
    found = committed(kafka, topics.clickstream)
    assert by_user([value for _, value in found]) == by_user(values), f"SHOPSTREAM_TEST_SEED={SEED}"
    assert all(key == json.loads(value)["user_id"].encode() for key, value in found)


def test_interrupted_it_stops_after_a_transaction_and_goes_on_from_there(kafka: str, topics: Topics, shell: Shell, tmp_path: Path) -> None:
    values = lines(20_000, 2)
    file = ndjson(tmp_path / "events.ndjson", values)
    for number in (signal.SIGTERM, signal.SIGINT):
        process = shell.start(file, "--topic", "orders")
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number, said
        assert "the same command goes on from there" in said
        assert "Traceback" not in said
    code, said = shell.run(file, "--topic", "orders")
    assert code == 0
    assert "going on after" in said
    assert Counter(value for _, value in committed(kafka, topics.orders)) == Counter(values)


def test_a_file_that_was_sent_is_sent_again_only_when_asked(kafka: str, topics: Topics, shell: Shell, tmp_path: Path) -> None:
    values = lines(50, 3)
    file = ndjson(tmp_path / "events.ndjson", values)
    assert shell.run(file, "--topic", "clickstream")[0] == 0
    code, said = shell.run(file.rename(tmp_path / "renamed.ndjson"), "--topic", "clickstream")
    assert code == 0
    assert "was sent before (50 records)" in said
    assert len(committed(kafka, topics.clickstream)) == 50
    code, said = shell.run(tmp_path / "renamed.ndjson", "--topic", "clickstream", "--again")
    assert code == 0
    assert len(committed(kafka, topics.clickstream)) == 100
    ndjson(tmp_path / "renamed.ndjson", [*values, *lines(1, 4)])  # another content: another file
    assert shell.run(tmp_path / "renamed.ndjson", "--topic", "clickstream")[0] == 0
    assert len(committed(kafka, topics.clickstream)) == 151


def test_a_second_replay_of_the_same_file_takes_over_and_nothing_is_doubled(
    kafka: str, topics: Topics, shell: Shell, tmp_path: Path
) -> None:
    values = lines(12_000, 5)
    file = ndjson(tmp_path / "events.ndjson", values)
    first = shell.start(file, "--topic", "clickstream")
    assert first.stdout is not None
    first.stdout.readline()
    first.send_signal(signal.SIGSTOP)
    code, said = shell.run(file, "--topic", "clickstream")
    assert code == 0, said
    first.send_signal(signal.SIGCONT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 1, said
    assert "has taken over" in said
    assert "Traceback" not in said, said
    assert Counter(value for _, value in committed(kafka, topics.clickstream)) == Counter(values)


def test_paced_and_moved_events_arrive_at_their_new_times(kafka: str, topics: Topics, shell: Shell, tmp_path: Path) -> None:
    old = [
        {"event_id": f"e{i}", "event": "page_view", "ts": 1_600_000_000_000 + i * 1000, "user_id": "u", "price": 19.90} for i in range(8)
    ]
    strange = b'{"event_id":"x","event":"page_view","user_id":"u"}'
    file = ndjson(tmp_path / "events.ndjson", [*(json.dumps(e).encode() for e in old), strange])
    started = time.time()
    code, said = shell.run(file, "--topic", "clickstream", "--speed", "4", "--shift-to-now")
    ended = time.time()
    assert code == 0, said
    assert ended - started > 7 / 4
    *found, last = [value for _, value in committed(kafka, topics.clickstream)]
    assert last == strange
    moved = [json.loads(value) for value in found]
    by = moved[0]["ts"] - old[0]["ts"]  # type: ignore[operator]
    assert [e | {"ts": e["ts"] - by} for e in moved] == old
    assert started < moved[-1]["ts"] / 1000 < ended


def test_csv_and_parquet_go_the_same_way(kafka: str, topics: Topics, shell: Shell, tmp_path: Path) -> None:
    rows = [{"event_id": f"e{i}", "event": "page_view", "ts": 1_772_323_200_000 + i, "user_id": f"u{i % 3}"} for i in range(100)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "events.parquet")
    text = "event_id,event,ts,user_id\n" + "".join(f"{r['event_id']},{r['event']},{r['ts']},{r['user_id']}\n" for r in rows)
    (tmp_path / "events.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name, topic in (("events.parquet", "clickstream"), ("events.csv.gz", "orders")):
        assert shell.run(tmp_path / name, "--topic", topic)[0] == 0
        found = [json.loads(value) for _, value in committed(kafka, getattr(topics, topic))]
        assert sorted(found, key=lambda e: e["ts"]) == rows


def test_a_map_says_which_topic_each_event_goes_to(kafka: str, topics: Topics, shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "shop.csv").write_text("who,what,when\nanna,seen,1772323200\nanna,paid,1772323260\n")
    (tmp_path / "map.toml").write_text(
        '[columns]\nuser_id = "who"\n[event]\ncolumn = "what"\nnames = { seen = "view_item", paid = "purchase" }\n'
        '[time]\ncolumn = "when"\nformat = "s"\n[topics]\npurchase = "orders"\n'
    )
    code, said = shell.run(tmp_path / "shop.csv", "--map", tmp_path / "map.toml")
    assert code == 0, said
    assert [json.loads(v)["event"] for t in topics.sources[:2] for _, v in committed(kafka, t)] == ["view_item", "purchase"]


def test_wrong_use_says_what_to_do(kafka: str, shell: Shell, tmp_path: Path) -> None:
    file = ndjson(tmp_path / "events.ndjson", lines(5, 6))
    for arguments, remedy in (
        ((file,), "--topic clickstream"),
        ((tmp_path / "none.ndjson", "--topic", "orders"), "none.ndjson"),
        ((file, "--topic", "returns"), "clickstream"),
        ((file, "--topic", "orders", "--speed", "0"), "--speed"),
    ):
        code, said = shell.run(*arguments)
        assert (code, remedy in said) == (2, True), said
    shell.environment["SHOPSTREAM_APP_ID"] = "other"
    shell.environment["SHOPSTREAM_CLICKSTREAM_TOPIC"] = "nowhere"
    code, said = shell.run(file, "--topic", "clickstream")
    assert code == 2
    assert "shopstream topics" in said
