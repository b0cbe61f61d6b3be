"""With SHOPSTREAM_PSEUDONYM_SECRET no user id leaves Kafka, and a rejected record can still be looked at and sent again."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

from embedded.kafka import EmbeddedKafka
from pipeline.files import Keyed
from pipeline.pseudonyms import Pseudonyms
from pipeline.topics import connect
from tests import clickhouse_server
from tests.clickhouse_server import ClickHouseServer
from tests.command_line import Said, shopstream
from tests.integration.scraping import PARTITIONS, Place, pipeline, until

SECRET = "known to this shop alone"
USER, OTHER = "one@shop.example", "two@shop.example"
T0 = 1_767_225_600_000  # 2026-01-01


def event(user: str, number: int, **fields: Any) -> bytes:
    return json.dumps({"event_id": f"{user}-{number}", "event": "page_view", "ts": T0 + number, "user_id": user, **fields}).encode()


GOOD = [Keyed("clickstream", user, event(user, number)) for user in (USER, OTHER) for number in range(20)]
BAD = [
    Keyed("clickstream", USER, event(USER, 30, price=-1)),
    Keyed("clickstream", USER, event(USER, 31)[:-1]),
    Keyed("clickstream", USER, event(USER, 32, event="")),
    Keyed("orders", OTHER, event(OTHER, 33, order_id=7)),
    Keyed("orders", None, event(OTHER, 34)[1:]),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Everything was sent and applied by a worker that has a secret; it has ended."""
    clickhouse_server.require()
    folder = tmp_path_factory.mktemp("pseudonyms")
    (folder / "secret").write_text(SECRET + "\n")
    with EmbeddedKafka(quiet=True) as kafka, ClickHouseServer() as server, pipeline(folder, kafka, server) as made:
        made.produce(GOOD + BAD)
        worker = made.start(SHOPSTREAM_PSEUDONYM_SECRET_FILE=str(folder / "secret"))
        try:
            until(made.applied, 240, f"everything applied\n{made.log}")
            assert worker.stop() == 0, made.log
        finally:
            worker.process.kill()
        yield made


def rejects(place: Place, *arguments: str | int, **environment: str) -> Said:
    where = {"SHOPSTREAM_WAREHOUSE": place.server.url(user="default"), "SHOPSTREAM_WAREHOUSE_PASSWORD": place.server.password}
    return shopstream("rejects", *arguments, SHOPSTREAM_BROKER=place.kafka.bootstrap, **where, **environment)


def in_kafka(place: Place, topic: str) -> list[Any]:
    """Every record of a topic."""
    consumer = KafkaConsumer(bootstrap_servers=[place.kafka.bootstrap])
    places = [TopicPartition(topic, p) for p in range(PARTITIONS)]
    consumer.assign(places)
    consumer.seek_to_beginning(*places)
    ends = consumer.end_offsets(places)
    found: list[Any] = []
    while any(consumer.position(tp) < end for tp, end in ends.items()):
        found += [r for records in consumer.poll(1000).values() for r in records]
    consumer.close()
    return found


def test_no_table_of_the_warehouse_names_a_user(place: Place) -> None:
    tables = [name for (name,) in place.warehouse.query("SELECT name FROM system.tables WHERE database = currentDatabase()")]
    assert {"rejects", "kpi_cells", "progress"} <= set(tables)
    for table in tables:
        assert "shop.example" not in repr(place.warehouse.query(f"SELECT * FROM {table}")), table
    assert place.warehouse.query("SELECT sum(value) > 0 FROM kpi_report") == [(1,)]


def test_the_same_users_records_can_be_told_from_anothers(place: Place) -> None:
    keys = Counter(key for (key,) in place.warehouse.query("SELECT key FROM rejects"))
    of = Pseudonyms(SECRET.encode()).of
    assert keys == {of(USER.encode()).decode(): 3, of(OTHER.encode()).decode(): 1, "pseudonym:": 1}


def test_the_dead_letters_have_every_byte(place: Place) -> None:
    letters = [json.loads(r.value) for topic in ("clickstream", "orders") for r in in_kafka(place, f"{topic}.rejected")]
    assert sorted(base64.b64decode(letter["raw"]) for letter in letters) == sorted(record.value for record in BAD)


def test_a_record_is_shown_from_kafka_when_asked_for(place: Place) -> None:
    newest = json.loads(rejects(place, "list", "--topic", "orders", "--json").out)["rejects"]
    place_of = [("orders", r["partition"], r["offset"]) for r in newest if r["reason"] == "wrong_type"]
    assert "in Kafka only" in rejects(place, "show", *place_of[0]).all
    said = rejects(place, "show", *place_of[0], "--from-kafka")
    assert said.code == 0, said.err
    assert OTHER in said.all
    (whole,) = json.loads(rejects(place, "show", *place_of[0], "--from-kafka", "--json").out)["rejects"]
    assert base64.b64decode(whole["raw"]) == BAD[3].value
    assert base64.b64decode(whole["key"]).decode() == OTHER


def test_a_replay_sends_what_kafka_has_and_says_what_it_has_no_more(place: Place) -> None:
    before = Counter((r.partition, r.key, r.value) for r in in_kafka(place, "clickstream"))
    said = rejects(place, "replay", "--yes", "--topic", "clickstream")
    assert said.code == 0, said.err
    assert "read again from Kafka, as user ids don't leave it: 3" in said.all
    assert "sent 3 records" in said.all
    sent = Counter((r.partition, r.key, r.value) for r in in_kafka(place, "clickstream")) - before
    assert {(key.decode(), value) for _, key, value in sent} == {(record.key, record.value) for record in BAD[:3]}
    assert {partition for partition, *_ in sent} == {partition for partition, key, _ in before if key == USER.encode()}

    admin = connect({"bootstrap_servers": [place.kafka.bootstrap]})
    admin.delete_records({TopicPartition("clickstream", p): -1 for p in range(PARTITIONS)})
    admin.close()
    said = rejects(place, "replay", "--yes", "--topic", "clickstream")
    assert said.code == 1
    assert "gone there: 3" in said.all
    assert "retention has deleted it" in said.all


def test_a_replay_without_kafka_says_so(place: Place) -> None:
    said = rejects(place, "replay", "--yes", "--broker", f"127.0.0.1:{clickhouse_server.free_port()}")
    assert said.code == 1
    assert "Traceback" not in said.all
