"""One revision after another: a worker notices that another one is in force, and one that was begun beside the one in force succeeds it.

While both run, the newer one's rejects are withheld: the older one sends the dead letters. Once the newer one is in force, its owner of a partition
closes the older one's changelog: that fences its owner, tells for good how far it came, and whoever wants to go on with it finds out. From there on the
newer one sends the dead letters: each is sent once. `streaming.worker` runs it; `shopstream rebuild` decides when (`pipeline.cli.rebuild`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from pipeline.partition import Letter
from pipeline.sinks.revisions import in_force, positions
from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable, Warehouse
from pipeline.streaming.owner import Owned, Owner
from pipeline.streaming.state import KAFKA_TROUBLE, end_offsets, seal
from pipeline.topic_names import Topics

log = logging.getLogger("shopstream.succession")

LOOK_SECONDS = 2.0
FINISH_SECONDS = 20.0
Offsets = dict[int, dict[str, int]]


class Succession:
    """Looks every LOOK_SECONDS which revision is in force. `follows`: topics of the one ours was begun beside, of the one before that, and so on."""

    def __init__(self, owner: Owner, warehouse: Warehouse, in_thread: Callable[..., Awaitable[Any]], follows: tuple[Topics, ...]) -> None:
        self._owner = owner
        self._warehouse = warehouse
        self._in_thread = in_thread
        self._follows = follows
        self._old_events: dict[tuple[str, int], int] | None = None
        self._sent_on: dict[tuple[str, int], int] | None = None

    async def run(self) -> None:
        """For ever. A warehouse or a Kafka that is away is asked again."""
        told = ""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except (SinkUnavailable, SinkRefused, *KAFKA_TROUBLE) as error:
                if told != str(error):
                    told = str(error)
                    log.warning("which revision is in force can't be told or followed now: %s", error)

    async def finish(self) -> None:
        """At an orderly end: what was withheld goes out with the last flush, if it is time. What does not work now, the next owner does."""
        if any(owned.partition.letters.beside for owned in self._owner.owned.values()):
            try:
                await asyncio.wait_for(self.look(), FINISH_SECONDS)
            except (SinkUnavailable, SinkRefused, *KAFKA_TROUBLE) as error:
                log.warning("dead letters that were withheld wait for the next worker: %s", error)

    async def look(self) -> None:
        """Raises SinkUnavailable, SinkRefused and KAFKA_TROUBLE."""
        revision = await self._in_thread(in_force, self._warehouse)
        if revision > self._owner.topics.revision:
            log.info("revision %d is in force", revision)
            self._owner.outdated.set()
            return
        shown = revision == self._owner.topics.revision
        beside = [owned for owned in self._owner.owned.values() if owned.partition.letters.beside]
        if beside and self._follows:
            known: Offsets = await self._in_thread(positions, self._warehouse, self._follows[0].revision)
            for owned in beside:
                number = owned.partition.number
                if shown:
                    await self._succeed(owned, known.get(number, {}))
                else:
                    owned.partition.letters.dealt_with(known.get(number, {}))
        await self._release(shown)

    async def _succeed(self, owned: Owned, known: dict[str, int]) -> None:
        """known: how far the warehouse has heard the older one came, for when its changelog is lost."""
        number = owned.partition.number
        ended, unsent = await self._end(number, self._follows, known)
        if self._owner.owned.get(number) is owned:
            owned.partition.succeed(ended, unsent)
            log.info("partition %d: revision %d goes on at %s", number, self._owner.topics.revision, ended)

    async def _end(self, number: int, follows: tuple[Topics, ...], known: dict[str, int]) -> tuple[dict[str, int], list[Letter]]:
        """Close the changelog of the first of `follows`: where it ended, and the dead letters that it withheld because it had not succeeded itself yet."""
        end = await seal(self._owner.client, follows[0], number, self._owner.topics.revision)
        if end is None:
            return known, []
        if not end.beside or len(follows) == 1:
            return end.positions, []
        before, unsent = await self._end(number, follows[1:], {})
        return end.positions, unsent + [letter for letter in end.withheld if letter.row.offset >= before.get(letter.row.topic, 0)]

    async def _release(self, shown: bool) -> None:
        """Let the horizon move once every partition has read what was there at the beginning, and then what others have sent on to it."""
        owner = self._owner
        held = [owned for owned in owner.owned.values() if owned.partition.held]
        if not held or not (shown or len(owner.owned) == held[0].partition.partitions):
            return
        *sources, rekeyed = owner.topics.sources
        if self._old_events is None:
            self._old_events = await self._ends(sources)
        elif self._sent_on is None:
            if self._committed(self._old_events):
                self._sent_on = await self._ends([rekeyed])
        elif self._committed(self._sent_on):
            for owned in held:
                owned.partition.release()

    async def _ends(self, topics: list[str]) -> dict[tuple[str, int], int]:
        return await end_offsets(self._owner.client, [(topic, number) for topic in topics for number in self._owner.owned])

    def _committed(self, wanted: dict[tuple[str, int], int]) -> bool:
        """Whether all that is owned has come so far."""
        owned = self._owner.owned
        return all(owned[number].account.reached.get(topic, 0) >= offset for (topic, number), offset in wanted.items() if number in owned)
