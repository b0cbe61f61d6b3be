"""Compiled kernels before partitions are owned: a group member that compiles for a minute would be thrown out. `streaming.worker` waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from typing import NamedTuple

from pipeline.cache import FolderError, kernel_cache
from pipeline.definitions import Definitions
from pipeline.partition import Partition, Run
from pipeline.streaming.memory import settle

log = logging.getLogger("shopstream.worker")

TIME_MS = 1_767_225_600_000


class _Record(NamedTuple):
    offset: int
    key: bytes | None
    value: bytes
    timestamp: int
    headers: list[tuple[str, bytes]]


def warm_up(definitions: Definitions) -> None:
    """Compile (or load from the cache) every kernel, by giving it events: those that the definitions name, and those that orders are made of."""
    named = [event for funnel in definitions.funnels for step in funnel.steps for event in step.match.events]
    names = ["page_view", *dict.fromkeys(named), "order_created", "purchase", "refund"]
    for topic in ("clickstream", "orders"):
        partition = Partition(0, 1, definitions)
        of_a_new_user = [_record(offset, name) for offset, name in enumerate(names)]
        of_a_known_user = [_record(len(names), names[0])]
        for records in (of_a_new_user, of_a_known_user):
            partition.offer(Run(topic, 0, records, records[-1].offset + 1, records[0].offset))
        partition.horizon = 1  # as once both topics have shown events: without one no watermark is known
        partition.snapshot()


def _record(offset: int, event: str) -> _Record:
    """All are of one user and one order."""
    value = b'{"event_id":"w%d","event":"%s","ts":%d,"user_id":"u","order_id":"o","value":1}' % (offset, event.encode(), TIME_MS)
    return _Record(offset, None, value, TIME_MS, [])


async def warmed_up(definitions: Definitions) -> None:
    """`warm_up` in a thread of its own, which an end does not wait for: compiling takes up to a minute, and the port answers meanwhile.

    Raises FolderError when there is no room to keep the kernels.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def work() -> None:
        failed: BaseException | None = None
        try:
            warm_up(definitions)
        except OSError as error:
            failed = FolderError(
                f"compiled kernels can't be kept in {kernel_cache()} ({error}): make room, or name another folder with SHOPSTREAM_CACHE"
            )
        except BaseException as error:  # it is raised where it is waited for
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(finish, failed)

    log.info("warming up: kernels are compiled, or loaded from the cache")
    threading.Thread(target=work, name="warm-up", daemon=True).start()
    await done
    settle()
