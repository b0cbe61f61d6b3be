"""Behind Faust's `TableManager` setting: what Faust says about rebalances reaches the owner of the partitions before anything else.

No table of Faust's own is registered, so its recovery only resumes its streams; `transport.RunConsumer.seek_to_committed` lets ours join.
"""

from __future__ import annotations

from typing import Any

from aiokafka.structs import TopicPartition
from faust.tables import TableManager

from pipeline.streaming.ending import end_process
from pipeline.streaming.owner import Owner


class OwnedTables(TableManager):
    """Faust's table manager with our state in it."""

    owner: Owner  # set by the app factory before the app starts

    def on_partitions_revoked(self, revoked: set[Any]) -> None:
        """First thing in a rebalance, before the group is joined again."""
        self.owner.hold()
        super().on_partitions_revoked(revoked)

    async def on_rebalance(self, assigned: set[Any], revoked: set[Any], newly_assigned: set[Any], generation_id: int = 0) -> None:
        """Must not wait: no heartbeat is sent before it returns."""
        self.owner.consumer = self.app.consumer
        try:
            self.owner.assigned({TopicPartition(tp.topic, tp.partition) for tp in assigned})
        except Exception as error:
            end_process(f"partitions could not be taken over: {error}", error)
        await super().on_rebalance(assigned, revoked, newly_assigned, generation_id)
