"""One worker, run until a signal: Faust's app, and what flushes, feeds the warehouse and watches beside it. `shopstream worker` calls `run_worker`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Coroutine
from typing import Any

from pipeline.cache import FolderError
from pipeline.definitions import Definitions
from pipeline.sinks.warehouse import Warehouse
from pipeline.streaming.app import create_app
from pipeline.streaming.crash import crashed
from pipeline.streaming.ending import end_for, end_process, end_when_out_of_memory, start_again
from pipeline.streaming.flushes import Feeder, Flusher
from pipeline.streaming.memory import keep_small
from pipeline.streaming.options import WorkerOptions
from pipeline.streaming.owner import Owner
from pipeline.streaming.preflight import meet_kafka
from pipeline.streaming.readings import WorkerState
from pipeline.streaming.succession import Succession
from pipeline.streaming.warm_up import warmed_up
from pipeline.streaming.watchdog import LoopGuard, Watchdog, probe_seconds
from pipeline.telemetry.prometheus import CONTENT_TYPE, Exposition
from pipeline.telemetry.server import serving

log = logging.getLogger("shopstream.worker")

END_OF_INPUT = signal.SIGUSR1
"""`shopstream run` sends it once everything is applied."""
GO_OVER = 75
"""What `run_worker` returns when another revision is in force: start again, and it is that one's worker."""
STOP_SECONDS = 60
REVOKED_SECONDS = 20
LAST_FLUSH_SECONDS = 10
LEAVE_SECONDS = 5


def run_worker(options: WorkerOptions, definitions: Definitions, warehouse: Warehouse) -> int:
    """Run until SIGTERM or SIGINT, or until another revision is in force; 0 or GO_OVER after an orderly end. Ends the process with 1 on anything unexpected."""
    return asyncio.run(_run(options, definitions, warehouse))


async def _run(options: WorkerOptions, definitions: Definitions, warehouse: Warehouse) -> int:
    end_when_out_of_memory(asyncio.get_running_loop())
    with _temporary_folder() as folder:
        return await Worker(options, definitions, warehouse, folder).run()


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="shopstream-faust-")
    except OSError as error:
        raise FolderError(f"no temporary folder can be made ({error}): make room, or name another place with TMPDIR") from None


class Worker:
    """The parts of a worker, not started yet; `datadir` is a folder for Faust."""

    def __init__(self, options: WorkerOptions, definitions: Definitions, warehouse: Warehouse, datadir: str) -> None:
        self._options = options
        self._definitions = definitions
        self._app = create_app(options, definitions, datadir)
        self._app.on_partitions_revoked.connect(self._flush_before_the_group_goes_on)
        self._owner: Owner = self._app.tables.owner
        self._flusher = Flusher(self._owner, options.flush)
        self._feeder = Feeder(self._owner, warehouse, options.flush, options.pseudonyms)
        self._owner.emptied = self._feeder.nothing_known
        self._watchdog = Watchdog(self._owner, options.stuck_seconds, probe_seconds(options.stuck_seconds))
        self._succession = Succession(self._owner, warehouse, self._feeder.in_thread, options.follows)
        self._told_to_stop = asyncio.Event()

    async def run(self) -> int:
        """As `run_worker`. Raises FolderError and TopicsError before anything is owned."""
        state = WorkerState(self._owner, self._watchdog, self._feeder.watch)
        host, port, metrics = self._options.metrics_host, self._options.metrics_port, Exposition(state.read)
        async with serving(host, port, metrics.text, CONTENT_TYPE, self._watchdog.health, state.readiness):
            await warmed_up(self._definitions)
            state.warm.set()
            await meet_kafka(self._options)
            self._listen_to_signals()
            return await self._work()

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop.set)
        loop.add_signal_handler(END_OF_INPUT, self._flusher.end_of_input)

    async def _work(self) -> int:
        crash = asyncio.create_task(crashed(self._app, self._options.session_seconds))
        await self._start(crash)
        tasks: list[asyncio.Task[None]] = [crash, *(asyncio.create_task(work) for work in self._beside())]
        ends = {asyncio.create_task(self._told_to_stop.wait()), asyncio.create_task(self._owner.outdated.wait())}
        done, _ = await asyncio.wait([*tasks, *ends], return_when=asyncio.FIRST_COMPLETED)
        for task in done - ends:
            end_for(task.exception())
        return await self._end(tasks)

    async def _start(self, crash: asyncio.Task[None]) -> None:
        self._app.finalize()
        starting = asyncio.create_task(self._app.start())
        await asyncio.wait([starting, crash], return_when=asyncio.FIRST_COMPLETED)  # it starts for ever when the group refuses it
        if crash.done():
            end_for(crash.exception())
        await starting
        log.info("worker of %s started on %s", self._options.topics.app_id, self._options.bootstrap)

    def _beside(self) -> list[Coroutine[Any, Any, None]]:
        """What runs for ever beside Faust."""
        works = [self._flusher.run(), self._feeder.run(), self._watchdog.run(), self._succession.run(), keep_small()]
        if self._options.standby_partitions:
            works.append(self._owner.standbys.run())
        if self._options.stuck_seconds:
            works.append(LoopGuard(self._options.stuck_seconds).run())
        return works

    async def _flush_before_the_group_goes_on(self, _app: Any, _revoked: Any, **_: Any) -> None:
        with contextlib.suppress(asyncio.TimeoutError):  # whoever takes over reads the events again
            await asyncio.wait_for(self._flusher.flush(), REVOKED_SECONDS)

    async def _end(self, tasks: list[asyncio.Task[None]]) -> int:
        """In order, whatever is away; the exit code."""
        log.info("stopping: last flush")
        try:
            left = await asyncio.wait_for(self._stop(tasks), STOP_SECONDS)
        except Exception as error:
            end_process(f"the orderly end failed: {error!r}", error)
        code = 0 if self._told_to_stop.is_set() else GO_OVER
        if code == GO_OVER:
            log.info("going over to the revision in force")
        if self._feeder.gave_up or not left:  # Python would wait for the insert's thread, or the consumer's
            if code == GO_OVER:
                start_again()
            logging.shutdown()
            os._exit(code)
        return code

    async def _stop(self, tasks: list[asyncio.Task[None]]) -> bool:
        """Flush, bring the warehouse up to date, leave the group; whether the group was left. Each has its time."""
        self._app.consumer.stop_flow()
        self._app.flow_control.suspend()
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._succession.finish()
        self._owner.hold()
        with contextlib.suppress(asyncio.TimeoutError):  # Kafka is away: who comes next reads the events again
            await asyncio.wait_for(self._flusher.flush(), LAST_FLUSH_SECONDS)
        await self._feeder.close(self._options.stop_sink_seconds)
        await self._owner.close()
        return await self._leave()

    async def _leave(self) -> bool:
        leaving = asyncio.create_task(self._app.stop())
        done, _ = await asyncio.wait([leaving], timeout=LEAVE_SECONDS)  # not cancelled when its time is over: it would wait on
        for task in done:
            task.result()
        if not done:
            log.warning("Kafka is away: the group forgets this worker after its session timeout")
        return bool(done)
