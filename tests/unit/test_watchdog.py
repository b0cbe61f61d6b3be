"""Stuck is: behind at every probe for long enough, the committed offset not moving, and nothing to wait for."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from aiokafka.structs import TopicPartition

from pipeline.streaming.changelog import Recovery
from pipeline.streaming.watchdog import LoopGuard, Seen, Stalls, Watchdog, probe_seconds, stalls_after, stuck
from tests.unit.test_metrics import event, worker

TP = TopicPartition("clickstream", 0)


def after(*probes: tuple[float, Seen | None]) -> Stalls:
    """None: the probe failed."""
    stalls: Stalls = {}
    for now, seen in probes:
        stalls = stalls_after(stalls, {TP: seen}, now) if seen is not None else {}
    return stalls


def test_behind_without_movement_is_stuck_after_the_time() -> None:
    stalls = after((0, Seen(10, 5)), (60, Seen(20, 5)), (119, Seen(30, 5)))
    assert not stuck(stalls, 119, 120)
    assert stuck(stalls, 120, 120) == [TP]


@pytest.mark.parametrize(
    "between",
    [Seen(20, 6), Seen(5, 5), Seen(20, 5, "the group rebalances"), None],
    ids=["moved", "caught up", "waits", "outage"],
)
def test_one_good_probe_begins_anew(between: Seen | None) -> None:
    assert not stuck(after((0, Seen(10, 5)), (60, between), (75, Seen(10, 5)), (130, Seen(10, 5))), 130, 120)


def test_a_shorter_time_is_looked_at_more_often() -> None:
    assert [probe_seconds(seconds) for seconds in (120, 60, 8, 0)] == [15, 15, 2, 15]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def watched(**change: Any) -> tuple[Watchdog, list[str], Clock]:
    owner = worker([event(0)]).owner
    for name, value in change.items():
        setattr(owner, name, value)
    ended: list[str] = []
    clock = Clock()
    return Watchdog(owner, 60, end=ended.append, clock=clock), ended, clock


def probe(dog: Watchdog, clock: Clock, until: float, end: int = 100, step: float = 15) -> None:
    while clock.now < until:
        clock.now += step
        dog.judge({TP: end})


def test_ends_a_worker_that_stands_still() -> None:
    dog, ended, clock = watched()
    probe(dog, clock, 75)
    assert dog.health().good
    probe(dog, clock, 90)
    assert not dog.health().good
    assert not ended, "the verdict is confirmed once"
    probe(dog, clock, 105)
    assert "clickstream[0] has been at offset 1 of 100" in ended[0]


def test_says_nothing_of_the_time_after_the_last_probe() -> None:
    """The broker does not answer any more, and the probe waits for it: that was taken for standing still."""
    dog, _, clock = watched()
    probe(dog, clock, 45)
    clock.now += 60
    assert dog.health().good
    assert dog.stalled_seconds(TP) == 15


def test_ends_a_worker_whose_group_never_settles_while_kafka_answers() -> None:
    dog, ended, clock = watched(held=True)
    probe(dog, clock, 120)
    assert dog.health().good
    probe(dog, clock, 150)
    assert "rebalancing for 1" in ended[0]


def test_ends_a_worker_whose_restore_never_goes_on() -> None:
    dog, ended, clock = watched(wanted={0, 1}, recoveries={0: Recovery(seconds=0.1), 1: Recovery(end=500)})
    for position in range(1, 10):
        dog.owner.recoveries[1].position = position
        probe(dog, clock, clock.now + 60, end=1)
    assert not ended, "it goes on"
    probe(dog, clock, clock.now + 150, end=1)
    assert "taking over" in ended[0]


@pytest.mark.parametrize(
    "why",
    [
        {"wanted": {0, 1}, "recoveries": {0: Recovery(seconds=0.1), 1: Recovery(asks=True)}},
        {"wanted": set(), "owned": {}, "recoveries": {}},
    ],
    ids=["the warehouse is asked", "a spare worker"],
)
def test_has_patience_with_one_that_has_nothing_to_take_over_now(why: dict[str, Any]) -> None:
    dog, ended, clock = watched(**why)
    probe(dog, clock, 1000, end=1)
    assert not ended


def test_never_ends_one_that_has_read_everything() -> None:
    dog, ended, clock = watched()
    probe(dog, clock, 1000, end=1)
    assert not ended
    assert dog.health().good


@pytest.mark.parametrize("reason", ["braked", "warehouse", "taken again", "transaction", "rebalances"])
def test_never_ends_one_that_has_a_reason_to_wait(reason: str) -> None:
    dog, ended, clock = watched(held=reason == "rebalances")
    owner = dog.owner
    if reason == "braked":
        owner.owned[0].braked.add("clickstream")
    if reason == "warehouse":
        owner.sink_ready.clear()
    if reason == "transaction":
        owner.owned[0].began = 0.0
    for _ in range(60):
        if reason == "taken again":
            owner.recoveries[0].started += 1
        if reason == "rebalances":
            owner.rebalances += 1
        probe(dog, clock, clock.now + 15)
    assert not ended


def test_a_transaction_of_every_moment_is_no_reason() -> None:
    dog, ended, clock = watched()
    while clock.now < 105:
        dog.owner.owned[0].began = clock.now + 14
        probe(dog, clock, clock.now + 15)
    assert ended


def test_time_in_which_nobody_looked_does_not_count() -> None:
    dog, ended, clock = watched()
    probe(dog, clock, 30)
    clock.now += 3600
    probe(dog, clock, clock.now + 45)
    assert not ended


async def test_a_failed_probe_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    dog, ended, clock = watched()
    probe(dog, clock, 90)

    async def away(_: object) -> None:
        raise OSError("no broker")

    monkeypatch.setattr(Watchdog, "_ends", lambda self, tps: away(tps))
    await dog.look()
    assert not dog.stalls
    assert dog.health().good
    probe(dog, clock, clock.now + 60)
    assert not ended


async def test_a_blocked_event_loop_is_noticed() -> None:
    ended: list[str] = []
    guard = LoopGuard(0.3, ended.append, beat_seconds=0.05)
    task = asyncio.create_task(guard.run())
    await asyncio.sleep(0.6)
    assert not ended
    time.sleep(0.7)  # noqa: ASYNC251
    assert "event loop has not run" in ended[0]
    task.cancel()
