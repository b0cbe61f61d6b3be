"""The reading commands against the truth: the bundled sample through the partitions, every number recomputed by SQL from the raw JSON; and on a real Kafka.

Reports read what `tests.sample_warehouse` filled; `doctor` and `rejects replay` speak to an embedded broker.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from embedded.kafka import EmbeddedKafka
from pipeline.definitions import Definitions
from pipeline.definitions_file import load
from pipeline.partition import Partition, Run
from pipeline.sinks.open import open_warehouse
from pipeline.topic_names import Topics
from pipeline.topics import connect, ensure_topics
from schemas.rows import COLUMNS
from tests import clickhouse_server
from tests.command_line import shopstream
from tests.oracle.sql import Oracle
from tests.sample_warehouse import SAMPLE, Record, fill, sample_records


@dataclass(frozen=True)
class Shop:
    folder: Path
    definitions: Definitions
    funnels: dict[Any, int]
    retentions: dict[Any, Any]
    kpis: dict[Any, Decimal]
    rejected: dict[str, int]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("commands") / "warehouse"
    definitions = load(SAMPLE / "shopstream.toml")
    records = sample_records()
    warehouse = open_warehouse(f"chdb://{folder}")
    try:
        fill(warehouse, definitions, records)
        bad = warehouse.query("SELECT topic, raw, reason FROM rejects")
        raws = {(topic, raw.encode() if isinstance(raw, str) else raw) for topic, raw, _ in bad}
        oracle = Oracle(warehouse.query, definitions, [(r.topic, r.value) for r in records if (r.topic, r.value) not in raws])
        return Shop(folder, definitions, oracle.funnels(), oracle.retentions(), oracle.kpis(), Counter(reason for *_, reason in bad))
    finally:
        warehouse.close()


def answer(shop: Shop, *arguments: str | int) -> Any:
    said = shopstream(*arguments, "--json", "--warehouse", shop.folder)
    assert (said.code, said.err) == (0, "")
    return json.loads(said.out, parse_float=Decimal)


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1000)


def test_funnels_are_those_of_sql(shop: Shop) -> None:
    wanted: dict[Any, int] = Counter()
    for (name, start, _, step), users in shop.funnels.items():
        wanted[name, start, step] += users
    found = {}
    for report in answer(shop, "report", "funnel")["funnels"]:
        for window in report["windows"]:
            found |= {(report["name"], ms(window["start"]), step): users for step, users in enumerate(window["users"], 1)}
        totals = [
            sum(users for (name, _, s), users in wanted.items() if (name, s) == (report["name"], step["number"]))
            for step in report["steps"]
        ]
        assert [step["users"] for step in report["steps"]] == totals
    assert found == dict(wanted)


def test_a_funnels_segment_is_that_of_sql(shop: Shop) -> None:
    for segment in ("email", "direct"):
        (report,) = answer(shop, "report", "funnel", "--name", "checkout", "--segment", segment)["funnels"]
        wanted = Counter[int]()
        for (name, _, of, step), users in shop.funnels.items():
            wanted[step] += users if (name, of) == ("checkout", segment) else 0
        assert {step["number"]: step["users"] for step in report["steps"]} == dict(wanted)


def test_cohorts_are_those_of_sql(shop: Shop) -> None:
    found = {
        (report["name"], ms(cohort["start"]), n): (cell["users"], cell["on_or_after"], cell["value"])
        for report in answer(shop, "report", "retention", "--limit", 1000)["retentions"]
        for cohort in report["cohorts"]
        for n, cell in enumerate(cohort["cells"])
    }
    wanted: dict[Any, list[Any]] = defaultdict(lambda: [0, 0, 0])
    for (name, start, _, n), values in shop.retentions.items():
        wanted[name, start, n] = [a + b for a, b in zip(wanted[name, start, n], values, strict=True)]
    assert {key: values for key, values in found.items() if any(values)} == {key: tuple(values) for key, values in wanted.items()}


@pytest.mark.parametrize("window", ["1h", "1d"])
def test_kpis_are_those_of_sql(shop: Shop, window: str) -> None:
    (report,) = answer(shop, "report", "kpi", "--window", window, "--limit", 10_000)["kpis"]
    found = {
        (series["name"], ms(point["start"]), series["currency"]): Decimal(point["value"])
        for series in report["series"]
        for point in series["points"]
        if point["value"] is not None
    }
    wanted = {
        (kpi, start, currency): value
        for (kpi, w, start, dimension, _, currency), value in shop.kpis.items()
        if (w, dimension) == (window, "")
    }
    assert wanted
    assert {key: found.get(key) for key in wanted} == wanted
    assert {value for key, value in found.items() if key not in wanted} <= {0}


def test_a_dimension_is_that_of_sql(shop: Shop) -> None:
    (report,) = answer(shop, "report", "kpi", "--name", "visits", "--dimension", "channel", "--limit", 10_000)["kpis"]
    found = Counter({series["dimension_value"]: sum(point["value"] for point in series["points"]) for series in report["series"]})
    wanted = Counter[str]()
    for (kpi, window, _, dimension, of, _), value in shop.kpis.items():
        wanted[of] += int(value) if (kpi, window, dimension) == ("visits", "1d", "channel") else 0
    assert found == wanted


def test_rejects_are_counted_as_they_were_made(shop: Shop) -> None:
    assert answer(shop, "rejects", "list")["reasons"] == dict(shop.rejected)
    assert answer(shop, "report", "health")["health"][0]["reasons"] == [
        [r, n] for r, n in sorted(shop.rejected.items(), key=lambda i: (-i[1], i[0]))
    ]


def test_a_server_answers_as_the_embedded_warehouse_does(shop: Shop) -> None:
    clickhouse_server.require()
    with clickhouse_server.ClickHouseServer() as server:
        url = server.url(user="default")
        warehouse = open_warehouse(url, server.password)
        fill(warehouse, shop.definitions, sample_records())
        warehouse.close()
        asked = [
            "report funnel --from 2026-03-01 --to 2026-03-20",
            "report funnel --name checkout --segment email --limit 2",
            "report retention --limit 30",
            "report retention --name first_visit --from 2026-03-10",
            "report kpi",
            "report kpi --name visits --window 1h --dimension channel --segment email --to 2026-03-10",
            "rejects list --reason wrong_type --topic clickstream --since 2026-03-01",
            "rejects show clickstream 1 2389",
        ]
        for words in asked:
            said = shopstream(*words.split(), "--json", "--warehouse", url, SHOPSTREAM_WAREHOUSE_PASSWORD=server.password)
            assert (said.code, said.err) == (0, ""), words
            assert json.loads(said.out, parse_float=Decimal) == answer(shop, *words.split()), words
        health = shopstream("report", "health", "--json", "--warehouse", url, SHOPSTREAM_WAREHOUSE_PASSWORD=server.password)
        assert json.loads(health.out)["health"][0]["partitions"] == answer(shop, "report", "health")["health"][0]["partitions"]
        unknown = shopstream("report", "funnel", "--name", "no'ne", "--warehouse", url, SHOPSTREAM_WAREHOUSE_PASSWORD=server.password)
        assert (unknown.code, "there are checkout, payment" in unknown.all) == (2, True)
        found = json.loads(
            shopstream("doctor", "--json", "--broker", "127.0.0.1:1", "--warehouse", url, SHOPSTREAM_WAREHOUSE_PASSWORD=server.password).out
        )
        states = {finding["check"]: finding["state"] for finding in found["findings"]}
        assert (states["warehouse"], states["migrations"], states["clock"]) == ("ok", "ok", "ok")
        denied = shopstream("report", "funnel", "--warehouse", url, SHOPSTREAM_WAREHOUSE_PASSWORD="guess", columns=200)
        assert denied.code == 1
        assert "guess" not in denied.all


def test_a_terminal_is_redrawn_without_being_cleared_and_left_as_it_was(shop: Shop) -> None:
    """On a pseudo terminal of 80 by 24: one alternate screen, frames painted over each other, the cursor back and the last state left."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "pipeline.cli.main", "report", "kpi", "--watch", "0.5", "--warehouse", str(shop.folder)]
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")} | {
        "TERM": "xterm-256color",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen, until = b"", time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if select.select([master], [], [], 0.1)[0]:
            seen += os.read(master, 65536)
        if seen.count(b"Ctrl-C ends") >= 3:
            process.send_signal(signal.SIGINT)
            break
    while select.select([master], [], [], 5)[0]:
        try:
            seen += os.read(master, 65536)
        except OSError:  # the terminal's other end is closed
            break
    os.close(master)
    assert process.wait(30) == 0
    assert seen.count(b"\x1b[?1049h") == seen.count(b"\x1b[?1049l") == 1
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
    assert seen.count(b"\x1b[2J") <= 1
    assert b"Traceback" not in seen
    assert b"gmv" in seen.split(b"\x1b[?1049l")[1]


# --- with Kafka -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kafka() -> Iterator[str]:
    with EmbeddedKafka(quiet=True) as broker:
        yield broker.bootstrap


def doctor(kafka: str, shop: Shop, **environment: str) -> tuple[int, dict[str, list[tuple[str, str, str]]]]:
    said = shopstream("doctor", "--json", "--broker", kafka, "--warehouse", shop.folder, "--timeout", 30, **environment)
    found: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for finding in json.loads(said.out)["findings"]:
        found[finding["check"]].append((finding["state"], finding["found"], finding["remedy"]))
    return said.code, found


def test_doctor_follows_a_pipeline_from_nothing_to_healthy(kafka: str, shop: Shop) -> None:
    names = {"SHOPSTREAM_APP_ID": "d", "SHOPSTREAM_CLICKSTREAM_TOPIC": "d.clickstream", "SHOPSTREAM_ORDERS_TOPIC": "d.orders"}
    topics = Topics("d.clickstream", "d.orders", "d")
    code, found = doctor(kafka, shop, **names)
    assert code == 1
    assert found["topics"][0][0] == "fail"
    assert "shopstream topics" in found["topics"][0][2]

    assert shopstream("topics", "--broker", kafka, "--partitions", 2, **names).code == 0
    code, found = doctor(kafka, shop, SHOPSTREAM_PARTITIONS="2", **names)
    assert code == 0
    assert [state for state, _, _ in found["topics"]] == ["ok"]
    assert found["workers"] == [("warn", "no worker in group d; 0 records to read", "start `shopstream worker`")]
    assert all(state == "ok" for check in ("broker", "warehouse", "migrations", "clock") for state, _, _ in found[check])

    consumer = KafkaConsumer(topics.clickstream, bootstrap_servers=[kafka], group_id="d", enable_auto_commit=False)
    consumer.poll(8000)
    _, found = doctor(kafka, shop, SHOPSTREAM_PARTITIONS="2", **names)
    consumer.close()
    assert found["workers"][0][0] == "ok"
    assert found["workers"][0][1].startswith("1 worker in group d, stable; 0 records")


def test_doctor_finds_what_would_lose_events_or_state(kafka: str, shop: Shop) -> None:
    topics = Topics("e.clickstream", "e.orders", "e")
    names = {"SHOPSTREAM_APP_ID": "e", "SHOPSTREAM_CLICKSTREAM_TOPIC": "e.clickstream", "SHOPSTREAM_ORDERS_TOPIC": "e.orders"}
    ensure_topics({"bootstrap_servers": [kafka]}, topics, 2)
    admin = connect({"bootstrap_servers": [kafka]})
    admin.alter_configs([
        ConfigResource(ConfigResourceType.TOPIC, topics.changelog, {"retention.ms": "1000", "max.message.bytes": "1000"}),
        ConfigResource(ConfigResourceType.TOPIC, topics.clickstream, {"retention.ms": "60000"}),
        ConfigResource(ConfigResourceType.TOPIC, topics.orders, {"cleanup.policy": "compact"}),
    ])  # fmt: skip
    admin.close()
    code, found = doctor(kafka, shop, **names)
    assert code == 1
    bad = {(state, remedy.split(":")[0]) for state, _, remedy in found["topics"] if state != "ok"}
    assert ("fail", "set retention.ms=-1 on e.changelog now") in bad
    assert ("fail", "set cleanup.policy=delete on e.orders") in bad
    assert ("warn", "raise retention.ms of e.clickstream") in bad
    assert any(remedy.startswith("set max.message.bytes=") for _, remedy in bad)
    assert any("SHOPSTREAM_PARTITIONS is 4, the topics have 2" in what for _, what, _ in found["topics"])


def test_a_replay_to_a_broker_without_the_topics_sends_nothing(kafka: str, shop: Shop) -> None:
    said = shopstream("rejects", "replay", "--yes", "--broker", kafka, "--warehouse", shop.folder)
    assert said.code == 1
    assert "clickstream has 0 partitions" in said.all
    assert "SHOPSTREAM_BROKER" in said.all


def test_a_replay_brings_the_same_bytes_to_where_they_came_from(kafka: str, shop: Shop) -> None:
    ensure_topics({"bootstrap_servers": [kafka]}, Topics(), 2)
    said = shopstream("rejects", "replay", "--yes", "--limit", 10, "--broker", kafka, "--warehouse", shop.folder)
    assert said.code == 0, said.err
    assert "the oldest 10 of 17" in said.all
    assert "sent 10 records to clickstream" in said.all
    first, everything = Counter(received(kafka)), Counter(kept(shop))
    assert first.total() == 10
    assert first <= everything
    assert shopstream("rejects", "replay", "--yes", "--broker", kafka, "--warehouse", shop.folder).code == 0
    assert Counter(received(kafka)) - first == everything


def test_a_rejected_event_that_is_replayed_twice_counts_once(shop: Shop) -> None:
    ts = 1_773_000_000_000
    value = b'{"event_id":"ahead","event":"page_view","ts":%d,"user_id":"u1"}' % ts
    partition = Partition(0, 1, shop.definitions)

    def offer(offset: int, sent_at: int) -> tuple[int, int, int]:
        partition.offer(Run("clickstream", 0, [Record(offset, b"u1", value, sent_at)], offset + 1, offset))
        state = partition.states["clickstream"]
        return state.applied, state.duplicates, state.rejected

    assert offer(0, ts - 3_600_000) == (0, 0, 1)  # a producer's clock is an hour ahead
    assert offer(1, ts) == (1, 0, 1)
    assert offer(2, ts) == (1, 1, 1)


def received(kafka: str) -> list[tuple[str, int, bytes, bytes]]:
    """(topic, partition, key, value) of all that is in the source topics."""
    consumer = KafkaConsumer(bootstrap_servers=[kafka])
    places = [TopicPartition(topic, p) for topic in ("clickstream", "orders") for p in range(2)]
    consumer.assign(places)
    consumer.seek_to_beginning(*places)
    wanted = sum(consumer.end_offsets(places).values())
    found: list[Any] = []
    while len(found) < wanted:
        found += [r for records in consumer.poll(1000).values() for r in records]
    consumer.close()
    return [(r.topic, r.partition, r.key or b"", r.value) for r in found]


def kept(shop: Shop) -> list[tuple[str, int, bytes, bytes]]:
    warehouse = open_warehouse(f"chdb://{shop.folder}")
    try:
        rows = warehouse.query(f"SELECT {', '.join(COLUMNS['rejects'])} FROM rejects")
    finally:
        warehouse.close()
    as_bytes = [(t, p, *(v.encode() if isinstance(v, str) else v for v in (key, raw))) for t, p, _, _, _, key, raw, *_ in rows]
    return [row for row in as_bytes if row[3]]
