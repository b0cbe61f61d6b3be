"""Backed up in the middle of a day, the warehouse and the changelog destroyed, restored: every number is right, and a damaged backup writes nothing."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from kafka import KafkaAdminClient

from embedded.kafka import EmbeddedKafka
from pipeline.backup import read_manifest
from pipeline.topics import describe
from tests.command_line import Said, shopstream
from tests.faults.conftest import Build
from tests.faults.rig import SESSION_SECONDS, Rig


def command(rig: Rig, *arguments: str | Path) -> Said:
    return shopstream(
        *arguments,
        columns=300,
        SHOPSTREAM_BROKER=rig.bootstrap,
        SHOPSTREAM_APP_ID=rig.topics.app_id,
        SHOPSTREAM_CLICKSTREAM_TOPIC=rig.topics.clickstream,
        SHOPSTREAM_ORDERS_TOPIC=rig.topics.orders,
        SHOPSTREAM_WAREHOUSE=rig.url,
        SHOPSTREAM_WAREHOUSE_PASSWORD=rig.server.password,
        SHOPSTREAM_SESSION_SECONDS=str(SESSION_SECONDS),
        SHOPSTREAM_DEFINITIONS=str(rig.definitions_file),
    )


def destroy(rig: Rig) -> None:
    """Warehouse and state are gone."""
    rig.warehouse.query(f"DROP DATABASE {rig.name.replace('-', '_')}")
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
