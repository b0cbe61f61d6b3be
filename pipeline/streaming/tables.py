"""Behind Faust's `TableManager` setting: on a rebalance our partitions are dropped and taken over before Faust resumes its streams.

No table of Faust's own is registered, so its recovery only seeks (to our positions, see `transport`) and resumes.
"""

from __future__ import annotations

from typing import Any

from aiokafka.structs import TopicPartition
from faust.tables import TableManager

from pipeline.streaming.owner import Owner, end_process


class OwnedTables(TableManager):
    """Faust's table manager with our state in it."""

    owner: Owner  # set by the app factory before the app starts

    async def on_rebalance(self, assigned: set[Any], revoked: set[Any], newly_assigned: set[Any], generation_id: int = 0) -> None:
        tps = {TopicPartition(tp.topic, tp.partition) for tp in assigned}
        self.owner.thread = self.app.consumer._thread
        try:
            await self.owner.rebalance(tps)
        except Exception as error:
            end_process(f"partitions could not be taken over: {error}", error)
        await super().on_rebalance(assigned, revoked, newly_assigned, generation_id)
