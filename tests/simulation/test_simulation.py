"""Whatever fails, and in whatever order, the warehouse ends with the right numbers; and what breaks the protocol is noticed."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from pipeline.partition import Flush, Partition
from pipeline.streaming.standby import Standby
from tests.seed import SEED
from tests.simulation.__main__ import simulate_many, worded
from tests.simulation.case import SMALL, T0, Case, source_record
from tests.simulation.log import Log
from tests.simulation.mutations import MUTATIONS, GoesOnAfterDeletion
from tests.simulation.schedule import Breakage, Failure, Schedule, run, shrink, simulate
from tests.simulation.worker import Records, Worker
from tests.simulation.world import REPLIED, Step

SCHEDULES = 20_000
ENOUGH = 1000
"""Schedules within which every broken protocol must be found; most are within 10, the hardest took some hundred."""
SINK_FIRST = "Rows go to the warehouse as soon as they are taken, before their transaction is committed"


@pytest.fixture(autouse=True)
def _parts_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.changelog.PART_BYTES", 900_000)  # a world sets its own; this sets it back


@pytest.mark.timeout(1200)
def test_numbers_are_right_after_any_of_twenty_thousand_schedules() -> None:
    done, failed = simulate_many(SEED, SCHEDULES, os.cpu_count() or 1)
    listed = "\n".join(f"python -m tests.simulation --seed {seed} --replay: {message}" for seed, message in failed)
    assert not failed, f"{len(failed)} of {done}:\n{listed}"
    assert done == SCHEDULES


@pytest.mark.parametrize("broken", MUTATIONS)
def test_broken_protocol_is_noticed(broken: str) -> None:
    failure = first_failure(MUTATIONS[broken])
    assert failure, f"not noticed within {ENOUGH} schedules: {broken}"
    assert not isinstance(failure.error, (TypeError, AttributeError)), (
        "what was noticed is that the breakage does not fit the code any more"
    )


def first_failure(breakage: Breakage) -> Failure | None:
    return next((failure for seed in range(ENOUGH) if (failure := simulate(seed, breakage))), None)


def test_a_failing_schedule_replays_and_becomes_small() -> None:
    breakage = MUTATIONS[SINK_FIRST]
    failure = first_failure(breakage)
    assert failure is not None
    assert str(run(failure.schedule, breakage)) == str(failure.error)
    assert run(failure.schedule) is None
    small = shrink(failure, breakage)
    assert str(run(small.schedule, breakage)) == str(small.error)
    assert len(small.schedule.case.records) <= 5
    assert len(small.schedule.steps) <= min(25, len(failure.schedule.steps)), "\n".join(map(worded, small.schedule.steps))
    for step in range(len(small.schedule.steps)):
        assert worded(small.schedule.steps[step])


def test_a_restore_outlives_the_deletion_of_what_it_reads() -> None:
    records = tuple(source_record("clickstream", 0, f"e{i}", "view_item", T0 + i, f"u{i}") for i in range(4))
    case = Case(1, 2, records, SMALL, 0, 250, 100, evict=False, compared=True, late=False)
    flushed = [("read", 0, 0, 0, 1), ("flush", 0, 0), ("go", 0, "flush", 0, REPLIED, 0), ("go", 0, "flush", 0, REPLIED, 0)]
    taking, deleting = ("go", 1, "take", 0, REPLIED, 0), ("go", 0, "delete", 0, REPLIED, 0)
    steps = [
        ("produce", 4),
        ("start", 0, 1),
        ("go", 0, "take", 0, REPLIED, 0),
        *flushed * 4,
        ("start", 1, 1),
        taking,
        deleting,
        *[taking] * 9,
    ]
    shown: list[tuple[Step, bool]] = []
    assert run(Schedule(case, tuple(steps), (0, 1, 2)), shown=shown) is None
    assert (deleting, True) in shown
    assert "does not follow" in str(run(Schedule(case, tuple(steps), (0, 1, 2)), Breakage(GoesOnAfterDeletion)))


def test_a_seed_gives_the_same_schedule_again() -> None:
    breakage = MUTATIONS[SINK_FIRST]
    first, second = first_failure(breakage), first_failure(breakage)
    assert first is not None
    assert second is not None
    assert first.schedule == second.schedule


def test_schedules_reach_what_can_go_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    committed, time_out, lost, start_producer, offer, taken_over = (
        Partition.committed, Log.time_out, Worker.lost, Log.start_producer, Worker.offer, Worker.from_standby,
    )  # fmt: skip

    def committing(self: Partition, flush: Flush) -> None:
        seen["snapshot" if flush.snapshot else "delta"] += 1
        seen["transaction with dead letters"] += any(r.topic.endswith("rejected") for r in flush.records)
        seen["transaction with re-keyed records"] += any(r.topic.endswith("rekeyed") for r in flush.records)
        committed(self, flush)

    def restoring(self: Worker, partition: Partition, records: Records) -> None:
        seen["restore"] += 1
        partition.restore(records)
        seen["restore of deltas"] += partition.flushed > 1 and not partition._snapshot_due
        seen["rows sent again"] += partition.sink_rows() is not None

    def starting(self: Log, transactional_id: str) -> object:
        coordinator = self.coordinators.get(transactional_id)
        transaction = coordinator.transaction if coordinator else None
        seen["open transaction aborted"] += transaction is not None and transaction.committed is None
        seen["decided transaction settled"] += transaction is not None and bool(transaction.committed and transaction.unmarked)
        return start_producer(self, transactional_id)

    def timing_out(self: Log, transactional_id: str) -> bool:
        found = time_out(self, transactional_id)
        seen["transaction timed out"] += found
        return found

    def losing(self: Worker, number: int) -> None:
        seen["transaction failed"] += 1
        lost(self, number)

    def offering(self: Worker, number: int, topic: str) -> bool:
        runs = self.runs[topic, number]
        seen["run of an older epoch"] += bool(runs) and not self.current(runs[0])
        return offer(self, number, topic)

    def from_standby(self: Worker, standby: Standby, rest: Records) -> Partition | None:
        seen["standby"] += 1
        seen["standby with nothing left to read"] += not rest
        partition = taken_over(self, standby, rest)
        assert partition is not None, "a standby is given up only when something is wrong"
        return partition

    monkeypatch.setattr(Worker, "from_standby", from_standby)
    monkeypatch.setattr(Partition, "committed", committing)
    monkeypatch.setattr(Worker, "restore", restoring)
    monkeypatch.setattr(Worker, "lost", losing)
    monkeypatch.setattr(Worker, "offer", offering)
    monkeypatch.setattr(Log, "start_producer", starting)
    monkeypatch.setattr(Log, "time_out", timing_out)
    for seed in range(1000):
        assert simulate(seed) is None
    assert min(seen.values()) > 0, seen
    assert seen["restore"] > 1000, seen
    assert seen["standby"] > 50, seen
    assert seen["restore of deltas"] > 100, seen
