"""Every metric is named in one file, as Prometheus wants names to be, and no label is without a bound."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import pytest

from pipeline.definitions_file import load
from pipeline.partition import Partition, Run
from pipeline.streaming.account import Account
from pipeline.streaming.changelog import Recovery
from pipeline.streaming.options import WorkerOptions
from pipeline.streaming.owner import Owned, Owner
from pipeline.streaming.readings import WorkerState
from pipeline.streaming.standby import Standby
from pipeline.streaming.watchdog import Watchdog
from pipeline.telemetry import metrics as m
from pipeline.telemetry.meter import Histogram, Meter, Reading
from pipeline.telemetry.prometheus import Exposition
from pipeline.telemetry.watched import Watch
from tests.sample_warehouse import Record

SECONDS = 1_767_225_600_000


def event(i: int, ts: int = SECONDS) -> Record:
    return Record(i, b"u", b'{"event_id":"e%d","event":"page_view","ts":%d,"user_id":"u"}' % (i, ts), SECONDS)


def worker(records: list[Record], commit: bool = True) -> WorkerState:
    """A worker that owns one partition which has applied `records`."""
    owner = Owner(load(None), WorkerOptions("nowhere"))
    partition = Partition(0, 1, owner.definitions)
    account = Account(partition, owner.meter)
    owner.owned[0] = Owned(partition, None, account, joined=True)
    owner.recoveries[0] = Recovery(seconds=0.1)
    owner.wanted, owner.held, owner.rebalances, owner.consumer = {0}, False, 1, object()
    run = Run("clickstream", 0, records, len(records), 0)
    partition.offer(run)
    account.applied(run, 0.0)
    if commit:
        flush = partition.snapshot()
        assert flush is not None
        account.snapshot()
        partition.committed(flush)
        account.committed()
    state = WorkerState(owner, Watchdog(owner, 60), Watch(None, owner.definitions, owner.meter))  # type: ignore[arg-type]
    state.warm.set()
    return state


def values(state: WorkerState) -> dict[tuple[str, tuple[str, ...]], float]:
    return {(r.metric.name, r.labels): r.value for r in state.read()[0]}


@pytest.mark.parametrize("metric", m.METRICS, ids=lambda metric: metric.name)
def test_names_follow_the_conventions(metric: m.Metric) -> None:
    assert re.fullmatch(r"shopstream_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not re.search(r"_(ms|milliseconds|minutes|kb|megabytes|percent)(_|$)", metric.name)
    if metric.unit in ("seconds", "bytes", "ratio"):
        assert metric.name.removesuffix("_total").endswith(f"_{metric.unit}")
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert metric.help.endswith(".")


def test_names_are_unique() -> None:
    assert len({metric.name for metric in m.METRICS}) == len(m.METRICS)


def test_every_label_states_its_bound_and_none_holds_what_events_bring() -> None:
    for metric in m.METRICS:
        for label in metric.labels:
            assert label.bound, (metric.name, label.name)
            assert label.name not in ("user", "user_id", "segment", "currency", "dimension", "dimension_value", "event", "offset")


def test_everything_exposed_is_named_in_the_registry() -> None:
    text = Exposition(worker([event(0), event(1)]).read).text().decode()
    families = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M)
    known = {metric.name: metric.kind for metric in m.METRICS}
    ours = {name: kind for name, kind in families if not name.startswith(m.FOREIGN)}
    assert ours
    assert all(known.get(name) == kind for name, kind in ours.items()), ours


def test_a_label_value_outside_its_bound_is_refused() -> None:
    wrong: list[Reading] = [Reading(m.REJECTED, 1, ("clickstream", "0", "made_up"))]
    with pytest.raises(ValueError, match="made_up"):
        Exposition(lambda: (wrong, ())).text()


def test_totals_are_those_of_the_last_commit() -> None:
    state = worker([event(0), event(0), Record(2, b"u", b"{", SECONDS)])
    found = values(state)
    labels = ("clickstream", "0")
    assert found[m.CONSUMED.name, labels] == 3
    assert found[m.APPLIED.name, labels] == 1
    assert found[m.DUPLICATES.name, labels] == 1
    assert found[m.REJECTED.name, (*labels, "malformed_json")] == 1
    assert values(worker([event(0)], commit=False))[m.APPLIED.name, labels] == 0


def test_totals_go_on_after_a_restore() -> None:
    owner = worker([event(0)]).owner
    first = Partition(0, 1, owner.definitions)
    first.offer(Run("clickstream", 0, [event(0), Record(1, b"u", b"{", SECONDS)], 2, 0))
    flush = first.snapshot()
    assert flush is not None
    second = Partition(0, 1, owner.definitions)
    second.restore([(r.key, r.value) for r in flush.records if r.topic == second.topics.changelog])
    states = Account(second, Meter()).states
    assert states["clickstream"].applied == 1
    assert states["clickstream"].reasons == {"malformed_json": 1}


def test_remaining_time_is_told_while_a_take_over_goes_on() -> None:
    state = worker([event(0)])
    state.owner.wanted = {0, 1}
    state.owner.recoveries[1] = Recovery(begin=100, end=500, position=500, applied=0.5, started=time.monotonic() - 11)
    found = values(state)
    assert found[m.RECOVERY_RATIO.name, ("1",)] == pytest.approx(0.55)
    assert found[m.RECOVERY_REMAINING.name, ("1",)] == pytest.approx(9, abs=1)
    assert (m.RECOVERY_REMAINING.name, ("0",)) not in found
    told = state.readiness()
    assert told.details["recovery"] == {"1": 0.55}
    assert told.details["remaining_seconds"]["1"] == pytest.approx(9, abs=1)


def test_progress_of_a_restore_goes_from_reading_to_applying() -> None:
    recovery = Recovery()
    assert (recovery.ratio, recovery.remaining) == (0, None)
    recovery.begin, recovery.position, recovery.end = 100, 300, 500
    assert recovery.ratio == pytest.approx(0.05)
    recovery.position = 500
    recovery.applying(1.0)
    assert recovery.ratio == pytest.approx(1)
    recovery.seconds = 3.0
    assert (recovery.ratio, recovery.elapsed, recovery.remaining) == (1, 3, None)


def test_standbys_are_counted_with_how_far_they_are_behind() -> None:
    state = worker([event(0)])
    standbys = state.owner.standbys
    assert values(state)[m.STANDBYS.name, ()] == 0
    standbys.following[3], standbys.lags[3] = Standby(Partition(3, 4, state.owner.definitions)), 7
    found = values(state)
    assert found[m.STANDBYS.name, ()] == 1
    assert found[m.STANDBY_LAG.name, ("3",)] == 7
    assert state.readiness().details["standby_lag"] == {"3": 7}


def test_a_partition_given_up_leaves_no_series() -> None:
    state = worker([event(0)])
    assert any("0" in labels for _, labels in values(state))
    state.owner.wanted, state.owner.owned = set(), {}
    assert not any("0" in labels for _, labels in values(state))


def test_counters_with_known_labels_begin_at_zero() -> None:
    found = values(worker([event(0)]))
    assert {labels for name, labels in found if name == m.INSERTED_ROWS.name} == {(table,) for table in m.WAREHOUSE_TABLES}
    assert found[m.SINK_ERRORS.name, ("insert", "no_answer")] == 0


def test_latency_is_observed_when_the_warehouse_acknowledges() -> None:
    state = worker([event(0)])
    account = state.owner.owned[0].account
    latency = state.owner.meter.histograms[m.LATENCY_SECONDS.name]
    assert sum(latency.counts) == 0
    account.sunk(account.flush)
    assert sum(latency.counts) == 1
    assert not account.runs
    assert account.sunk_event == SECONDS


def test_histogram_counts_a_bound_in_its_bucket() -> None:
    histogram = Histogram(m.RUN_RECORDS, [0] * (len(m.RUN_RECORDS.buckets) + 1))
    for value in (1, 2, 4, 10**9):
        histogram.observe(value)
    assert histogram.counts[:2] == [1, 2]
    assert histogram.counts[-1] == 1


def ready(**change: Any) -> Any:
    state = worker([event(0)])
    for name, value in change.items():
        setattr(state.owner, name, value)
    return state.readiness()


def test_ready_only_as_a_member_that_reads_everything_assigned() -> None:
    assert ready().good
    assert "not a member" in ready(rebalances=0).why
    assert "rebalances" in ready(held=True).why
    assert "restoring: partitions 1 are being taken over" in ready(wanted={0, 1}).why
    assert ready(wanted=set(), owned={}).good, "a member without partitions stands by"
    state = worker([event(0)])
    state.owner.hold()
    state.owner.held = False
    assert "not read yet" in state.readiness().why
    state.warm.clear()
    assert "warming up" in state.readiness().why


async def test_the_warehouse_is_asked_every_ten_seconds_and_once_rows_are_in() -> None:
    now, asked = [100.0], []

    async def in_thread(*_: Any) -> list[Reading]:
        asked.append(now[0])
        now[0] += 0.01
        return []

    watch = Watch(None, load(None), Meter(), clock=lambda: now[0])  # type: ignore[arg-type]
    inserts = (111.0, 111.5, 112.0, *np.arange(120, 126, 0.5))
    for at in np.arange(100, 136, 0.25):
        now[0] = max(at, now[0])
        await watch.look(in_thread, at in inserts)
    assert asked == [100, 110.25, 113, 123.25, 126.5], "at the start, after ten seconds, and 1 s after the last insert"


async def test_a_slow_warehouse_is_asked_seldom() -> None:
    now, asked = [100.0], []

    async def in_thread(*_: Any) -> list[Reading]:
        asked.append(now[0])
        now[0] += 2
        return []

    watch = Watch(None, load(None), Meter(), clock=lambda: now[0])  # type: ignore[arg-type]
    for at in (100, 103, 130, 141, 143):
        now[0] = at
        await watch.look(in_thread, at == 103)
    assert asked == [100, 143], "a read of 2 s is a twentieth of 40"


def test_reference_lists_every_metric() -> None:
    table = m.reference()
    assert all(f"| `{metric.name}` |" in table for metric in m.METRICS)
