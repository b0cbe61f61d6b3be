"""Producers that misbehave, through a whole worker: floods of rejects, giant records, clocks that jump, event ids used again."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import msgspec
import numpy as np
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ConfigResource, ConfigResourceType

from pipeline.files import Keyed
from pipeline.tables.hashes import murmur2_partitions, text_rows
from tests.faults.conftest import Build
from tests.faults.rig import PARTITIONS, Day, Rig, day_of, is_good

HOUR_MS = 3_600_000
GIANT_BYTES = 50 << 20
KEPT_BYTES = 1 << 20


def partition_of(key: str) -> int:
    out = np.zeros(1, np.int32)
    murmur2_partitions(*text_rows([key]), PARTITIONS, out)
    return int(out[0])


def view_of(message: Keyed, event_id: str, **changed: object) -> Keyed:
    """One more page view of the same user."""
    body = msgspec.json.decode(message.value)
    names = ("user_id", "anonymous_id", "session_id", "ts")
    view = {name: body[name] for name in names if name in body} | {"event": "page_view", "event_id": event_id} | changed
    return message._replace(value=msgspec.json.encode(view))


def test_flood_of_rejects_stops_the_topic_and_nothing_is_lost(build: Build, small_day: Day) -> None:
    messages = small_day.messages
    at = len(messages) // 3
    flooded = next(m for m in messages[at:] if m.topic == "clickstream" and m.key)
    flood = [flooded._replace(value=b'{"event_id": "spoilt-%d", "event"' % i) for i in range(20_000)]
    events = replace(small_day, messages=[*messages[:at], *flood, *messages[at:]])
    events.bad.update(m.value for m in flood)
    try:
        rig = build(events=events)
        worker = rig.start()
        rig.produce(1)
        stopped = f"consumption of {rig.topics.clickstream}[{partition_of(flooded.key or '')}] stopped"
        rig.until(lambda: stopped in rig.log, 60, "the brake is on")
        rig.until(lambda: rig.applied() > at, 60, "the other partitions go on")
        worker.terminate()
        assert rig.exit_code(worker) == 0, rig.log
        assert rig.log.count("consumption of") == 1
        rig.start(SHOPSTREAM_BRAKE_RATIO="1")
        rig.finish()
    finally:
        events.bad.subtract(m.value for m in flood)


def test_giant_records_are_rejected_and_their_neighbours_count(build: Build, small_day: Day) -> None:
    """Kafka takes them only when the topic was told to."""
    key = next(m.key for m in small_day.messages if m.topic == "clickstream" and m.key)
    giants = [b'{"event_id": "giant-%d", "pad": "' % i + b"x" * GIANT_BYTES + b'"}' for i in range(2)]
    rig = build(events=replace(small_day, bad=small_day.bad + type(small_day.bad)(g[:KEPT_BYTES] for g in giants)))
    allow(rig, 2 * GIANT_BYTES)
    rig.start()
    for giant, share in zip(giants, (0.3, 0.6), strict=True):
        rig.produce(share)
        producer = KafkaProducer(bootstrap_servers=[rig.bootstrap], max_request_size=2 * GIANT_BYTES, request_timeout_ms=60_000)
        producer.send(rig.topics.clickstream, key=key.encode(), value=giant).get(60)
        producer.close()
    rig.produce(1)
    rig.settle()
    rig.stop_workers()
    rig.day.messages.extend(Keyed("clickstream", key, giant) for giant in giants)
    rig.produced += len(giants)
    try:
        rig.check()
    finally:
        del rig.day.messages[-len(giants) :]


def allow(rig: Rig, size: int) -> None:
    admin = KafkaAdminClient(bootstrap_servers=[rig.bootstrap])
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, rig.topics.clickstream, configs={"max.message.bytes": str(size)})])
    admin.close()


def test_producers_whose_clocks_jump(build: Build, small_day: Day) -> None:
    """An hour ahead, an hour behind, most of a day behind: all count. More than the lateness behind: all are in the dead letters."""
    newest: defaultdict[int, int] = defaultdict(int)
    messages: list[Keyed] = []
    too_late: list[bytes] = []
    for i, m in enumerate(small_day.messages):
        messages.append(m)
        if m.topic != "clickstream" or not m.key or not is_good(m.value):
            continue
        partition = partition_of(m.key)
        newest[partition] = max(newest[partition], msgspec.json.decode(m.value)["ts"])
        if i % 50 == 0:
            hours = (1, -1, -22, -26)[i // 50 % 4]
            jumped = view_of(m, f"jump-{i}", ts=newest[partition] + hours * HOUR_MS)
            messages.append(jumped)
            if hours == -26:
                too_late.append(jumped.value)
    assert len(too_late) > 100
    rig = build(events=day_of(messages, too_late))
    rig.start()
    rig.start()
    rig.produce(1)
    rig.finish()


def test_event_id_used_again(build: Build, small_day: Day) -> None:
    """In the same partition it is the same event, across a restart too; under a user of another partition it is another event."""
    half = len(small_day.messages) // 2
    first = next(m for m in reversed(small_day.messages[:half]) if m.topic == "clickstream" and m.key and is_good(m.value))
    elsewhere = next(
        m
        for m in small_day.messages[half:]
        if m.topic == "clickstream" and m.key and is_good(m.value) and partition_of(m.key) != partition_of(first.key or "")
    )
    ts = msgspec.json.decode(elsewhere.value)["ts"] + 1  # at the same instant the ids would decide which of the two comes first
    used_again = view_of(elsewhere, msgspec.json.decode(first.value)["event_id"], ts=ts)
    told_apart = view_of(elsewhere, "another-id", ts=ts)
    begin, end = small_day.messages[:half], small_day.messages[half:]
    end.insert(end.index(elsewhere) + 1, used_again)
    truth = day_of([*begin, first, *(told_apart if m is used_again else m for m in end)])
    rig = build(events=replace(truth, messages=[*begin, first, *end]))
    worker = rig.start()
    rig.produce(half / len(rig.day.messages))
    rig.settle()
    worker.terminate()
    assert rig.exit_code(worker) == 0, rig.log
    rig.start()
    rig.produce(1)
    rig.finish()
