"""`shopstream run --broker`: on a Kafka that is there it works under names of its own and takes them away again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kafka import KafkaAdminClient

from embedded.kafka import EmbeddedKafka
from generator import Faults, shop
from pipeline.definitions_file import load
from pipeline.sinks.embedded import EmbeddedWarehouse
from pipeline.topic_names import Topics
from pipeline.topics import ensure_topics
from tests.integration.test_against_sql import reported, same
from tests.oracle.sql import Oracle


def test_numbers_equal_sql_and_the_brokers_topics_are_as_before(tmp_path: Path) -> None:
    messages = list(shop(21, 40, 6, faults=Faults(bad=0)))
    for topic in ("clickstream", "orders"):
        (tmp_path / f"{topic}.ndjson").write_bytes(b"\n".join(m.value for m in messages if m.topic == topic))
    with EmbeddedKafka(quiet=True) as broker:
        client = {"bootstrap_servers": [broker.bootstrap]}
        ensure_topics(client, Topics(), 2)  # someone else's, of the same names as the defaults
        admin = KafkaAdminClient(**client)
        before = set(admin.list_topics())
        command = [sys.executable, "-m", "pipeline.cli.main", "run", "--broker", broker.bootstrap, "--partitions", "3"]
        command += ["--clickstream", str(tmp_path / "clickstream.ndjson"), "--orders", str(tmp_path / "orders.ndjson")]
        command += ["--warehouse", str(tmp_path / "warehouse")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        after = {topic for topic in admin.list_topics() if not topic.startswith("__")}
        admin.close()
    assert after == {topic for topic in before if not topic.startswith("__")}
    warehouse = EmbeddedWarehouse(str(tmp_path / "warehouse"))
    try:
        found = reported(warehouse)
    finally:
        warehouse.close()
    truth = EmbeddedWarehouse("")
    try:
        oracle = Oracle(truth.query, load(None), [(m.topic, m.value) for m in messages])
        same("funnel_report", found[0], oracle.funnels())
        same("retention_report", found[1], oracle.retentions())
        same("kpi_report", found[2], oracle.kpis())
    finally:
        truth.close()
