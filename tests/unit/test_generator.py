"""The seeded shop: repeatable, valid but for what is spoiled on purpose, and with the faults it promises."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np

from generator import Faults, Message, sample, shop
from generator.bench import EVENT_BYTES, events, zipf_users
from schemas.events import TOPIC_OF_EVENT, TOPICS

CLEAN = Faults(late=0, duplicated=0, bad=0)
SAMPLE = Path(__file__).parents[2] / "sample"


def bodies(messages: list[Message]) -> list[dict[str, object]]:
    return [json.loads(message.value) for message in messages]


def test_same_seed_same_messages_another_seed_others() -> None:
    assert list(shop(1, 30, 5)) == list(shop(1, 30, 5))
    assert list(shop(1, 30, 5)) != list(shop(2, 30, 5))


def test_messages_come_in_order_of_arrival_with_the_users_id_as_key() -> None:
    messages = list(shop(3, 60, 10, faults=Faults(bad=0)))
    assert messages == sorted(messages, key=lambda m: m.arrival_ms)
    assert all(m.key.decode() == body["user_id"] for m, body in zip(messages, bodies(messages), strict=True))


def test_event_names_are_known_and_on_their_topic() -> None:
    for message in shop(4, 200, 14, faults=CLEAN):
        assert TOPICS[TOPIC_OF_EVENT[json.loads(message.value)["event"]]] == message.topic


def test_event_ids_repeat_only_in_duplicates() -> None:
    assert max(Counter(body["event_id"] for body in bodies(list(shop(5, 100, 10, faults=CLEAN)))).values()) == 1
    messages = list(shop(5, 100, 10, faults=Faults(duplicated=0.05, bad=0)))
    extra = len(messages) - len({m.value for m in messages})
    assert 0.03 < extra / len(messages) < 0.07


def test_late_events_stay_within_the_promised_delay() -> None:
    faults = Faults(late=0.2, duplicated=0, bad=0)
    delays = [m.arrival_ms - json.loads(m.value)["ts"] for m in shop(6, 100, 10, faults=faults)]
    assert max(delays) <= faults.latest_ms
    assert sum(d > 60_000 for d in delays) / len(delays) > 0.1


def test_an_order_is_created_before_it_is_paid_and_paid_before_it_is_refunded() -> None:
    first: dict[tuple[object, object], int] = {}
    for body in bodies(list(shop(7, 400, 21, faults=CLEAN))):
        if "order_id" in body:
            first.setdefault((body["order_id"], body["event"]), body["ts"])  # type: ignore[arg-type]
    paid = [(order, ts) for (order, event), ts in first.items() if event == "purchase"]
    assert len(paid) > 20
    assert all(first[order, "order_created"] < ts for order, ts in paid)
    assert all(first[order, "purchase"] <= ts for (order, event), ts in first.items() if event == "refund")


def test_bench_events_are_json_of_255_bytes_with_unique_ids() -> None:
    keys, values = events(5000, 1000, seed=3)
    assert {len(v) for v in values} == {EVENT_BYTES}
    parsed = [json.loads(v) for v in values]
    assert len({p["event_id"] for p in parsed}) == 5000
    assert [p["user_id"].encode() for p in parsed] == keys
    assert (keys, values) == events(5000, 1000, seed=3)


def test_bench_users_follow_zipfs_law() -> None:
    counts = np.sort(np.bincount(zipf_users(np.random.default_rng(1), 200_000, 10_000)))[::-1]
    assert 1.4 < counts[0] / counts[2] < 3.5  # 3 ** 0.8 = 2.41
    assert 4 < counts[9] / counts[99] < 9  # 10 ** 0.8 = 6.31


def test_bundled_sample_is_what_its_script_writes(tmp_path: Path) -> None:
    sample.write(tmp_path)
    for name in ("clickstream.ndjson.gz", "orders.ndjson.gz"):
        assert gzip.decompress((SAMPLE / name).read_bytes()) == gzip.decompress((tmp_path / name).read_bytes())
        assert (SAMPLE / name).stat().st_size < 400_000
