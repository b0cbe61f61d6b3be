"""`shopstream rebuild` beside live workers: one instant shows all new numbers, each equals SQL over the raw events, and every dead letter is sent once."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

from embedded.kafka import EmbeddedKafka
from pipeline.sinks.open import open_warehouse
from pipeline.sinks.revisions import in_force
from pipeline.topics import connect, members
from tests.faults.conftest import Build
from tests.faults.rig import DEFINITIONS, PARTITIONS, Day, Rig, day_of, make_day
from tests.integration.driving import reported, same
from tests.seed import SEED

NEW_FUNNEL = """
[[funnel]]
name = "from_search"
conversion_window = "1d"
[[funnel.step]]
event = "search"
[[funnel.step]]
event = "purchase"
"""
CHANGED = DEFINITIONS + NEW_FUNNEL


@pytest.fixture(scope="module")
def some_day() -> Day:
    return make_day(SEED, users=600)


def command(rig: Rig, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli.main", *arguments],
        env=rig.environment(COLUMNS="300"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def rebuild(rig: Rig, *arguments: str) -> subprocess.Popen[str]:
    return command(rig, "rebuild", *(arguments or ("--from", "earliest")))


def ended(process: subprocess.Popen[str], code: int | None = 0, seconds: float = 120) -> str:
    """What it said; with `code` None it may have ended as it likes."""
    said, _ = process.communicate(timeout=seconds)
    assert code in (None, process.returncode), said
    return said


def admin_of(rig: Rig) -> closing[Any]:
    return closing(connect({"bootstrap_servers": rig.servers}))


def caught_up(rig: Rig, share: float) -> subprocess.Popen[bytes]:
    """A worker, the day up to this share in the warehouse."""
    worker = rig.start()
    rig.produce(share)
    rig.settle()
    return worker


@contextmanager
def watched(rig: Rig) -> Iterator[list[dict[str, int]]]:
    """What readers see all the time: users of each funnel's first step, and the events applied."""
    seen: list[dict[str, int]] = []
    over = threading.Event()
    reader = open_warehouse(rig.url, rig.server.password)

    def read() -> None:
        while not over.wait(0.1):
            rows = reader.query("SELECT funnel, sum(users) FROM funnel_report WHERE step = 1 GROUP BY funnel")
            applied = reader.query("SELECT sum(applied) FROM current_progress")
            seen.append({str(name): int(users) for name, users in rows} | {"": int(applied[0][0])})

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        reader.close()


def test_new_definitions_are_computed_beside_live_workers_and_swapped_in(build: Build, some_day: Day) -> None:
    rig = build(events=some_day)
    rig.start()
    caught_up(rig, 0.5)
    rig.definitions = CHANGED
    with watched(rig) as seen:
        rig.produce_aside(0.8)
        print(ended(rebuild(rig)))
        rig.produce_aside(1)
        rig.settle()
    assert in_force(rig.warehouse) == 1
    names = [set(row) for row in seen]
    assert all(names[0] <= more for more in names), "no report lost a name"
    assert "from_search" in names[-1] - names[0]
    for name in names[0]:
        for before, after in pairwise(seen):
            assert before[name] * 0.98 <= after[name] <= seen[-1][name], (name, before, after)
    assert all(worker.poll() is None for worker in rig.workers), rig.log
    rig.stop_workers()
    rig.day = day_of(some_day.messages, definitions=CHANGED)
    rig.check()
    assert rig.log.count("going over to the revision in force") == 2
    print(ended(rebuild(rig, "--drop-old")))
    rig.until(lambda: len(rig.warehouse.query("SELECT DISTINCT revision FROM progress")) == 1, 30, "old rows are deleted")
    backed_up_and_restored(rig)
    rig.start()
    rig.until(lambda: "1 worker in group" in ended(command(rig, "doctor"), None), 30, "doctor sees the worker of revision 1")
    rig.finish()


def backed_up_and_restored(rig: Rig) -> None:
    folder = str(rig.folder / "saved")
    ended(command(rig, "backup", folder))
    rig.warehouse.query(f"DROP DATABASE {rig.name.replace('-', '_')}")
    changelog = rig.topics.at(1).changelog
    with admin_of(rig) as admin:
        admin.delete_topics([changelog])
        rig.until(lambda: changelog not in admin.list_topics(), 30, "the changelog is deleted")
    ended(command(rig, "restore", folder))
    assert f"present  {changelog}" in ended(command(rig, "topics"))


def test_interrupted_at_any_moment_nothing_changes_and_the_same_command_goes_on(build: Build, some_day: Day) -> None:
    rig = build(events=some_day)
    live = caught_up(rig, 0.7)
    for name in ("SHOPSTREAM_FAULT", ""):
        rig.settings = {name: "before_insert:2:stop"} if name else {}
        running = rebuild(rig)
        assert running.stdout is not None
        assert "computing revision 1" in running.stdout.readline()
        if name:  # its worker is frozen in the middle
            rig.until(lambda: rig.warehouse.query("SELECT count() FROM progress WHERE revision = 1") != [(0,)], 60, "something is computed")
            running.kill()
            running.communicate()
        else:
            running.send_signal(signal.SIGINT)
            assert "the same command goes on" in ended(running, 128 + signal.SIGINT)
        assert in_force(rig.warehouse) == 0
        assert live.poll() is None
    rig.produce(0.8)
    assert "revision 1 is in force and its workers are at work" in ended(rebuild(rig))
    rig.produce(1)
    rig.finish()


def test_broker_is_away_before_the_swap_and_after_it(build: Build, some_day: Day, fragile_broker: EmbeddedKafka) -> None:
    rig = build(bootstrap=fragile_broker.bootstrap, events=some_day)
    live = caught_up(rig, 0.7)
    running = rebuild(rig)
    assert running.stdout is not None
    for said in ("computing revision 1", "revision 1 is in force"):
        while said not in (line := running.stdout.readline()):
            assert line, "it ended"
        fragile_broker.kill()
        time.sleep(rig.random.uniform(5, 15))
        rig.bring_back(fragile_broker)
    rig.produce_aside(1)
    assert "revision 1 is in force and its workers are at work" in ended(running)
    rig.finish(lived=[live])


def forgotten(rig: Rig, revision: int) -> None:
    """A worker that ended itself is a member until its session is over; a rebuild would wait for it to go over."""
    with admin_of(rig) as admin:
        rig.until(lambda: not members(admin, rig.topics.at(revision).app_id), 30, "the group has forgotten the worker that ended")


def test_partitions_added_and_a_table_dropped(build: Build, some_day: Day) -> None:
    rig = build(events=some_day)
    caught_up(rig, 0.5)
    rig.stop_workers()
    with admin_of(rig) as admin:
        admin.create_partitions(dict.fromkeys((rig.topics.clickstream, rig.topics.orders), PARTITIONS + 1))
    rig.partitions = PARTITIONS + 1
    rig.produce(0.8)
    worker = rig.start()
    assert rig.exit_code(worker) == 1, rig.log
    assert "shopstream rebuild --from earliest" in rig.log

    forgotten(rig, 0)
    said = ended(rebuild(rig))
    assert "revision 1 is in force, but no worker runs" in said
    worker = caught_up(rig, 0.9)

    rig.warehouse.query("DROP TABLE kpi_cells")
    rig.produce(1)
    assert rig.exit_code(worker) == 1, rig.log
    assert "`shopstream migrate --repair` makes it again" in rig.log
    ended(command(rig, "migrate", "--repair"))
    forgotten(rig, 1)
    assert "revision 2 is in force" in ended(rebuild(rig))
    rig.start()
    rig.finish()


def test_from_a_date_leaves_earlier_windows_alone_and_says_from_when_it_can_be_done(build: Build, some_day: Day) -> None:
    rig = build(events=some_day)
    caught_up(rig, 0.9)
    first, *_, last = sorted({key[1] for key in some_day.truth[0]})
    delete_before_the_middle(rig)
    said = ended(rebuild(rig, "--from", iso(first)), 2)
    begin = re.search(r"on it does: --from (\S+)\.", said)
    assert begin is not None, said
    since = int(datetime.fromisoformat(begin[1] + "+00:00").timestamp() * 1000)
    assert first < since < last
    before = earlier(reported(rig.warehouse), since)
    assert "stay as they are at the swap" in ended(rebuild(rig, "--from", begin[1]))
    rig.produce(1)
    rig.settle()
    rig.stop_workers()
    found = reported(rig.warehouse)
    assert all(len(rows) > 50 for rows in before[::2])
    for kind, now, then in zip(("funnels", "retentions", "KPIs"), earlier(found, since), before, strict=True):
        same(f"{kind} of earlier windows", now, then)
    same("funnels", later(found[0], since), later(some_day.truth[0], since))
    of_events = {key: value for key, value in some_day.truth[2].items() if key[0] in ("visitors", "buyers", "revenue")}
    assert of_events
    same("KPIs", {key: value for key, value in later(found[2], since).items() if key in of_events}, later(of_events, since))
    assert rig.dead_letters() == some_day.bad


def delete_before_the_middle(rig: Rig) -> None:
    """Retention has taken the first half of each partition."""
    places = [TopicPartition(topic, p) for topic in (rig.topics.clickstream, rig.topics.orders) for p in range(PARTITIONS)]
    with closing(KafkaConsumer(bootstrap_servers=rig.servers)) as consumer, admin_of(rig) as admin:
        admin.delete_records({place: end // 2 for place, end in consumer.end_offsets(places).items()})


def iso(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M")


def later(rows: dict[Any, Any], since: int) -> dict[Any, Any]:
    return {key: value for key, value in rows.items() if start_of(key) >= since}


def earlier(reports: tuple[dict[Any, Any], ...], since: int) -> list[dict[Any, Any]]:
    return [{key: value for key, value in rows.items() if start_of(key) < since} for rows in reports]


def start_of(key: tuple[Any, ...]) -> int:
    return next(part for part in key if isinstance(part, int) and part > 10**11)
