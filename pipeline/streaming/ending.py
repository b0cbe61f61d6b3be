"""How a worker ends without waiting: on what it did not expect, with the last word in its log, or to start again. A restart is exact, always."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Any, NoReturn

from pipeline.changelog import ChangelogError
from pipeline.sinks.warehouse import SinkRefused
from pipeline.streaming.changelog import TransactionRefused
from pipeline.streaming.crash import GroupRefused

log = logging.getLogger("shopstream.worker")

OUT_OF_MEMORY = "out of memory. Nothing is lost: give the worker more, or start more workers (each holds the state of its partitions), and start it again"
SAY_ALL = (SinkRefused, ChangelogError, TransactionRefused, GroupRefused)
"""Errors whose message is all there is to know: no trace is shown."""
UNKNOWN_TABLE = "Code: 60"  # ClickHouse's


def end_process(message: str, error: BaseException | None = None) -> NoReturn:
    """Say so and end at once. Nothing is lost; an orderly end could hang on what is broken. The trace is shown for bugs only."""
    try:
        if _ran_out(error):
            message = f"{message.removesuffix(': ')}: {OUT_OF_MEMORY}"
        log.critical(message, exc_info=None if isinstance(error, SAY_ALL) else error)
        logging.shutdown()
    finally:  # whatever stands in the way of saying so
        os._exit(1)


def start_again() -> NoReturn:
    """The same command again in this process's place: another revision, perhaps other definitions."""
    logging.shutdown()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 our own command


def end_for(error: BaseException | None) -> NoReturn:
    """End the process for the error that something which runs for ever has ended with."""
    if isinstance(error, SinkRefused):
        end_process(f"the worker ends: {error}; {_remedy(error)}", error)
    if isinstance(error, GroupRefused):
        end_process(f"the worker ends: {error}", error)
    end_process(f"the worker ends: {error!r}", error)


def _remedy(error: SinkRefused) -> str:
    if UNKNOWN_TABLE in str(error):
        return "if it was dropped: `shopstream migrate --repair` makes it again, `shopstream rebuild --from earliest` fills it"
    return "nothing is lost: mend that (`shopstream doctor` checks the warehouse) and start again"


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out: this error, or what it was raised from."""
    return error is not None and (isinstance(error, MemoryError) or _ran_out(error.__cause__))


def end_when_out_of_memory(loop: asyncio.AbstractEventLoop) -> None:
    """End the process when memory runs out where nobody waits for the result.

    asyncio would log it and close the connection; the client would connect again, find no memory for that either, and so on for ever.
    """

    def judge(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if _ran_out(error):
            end_process(f"{context.get('message')}: {error}", error)
        loop.default_exception_handler(context)

    loop.set_exception_handler(judge)
