"""What the owner of the partitions and the flusher do with what is lost on the way: a run, the answer of a transaction."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka.structs import TopicPartition

from pipeline.partition import ContinuityError
from pipeline.streaming.account import Account
from pipeline.streaming.flushes import Flusher
from pipeline.streaming.options import FlushOptions, WorkerOptions
from pipeline.streaming.owner import Owned, Owner
from tests.unit.test_partition import DEFINITIONS, T0, TOPICS, event, partition, run


class SilentProducer:
    """Of a broker that never answers."""

    async def begin_transaction(self) -> None:
        await asyncio.Event().wait()

    async def stop(self) -> None:
        pass


def owner_of_one(starts_at: int) -> Owner:
    owner = Owner(DEFINITIONS, WorkerOptions("nowhere", TOPICS))
    mine = partition()
    owner.owned[0] = Owned(mine, SilentProducer(), Account(mine, owner.meter))
    tp = TopicPartition("clickstream", 0)
    owner.starts[tp], owner.epochs[tp] = starts_at, 0
    return owner


def test_first_run_of_a_topic_that_was_lost_is_noticed() -> None:
    async def offer_the_second() -> None:
        await owner_of_one(starts_at=5).offer(run(event(7, "view_item", T0)))

    with pytest.raises(ContinuityError, match="begins at offset 7, reading began at 5"):
        asyncio.run(offer_the_second())


def test_flush_that_was_cancelled_costs_the_state_in_memory() -> None:
    """Whether the changelog has it is not known; a second flush after it could follow a hole."""

    async def cancel() -> Owner:
        owner = owner_of_one(starts_at=7)
        await owner.offer(run(event(7, "view_item", T0)))
        flushing = asyncio.create_task(Flusher(owner, FlushOptions()).flush())
        await asyncio.sleep(0.05)
        flushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flushing
        return owner

    assert not asyncio.run(cancel()).owned
