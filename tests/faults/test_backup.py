"""Backed up in the middle of a day, everything lost later, restored: every number is right. Damaged, interrupted or half of it: said, and never wrong numbers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kafka import KafkaAdminClient

from embedded.kafka import EmbeddedKafka
from pipeline.backup import read_manifest
from pipeline.sinks.open import open_warehouse
from pipeline.sinks.shared import KEY_VARIABLE, new_key, serve
from pipeline.topics import describe
from tests.command_line import Said, shopstream
from tests.faults.conftest import Build
from tests.faults.rig import PARTITIONS, SESSION_SECONDS, Day, Rig


def environment(rig: Rig) -> dict[str, str]:
    return {
        "SHOPSTREAM_BROKER": rig.bootstrap,
        "SHOPSTREAM_APP_ID": rig.topics.app_id,
        "SHOPSTREAM_CLICKSTREAM_TOPIC": rig.topics.clickstream,
        "SHOPSTREAM_ORDERS_TOPIC": rig.topics.orders,
        "SHOPSTREAM_WAREHOUSE": rig.url,
        "SHOPSTREAM_WAREHOUSE_PASSWORD": rig.server.password,
        "SHOPSTREAM_SESSION_SECONDS": str(SESSION_SECONDS),
        "SHOPSTREAM_DEFINITIONS": str(rig.definitions_file),
    }


def command(rig: Rig, *arguments: str | Path) -> Said:
    return shopstream(*arguments, columns=300, **environment(rig))


def process(rig: Rig, *arguments: str | Path, **more: str) -> Said:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli.main", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "300"} | environment(rig) | more, check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return Said(done.returncode, done.stdout, done.stderr)


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
    rig.while_applying(everywhere=True)
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

    rig.start()
    rig.produce_aside(0.8)
    rig.settle()
    rig.stop_workers()
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
    rig.settle()
    rig.stop_workers()
    rig.check_warehouse()
    found, bad = rig.dead_letters(), rig.day.bad
    assert found.keys() == bad.keys()
    assert all(bad[raw] <= n <= 2 * bad[raw] for raw, n in found.items()), "what came after the backup is rejected again"


def test_backup_and_restore_that_are_killed_are_noticed_and_done_again(build: Build, small_day: Day, tmp_path: Path) -> None:
    """Half a backup is none. A worker that is started on half a restore refuses, and what the command says makes it whole."""
    rig = build(events=small_day)
    rig.start()
    rig.produce_aside(0.6)
    rig.while_applying(everywhere=True)
    rig.stop_workers()

    half, saved = tmp_path / "half", tmp_path / "saved"
    assert killed(rig, f"restore:{rig.random.randint(1, PARTITIONS)}", "backup", half)
    assert half.is_dir()
    said = command(rig, "restore", half)
    assert said.code == 2
    assert "is no finished backup" in said.all
    assert "overwrites nothing" in command(rig, "backup", half).all
    said = command(rig, "backup", saved)
    assert said.code == 0, said.all

    tables = sum(1 for stored in read_manifest(saved).files if stored.table)
    for number, point in enumerate(
        (f"before_insert:{rig.random.randint(2, tables)}", f"in_transaction:{rig.random.randint(1, PARTITIONS)}"), 1
    ):
        destroy(rig)
        assert killed(rig, point, "restore", saved)
        worker = rig.start()
        assert rig.exit_code(worker) == 1, f"{point}\n{rig.log}"
        assert rig.log.count("has no changelog") == number, f"{point}\n{rig.log}"
        rig.until(lambda: "has 1 worker" not in command(rig, "restore", saved).all, 30, "the group has forgotten the worker")
        said = command(rig, "restore", saved)
        assert said.code == 1
        assert "is not empty" in said.all
        assert "drop this one" in said.all
    destroy(rig)
    said = command(rig, "restore", saved)
    assert said.code == 0, said.all
    rig.start()
    rig.produce_aside(1)
    rig.finish()


def test_embedded_warehouse_is_lost_and_restored(build: Build, small_day: Day, tmp_path: Path) -> None:
    rig = build(events=small_day)
    folder, saved = tmp_path / "warehouse", tmp_path / "saved"
    with embedded(rig, folder):
        rig.warehouse.migrate()
        rig.start()
        rig.produce_aside(0.6)
        rig.while_applying(everywhere=True)
        rig.stop_workers()
    said = process(rig, "backup", saved, SHOPSTREAM_WAREHOUSE=f"chdb://{folder}")
    assert said.code == 0, said.out
    shutil.rmtree(folder)
    delete_changelog(rig)
    said = process(rig, "restore", saved, SHOPSTREAM_WAREHOUSE=f"chdb://{folder}")
    assert said.code == 0, said.out
    with embedded(rig, folder):
        rig.start()
        rig.produce_aside(1)
        rig.finish()


@contextlib.contextmanager
def embedded(rig: Rig, folder: Path) -> Iterator[None]:
    """The pipeline's warehouse is the embedded one in `folder`, which this process shares with the workers."""
    rig.warehouse.close()
    key = new_key()
    rig.warehouse = open_warehouse(f"chdb://{folder}")
    rig.settings[KEY_VARIABLE] = key
    try:
        with serve(rig.warehouse, authkey=key.encode()) as shared:
            rig.warehouse_url = shared.url
            yield
    finally:
        rig.warehouse.close()


def killed(rig: Rig, point: str, *arguments: str | Path) -> bool:
    """Whether the command killed itself at this fault point."""
    return process(rig, *arguments, SHOPSTREAM_FAULT=point).code == -signal.SIGKILL
