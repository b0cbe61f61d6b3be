"""The ClickHouse server away, killed, overloaded, deaf or wrong: the worker waits or stops, and no number is ever wrong afterwards."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.sinks.open import open_warehouse
from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable
from tests import clickhouse_server
from tests.clickhouse_server import ClickHouseServer
from tests.faults import disk
from tests.faults.conftest import Build
from tests.faults.proxy import Proxy
from tests.faults.rig import PARTITIONS, Day, Rig

FEW_PARTS = "<merge_tree><parts_to_delay_insert>5</parts_to_delay_insert><parts_to_throw_insert>6</parts_to_throw_insert></merge_tree>"


@pytest.fixture
def fragile() -> Iterator[ClickHouseServer]:
    """A server of the case's own."""
    clickhouse_server.require()
    with ClickHouseServer(extra=FEW_PARTS) as running:
        yield running


def inserted_rows(rig: Rig) -> int:
    """By whomever, since the server has started."""
    return int(rig.warehouse.query("SELECT value FROM system.events WHERE event = 'InsertedRows'")[0][0])


def change_profile(rig: Rig, proxy: Proxy, settings: str = "") -> None:
    """Other settings for the server's users ('': the usual ones), which hold from the next connection on: the worker's is cut."""

    def refuses() -> bool:
        fresh = open_warehouse(rig.url, rig.server.password)
        try:
            return not fresh.query("SELECT 1") or bool(fresh.query("DROP TABLE IF EXISTS none_of_this_name"))
        except (SinkRefused, SinkUnavailable):
            return True
        finally:
            fresh.close()

    rig.server.set_profile(*([settings] if settings else []))
    rig.until(lambda: refuses() == bool(settings), 30, "the server has read its profile")
    proxy.cut_all()


def through(proxy: Proxy, rig: Rig) -> Rig:
    """The rig, with its workers' connections to the warehouse led through the proxy."""
    rig.warehouse_url = rig.url.replace(str(rig.server.port), str(proxy.port))
    return rig


def at_work(rig: Rig, share: float) -> subprocess.Popen[bytes]:
    """A worker in the middle of the day up to this share."""
    worker = rig.start()
    rig.produce_aside(share)
    rig.while_applying()
    return worker


def test_server_down_at_the_start_and_killed_in_the_middle(build: Build, fragile: ClickHouseServer) -> None:
    rig = build(clickhouse=fragile, settings={"SHOPSTREAM_SINK_LAG_SECONDS": "1"})
    fragile.stop()
    rig.start()
    rig.produce(0.3)
    rig.until(lambda: "can't be reached" in rig.log, 60, "the worker says what it waits for")
    fragile.start()
    rig.produce_aside(0.6)
    rig.while_applying()
    fragile.kill()
    rig.produce(0.8)
    rig.until(lambda: "consumption waits for the warehouse" in rig.log, 60, "consumption waits")
    fragile.start()
    rig.produce_aside(1)
    rig.finish()


def test_replies_lost_after_the_insert_was_applied(build: Build, fragile: ClickHouseServer) -> None:
    with Proxy(fragile.port) as proxy:
        rig = through(proxy, build(clickhouse=fragile))
        rig.start()
        for part in range(1, 5):
            inserting = False

            def data_of_an_insert(sent: bytes) -> bool:
                nonlocal inserting
                if b"INSERT INTO" in sent:
                    inserting = True
                    return False
                return inserting

            proxy.cut_reply_after = data_of_an_insert
            rig.produce(part / 5)
            rig.until(lambda part=part: proxy.cuts >= part, 60, f"reply {part} was cut")  # type: ignore[misc]
        rig.produce(1)
        rig.finish()
    assert proxy.cuts == 4
    assert "does not answer" in rig.log


def test_inserts_that_come_again_after_hundreds_of_others_change_nothing(build: Build, small_day: Day, server: ClickHouseServer) -> None:
    """A network that holds inserts back for longer than any deduplication window, while the worker runs and after it has ended."""

    with Proxy(server.port) as proxy:
        rig = through(proxy, build(events=small_day, settings={"SHOPSTREAM_FLUSH_SECONDS": "0.05"}))
        rig.start()
        rig.produce(0.2)
        rig.while_applying()
        proxy.cut_all()
        early = len(proxy.conversations)

        def since() -> int:
            return sum(len(later.inserts) for later in proxy.conversations[early:])

        while (known := since()) < 200:
            rig.produce(rig.produced / len(rig.day.messages) + 0.004)
            rig.until(lambda known=known: since() >= known + 2, 60, "more inserts")  # type: ignore[misc]
        assert sum(late.insert_again(server.port) for late in proxy.conversations[:early]) > 0
        rig.produce_aside(1)
        rig.settle()
        rig.stop_workers()
        before = inserted_rows(rig)
        assert sum(late.insert_again(server.port) for late in reversed(proxy.conversations)) > 200
        assert inserted_rows(rig) > before
    rig.check()


def test_worker_ended_while_the_server_is_away_loses_nothing(build: Build, fragile: ClickHouseServer) -> None:
    rig = build(clickhouse=fragile)
    worker = at_work(rig, 0.6)
    fragile.kill()
    rig.produce_aside(0.7)
    rig.until(lambda: "does not take rows" in rig.log, 60, "rows wait for the warehouse")
    worker.terminate()
    assert rig.exit_code(worker, 90) == 0, rig.log
    assert "the warehouse is away" in rig.log
    fragile.start()
    rig.start()
    rig.produce_aside(1)
    rig.finish()


def test_too_many_parts_slows_down_and_loses_nothing(build: Build, fragile: ClickHouseServer) -> None:
    rig = build(clickhouse=fragile)
    rig.warehouse.query("SYSTEM STOP MERGES")
    rig.start()
    applied = 0
    for part in range(1, 9):
        rig.produce(part / 10)
        rig.until(lambda applied=applied: "Too many parts" in rig.log or rig.applied() > applied, 60, "more is applied")
        applied = rig.applied()
        if "Too many parts" in rig.log:
            break
    assert "Too many parts" in rig.log
    rig.warehouse.query("SYSTEM START MERGES")
    rig.produce(1)
    rig.finish()


def test_memory_limit_of_the_server_is_waited_for(build: Build, small_day: Day, fragile: ClickHouseServer) -> None:
    with Proxy(fragile.port) as proxy:
        rig = through(proxy, build(clickhouse=fragile, events=small_day))
        worker = at_work(rig, 0.4)
        change_profile(rig, proxy, "<max_memory_usage>1</max_memory_usage>")
        rig.produce(0.7)
        rig.until(lambda: "Code: 241" in rig.log, 60, "the memory limit is hit")
        change_profile(rig, proxy)
        rig.produce_aside(1)
        rig.finish()
    assert worker.returncode == 0


def test_read_only_server_stops_the_worker_and_nothing_is_skipped(build: Build, small_day: Day, fragile: ClickHouseServer) -> None:
    with Proxy(fragile.port) as proxy:
        rig = through(proxy, build(clickhouse=fragile, events=small_day))
        worker = at_work(rig, 0.4)
        change_profile(rig, proxy, "<readonly>1</readonly>")
        rig.produce(0.7)
        assert rig.exit_code(worker) == 1, rig.log
        assert "Code: 164" in rig.log
        assert "nothing is lost: mend that" in rig.log
        assert "Traceback" not in rig.log
        change_profile(rig, proxy)
        rig.start()
        rig.produce_aside(1)
        rig.finish()


def test_wrong_password_stops_at_once(build: Build, fragile: ClickHouseServer) -> None:
    rig = build(clickhouse=fragile)
    started = time.monotonic()
    worker = rig.start(SHOPSTREAM_WAREHOUSE_PASSWORD="wrong")
    assert rig.exit_code(worker) == 1, rig.log
    assert "password" in rig.log.lower()
    assert "Traceback" not in rig.log
    assert "trying again" not in rig.log
    assert time.monotonic() - started < 60


def test_column_of_another_type_stops_the_worker_and_skips_nothing(build: Build, fragile: ClickHouseServer) -> None:
    rig = build(clickhouse=fragile)
    worker = at_work(rig, 0.6)
    rig.warehouse.query("RENAME TABLE rejects TO rejects_kept")
    rig.warehouse.query("CREATE TABLE rejects (topic Array(UInt8), partition UInt32) ENGINE = Memory")
    rig.produce(0.9)
    assert rig.exit_code(worker) == 1, rig.log
    rig.warehouse.query("DROP TABLE rejects")
    rig.warehouse.query("RENAME TABLE rejects_kept TO rejects")
    rig.start()
    rig.produce(1)
    rig.finish()
    assert len({row[0] for row in rig.warehouse.query('SELECT DISTINCT "partition" FROM progress')}) == PARTITIONS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[ClickHouseServer]:
    """A server on a file system of 256 MiB."""
    clickhouse_server.require()
    folder = tmp_path / "small"
    folder.mkdir()
    with disk.small(folder, 256), ClickHouseServer(within=folder) as server:
        yield server


def test_full_disk_of_the_server_is_waited_for(build: Build, small_disk: ClickHouseServer) -> None:
    rig = build(clickhouse=small_disk)
    worker = at_work(rig, 0.4)
    ballast = disk.fill(small_disk.folder)
    rig.produce(0.7)
    rig.until(lambda: "does not take rows" in rig.log, 60, "the disk is full")
    time.sleep(3)
    ballast.unlink()
    rig.produce(1)
    rig.finish()
    assert worker.returncode == 0


def test_table_dropped_stops_the_worker_until_it_is_there_again(build: Build, fragile: ClickHouseServer) -> None:
    rig = build(clickhouse=fragile)
    worker = at_work(rig, 0.6)
    rig.warehouse.query("RENAME TABLE kpi_cells TO gone")
    rig.produce(0.9)
    assert rig.exit_code(worker) == 1, rig.log
    assert "kpi_cells" in rig.log
    assert "Traceback" not in rig.log
    rig.warehouse.query("RENAME TABLE gone TO kpi_cells")
    rig.start()
    rig.produce(1)
    rig.finish()
