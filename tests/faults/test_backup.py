"""Backed up in the middle of a day, the warehouse and the changelog destroyed, restored: every number is right, and a damaged backup writes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from embedded.kafka import EmbeddedKafka
from pipeline.backup import MANIFEST, read_manifest
from pipeline.topics import describe
from tests.command_line import Said, shopstream
from tests.faults.conftest import Build
from tests.faults.rig import PARTITIONS, SESSION_SECONDS, Rig


def environment(rig: Rig, warehouse: str = "") -> dict[str, str]:
    return {
        "SHOPSTREAM_BROKER": rig.bootstrap,
        "SHOPSTREAM_APP_ID": rig.topics.app_id,
        "SHOPSTREAM_CLICKSTREAM_TOPIC": rig.topics.clickstream,
        "SHOPSTREAM_ORDERS_TOPIC": rig.topics.orders,
        "SHOPSTREAM_WAREHOUSE": warehouse or rig.url,
        "SHOPSTREAM_WAREHOUSE_PASSWORD": rig.server.password,
        "SHOPSTREAM_SESSION_SECONDS": str(SESSION_SECONDS),
        "SHOPSTREAM_DEFINITIONS": str(rig.definitions_file),
    }


def command(rig: Rig, *arguments: str | Path) -> Said:
    return shopstream(*arguments, columns=300, **environment(rig))


def process(rig: Rig, *arguments: str | Path, warehouse: str = "") -> subprocess.Popen[str]:
    """The same in a process of its own, which can be killed."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli.main", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "300"} | environment(rig, warehouse), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def half_way_and_stopped(rig: Rig) -> None:
    """60% produced, some of it applied, no worker running."""
    rig.start()
    rig.produce_aside(0.6)
    rig.while_applying()
    rig.stop_workers()


def destroy(rig: Rig) -> None:
    """Warehouse and state are gone."""
    rig.warehouse.query(f"DROP DATABASE {rig.name.replace('-', '_')}")
    delete_changelog(rig)


def delete_changelog(rig: Rig) -> None:
    admin = KafkaAdminClient(bootstrap_servers=[rig.bootstrap])
    try:
        admin.delete_topics([rig.topics.changelog])
        rig.until(lambda: rig.topics.changelog not in admin.list_topics(), 30, "the changelog is deleted")
    finally:
        admin.close()


def test_backed_up_in_the_middle_destroyed_restored_and_gone_on(build: Build, kafka: EmbeddedKafka, tmp_path: Path) -> None:
    rig = build()
    saved = tmp_path / "saved"
    rig.start()
    rig.produce_aside(0.6)
    rig.while_applying()
    said = command(rig, "backup", saved)
    assert said.code == 1
    assert "has 1 worker: stop them" in said.all
    assert not saved.exists()
    rig.stop_workers()
    said = command(rig, "backup", saved)
    assert said.code == 0, said.all
    print(said.out)
    assert all(positions for positions in read_manifest(saved).positions)
    assert "overwrites nothing" in command(rig, "backup", saved).all

    said = command(rig, "restore", saved)
    assert said.code == 1
    assert "is not empty" in said.all

    rig.produce(0.8)
    destroy(rig)

    damaged = tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    victim = max(damaged.glob("state-*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    said = command(rig, "restore", damaged)
    assert said.code == 1
    assert f"{victim.name} is damaged" in said.all
    assert describe({"bootstrap_servers": [rig.bootstrap]}, rig.topics)[rig.topics.changelog] == 0

    began = time.monotonic()
    said = command(rig, "restore", saved)
    assert said.code == 0, said.all
    print(said.out, f"{time.monotonic() - began:.1f} s")
    rig.start()
    rig.produce_aside(1)
    rig.finish()


def test_workers_went_on_after_the_backup_and_everything_is_lost(build: Build, tmp_path: Path) -> None:
    """What came after the backup is read from Kafka again. The dead-letter topics, which no backup undoes, hold its bad ones twice."""
    rig = build()
    half_way_and_stopped(rig)
    assert command(rig, "backup", tmp_path / "saved").code == 0
    rig.start()
    rig.produce_aside(0.8)
    rig.settle()
    rig.stop_workers()
    destroy(rig)
    said = command(rig, "restore", tmp_path / "saved")
    assert said.code == 0, said.all
    rig.start()
    rig.produce_aside(1)
    rig.settle()
    rig.stop_workers()
    rig.check_warehouse()
    found = rig.dead_letters()
    assert found.keys() == rig.day.bad.keys()
    assert all(rig.day.bad[raw] <= n <= 2 * rig.day.bad[raw] for raw, n in found.items())


def test_backup_that_was_killed_is_no_backup(build: Build, tmp_path: Path) -> None:
    rig = build()
    half_way_and_stopped(rig)
    saving = process(rig, "backup", tmp_path / "killed")
    rig.until(lambda: any((tmp_path / "killed").glob("*")), 60, "the backup has begun")
    time.sleep(rig.random.uniform(0, 0.3))
    saving.kill()
    saving.wait()
    assert not (tmp_path / "killed" / MANIFEST).exists()
    said = command(rig, "restore", tmp_path / "killed")
    assert said.code == 2
    assert "is no finished backup" in said.all
    assert "overwrites nothing" in command(rig, "backup", tmp_path / "killed").all
    assert command(rig, "backup", tmp_path / "saved").code == 0


@pytest.mark.parametrize("phase", ["warehouse", "state"])
def test_restore_that_was_killed_is_noticed_and_done_again(build: Build, tmp_path: Path, phase: str) -> None:
    """A worker that is started on it all the same refuses, or is right; what the command says makes it whole."""
    rig = build()
    half_way_and_stopped(rig)
    assert command(rig, "backup", tmp_path / "saved").code == 0
    destroy(rig)

    def begun() -> bool:
        if phase == "warehouse":
            found = rig.warehouse.query(
                "SELECT sum(rows) FROM system.parts WHERE database = %(name)s", {"name": rig.name.replace("-", "_")}
            )
            return int(found[0][0] or 0) > 20  # what the migrations insert
        try:
            consumer = KafkaConsumer(bootstrap_servers=rig.servers)
            return any(consumer.end_offsets([TopicPartition(rig.topics.changelog, n) for n in range(PARTITIONS)]).values())
        finally:
            consumer.close()

    restoring = process(rig, "restore", tmp_path / "saved")
    rig.until(begun, 60, f"the {phase} is being written")
    time.sleep(rig.random.uniform(0, 0.2))
    restoring.kill()
    restoring.wait()

    worker = rig.start()
    refused = worker.wait(60) == 1 if phase == "warehouse" else None
    assert refused
    assert "has no changelog" in rig.log

    said = command(rig, "restore", tmp_path / "saved")
    assert said.code == 1
    assert "is not empty" in said.all
    assert "drop this one" in said.all
    destroy(rig)
    said = command(rig, "restore", tmp_path / "saved")
    assert said.code == 0, said.all
    rig.start()
    rig.produce_aside(1)
    rig.finish()
