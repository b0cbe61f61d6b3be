"""What ends a worker from Faust's side: a service of Faust's has crashed, or the consumer group refuses it. `streaming.worker` watches for it."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import faust
from aiokafka.errors import InvalidSessionTimeoutError


class GroupRefused(Exception):
    """The consumer group does not take this worker; the message says what to do."""


async def crashed(app: faust.App, session_seconds: float) -> NoReturn:
    """Wait for it. Raises GroupRefused when the group has refused this worker for good, RuntimeError as soon as Faust has crashed."""
    while not app.crashed:
        if (refusal := app.consumer.refusal) is not None:
            raise GroupRefused(_told(refusal, session_seconds))
        await asyncio.sleep(0.2)
    raise RuntimeError(f"Faust crashed: {app.crash_reason!r}") from app.crash_reason


def _told(refusal: Exception, session_seconds: float) -> str:
    if not isinstance(refusal, InvalidSessionTimeoutError):
        return f"the consumer group refuses this worker: {refusal!r}"
    return (
        f"the broker allows no session of {session_seconds:g} s. Raise SHOPSTREAM_SESSION_SECONDS (6 is allowed everywhere), or set "
        "group.min.session.timeout.ms on every broker."
    )
