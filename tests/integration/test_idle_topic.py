"""A worker on a real Kafka whose orders topic stays silent: after the idle time its numbers become final, and orders that come later are judged by that."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from embedded.kafka import EmbeddedKafka
from pipeline.definitions_file import load
from pipeline.files import Keyed
from pipeline.partition import HELD_BACK
from pipeline.replay import replay
from pipeline.sinks.catalog import install
from pipeline.sinks.embedded import EmbeddedWarehouse
from pipeline.sinks.shared import new_key, serve
from pipeline.topic_names import Topics
from pipeline.topics import ensure_topics

HOUR = 3_600_000
T0 = 1_767_225_600_000  # 2026-01-01
NEWEST = T0 + 100 * HOUR
HORIZON = NEWEST - 24 * HOUR


def event(topic: str, name: str, ts: int) -> Keyed:
    return Keyed(
        topic, "u", json.dumps({"event_id": f"{name}-{ts}", "event": name, "ts": ts, "user_id": "u", "order_id": f"o{ts}"}).encode()
    )


def wait_for(what: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 240  # a first worker compiles its kernels
    while not what():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)


def test_idle_orders_hold_nothing_back_and_are_judged_by_the_horizon_when_they_come(tmp_path: Path) -> None:
    topics, key, log = Topics(app_id="idle"), new_key(), tmp_path / "worker.log"
    targets = {"clickstream": topics.clickstream, "orders": topics.orders}
    warehouse = EmbeddedWarehouse("")
    warehouse.migrate()
    install(warehouse, load(None), 1)

    def number(sql: str) -> int:
        rows = warehouse.query(sql)
        return int(rows[0][0] or 0) if rows else 0

    def watermark() -> int:
        return number("SELECT max(watermark) FROM progress")

    with EmbeddedKafka(quiet=True) as broker, serve(warehouse, authkey=key.encode()) as server, log.open("ab") as out:
        client = {"bootstrap_servers": [broker.bootstrap]}
        ensure_topics(client, topics, 1)

        def send(*events: Keyed) -> None:
            asyncio.run(replay(client, events, targets, 1, lambda *_: None))

        environment = os.environ | {
            "SHOPSTREAM_BROKER": broker.bootstrap,
            "SHOPSTREAM_APP_ID": topics.app_id,
            "SHOPSTREAM_WAREHOUSE": server.url,
            "SHOPSTREAM_WAREHOUSE_KEY": key,
            "SHOPSTREAM_METRICS_PORT": "0",
            "SHOPSTREAM_IDLE_SECONDS": "3",
        }
        send(event("clickstream", "view_item", T0), event("clickstream", "view_item", NEWEST))
        worker = subprocess.Popen([sys.executable, "-m", "pipeline.cli.main", "worker"], env=environment, stdout=out, stderr=out)
        try:
            wait_for(lambda: watermark() == HELD_BACK, log)
            assert number("SELECT max(final) FROM funnel_report") == 0
            wait_for(lambda: watermark() == NEWEST, log)
            assert warehouse.query("SELECT final FROM funnel_report WHERE funnel = 'checkout' AND step = 1 ORDER BY window_start") == [
                (1,),
                (0,),
            ]

            send(event("orders", "purchase", HORIZON - 1), event("orders", "purchase", HORIZON))
            wait_for(lambda: number("SELECT max(next_offset) FROM progress WHERE topic = 'orders'") == 2, log)
            judged = "SELECT argMax(too_late, version), argMax(applied, version) FROM progress WHERE topic = 'orders'"
            assert warehouse.query(judged) == [(1, 1)]
            assert warehouse.query("SELECT reason, offset FROM rejects") == [("too_late", 0)]
            assert watermark() == NEWEST  # never back
        finally:
            worker.terminate()
            assert worker.wait(60) == 0
            warehouse.close()
