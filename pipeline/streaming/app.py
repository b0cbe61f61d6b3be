"""The Faust app of a worker, and running it until a signal.

`shopstream worker` calls `run_worker`; the agents (`agents/`) are bound here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import ssl
import tempfile
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import faust
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import InvalidSessionTimeoutError, KafkaConnectionError
from faust.types.auth import AuthProtocol
from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential_jitter

from agents import bind_agents
from pipeline.cache import FolderError, kernel_cache
from pipeline.definitions import Definitions
from pipeline.partition import Options, Partition, Run
from pipeline.sinks.warehouse import SinkRefused, Warehouse
from pipeline.streaming.changelog import TRANSACTION_SECONDS
from pipeline.streaming.ending import end_process, end_when_out_of_memory
from pipeline.streaming.flushes import Feeder, Flusher, FlushOptions
from pipeline.streaming.memory import keep_small, settle
from pipeline.streaming.owner import Owner
from pipeline.streaming.readings import WorkerState
from pipeline.streaming.succession import Succession
from pipeline.streaming.tables import OwnedTables
from pipeline.streaming.watchdog import LoopGuard, Watchdog, probe_seconds
from pipeline.telemetry.prometheus import CONTENT_TYPE, Exposition
from pipeline.telemetry.server import serving
from pipeline.topic_names import Topics
from pipeline.topics import TopicsError, check_keeps_all

log = logging.getLogger("shopstream.worker")

END_OF_INPUT = signal.SIGUSR1
"""`shopstream run` sends it once everything is applied."""
GO_OVER = 75
"""What `run_worker` returns when another revision is in force: start again, and it is that one's worker."""
_UNKNOWN_TABLE = "Code: 60"
STOP_SECONDS = 60
REVOKED_SECONDS = 20
LAST_FLUSH_SECONDS = 10
LEAVE_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Security:
    """Kafka's security settings, passed through to every client."""

    protocol: str = "PLAINTEXT"
    mechanism: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None

    def context(self) -> ssl.SSLContext | None:
        return ssl.create_default_context(cafile=self.ca_file) if "SSL" in self.protocol else None

    def aiokafka(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"security_protocol": self.protocol, "ssl_context": self.context()}
        if self.protocol.startswith("SASL"):
            arguments |= {"sasl_mechanism": self.mechanism, "sasl_plain_username": self.username, "sasl_plain_password": self.password}
        return arguments

    def faust(self) -> Any:
        if self.protocol == "PLAINTEXT":
            return None
        if self.protocol == "SSL":
            return faust.SSLCredentials(self.context())
        credentials = faust.SASLCredentials(
            username=self.username, password=self.password, mechanism=self.mechanism, ssl_context=self.context()
        )
        credentials.protocol = AuthProtocol(self.protocol)
        return credentials


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker needs to know besides the definitions."""

    bootstrap: str
    topics: Topics = Topics()
    security: Security = Security()
    partition: Options = Options()
    flush: FlushOptions = FlushOptions()
    session_seconds: float = 10.0
    accept_deleted: bool = False
    transaction_seconds: float = TRANSACTION_SECONDS
    stop_sink_seconds: float = 10.0  # how long an orderly end waits for the warehouse
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0  # none
    stuck_seconds: float = 120.0  # 0: a worker that is stuck is told, not ended
    follows: tuple[Topics, ...] = ()  # of the revision that ours was begun beside, of the one before that, and so on
    moved: bool = False  # some users' events are in partitions that are not theirs
    standby_partitions: int = 0


def create_app(options: WorkerOptions, definitions: Definitions, datadir: str) -> faust.App:
    """The app with our transport, our table manager and the agents; nothing is connected yet."""
    app = faust.App(
        options.topics.app_id,
        broker=f"shopstream://{options.bootstrap.replace(',', ';')}",
        broker_credentials=options.security.faust(),
        TableManager=OwnedTables,
        datadir=datadir,  # Faust wants one; nothing is kept in it
        store="memory://",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        processing_guarantee="at_least_once",
        stream_wait_empty=False,
        stream_buffer_maxsize=4,  # runs, not events
        stream_publish_on_commit=False,
        broker_session_timeout=options.session_seconds,
        broker_heartbeat_interval=options.session_seconds / 8,  # the next one is how a member hears that the group rebalances
        broker_request_timeout=max(30.0, options.session_seconds * 2),
        broker_rebalance_timeout=60.0,
        broker_max_poll_interval=86_400.0,  # consumption waits while the warehouse is away
        broker_commit_interval=3600.0,
        autodiscover=False,
    )
    client = {"bootstrap_servers": options.bootstrap, **options.security.aiokafka()}
    owner = app.tables.owner = Owner(
        client,
        definitions,
        options.topics,
        options.partition,
        options.accept_deleted,
        options.transaction_seconds,
        options.moved,
        options.standby_partitions,
    )
    bind_agents(app, options.topics, owner)
    return app


def run_worker(options: WorkerOptions, definitions: Definitions, warehouse: Warehouse) -> int:
    """Run until SIGTERM or SIGINT, or until another revision is in force; 0 or GO_OVER after an orderly end. Ends the process with 1 on anything unexpected."""
    return asyncio.run(_run(options, definitions, warehouse))


def warm_up(definitions: Definitions) -> None:
    """Compile (or load from the cache) every kernel before partitions are owned: a group member that compiles for a minute would be thrown out."""
    names = [
        "page_view",
        *dict.fromkeys(e for f in definitions.funnels for s in f.steps for e in s.match.events),
        "order_created",
        "purchase",
        "refund",
    ]
    for topic in ("clickstream", "orders"):
        partition = Partition(0, 1, definitions)
        values = [
            b'{"event_id":"w%d","event":"%s","ts":1767225600000,"user_id":"u","order_id":"o","value":1}' % (i, name.encode())
            for i, name in enumerate(names)
        ]
        records = [_WarmUp(i, None, value, 1_767_225_600_000, []) for i, value in enumerate(values)]
        partition.offer(Run(topic, 0, records, len(records), 0))
        partition.offer(
            Run(
                topic,
                0,
                [_WarmUp(len(records), None, values[0].replace(b"w0", b"v0"), 1_767_225_600_000, [])],
                len(records) + 1,
                len(records),
            )
        )
        partition.horizon = 1
        partition.snapshot()


class _WarmUp(NamedTuple):
    offset: int
    key: bytes | None
    value: bytes
    timestamp: int
    headers: list[tuple[str, bytes]]


async def _run(options: WorkerOptions, definitions: Definitions, warehouse: Warehouse) -> int:
    loop = asyncio.get_running_loop()
    end_when_out_of_memory(loop)
    stop = asyncio.Event()
    folder = _temporary_folder()
    app = create_app(options, definitions, folder.name)
    owner: Owner = app.tables.owner
    flusher, feeder = Flusher(owner, options.flush), Feeder(owner, warehouse, options.flush)
    owner.emptied = feeder.nothing_known
    watchdog = Watchdog(owner, options.stuck_seconds, probe_seconds(options.stuck_seconds))
    state = WorkerState(owner, watchdog, feeder.watch)
    metrics = Exposition(state.read)
    async with serving(options.metrics_host, options.metrics_port, metrics.text, CONTENT_TYPE, watchdog.health, state.readiness):
        await _warmed_up(definitions)
        state.warm.set()
        await _meet_kafka(options)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(END_OF_INPUT, flusher.end_of_input)
        succession = Succession(owner, warehouse, feeder.in_thread, options.follows)
        code = await _work(app, options, flusher, feeder, watchdog, succession, stop)
    folder.cleanup()
    return code


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="shopstream-faust-")
    except OSError as error:
        raise FolderError(f"no temporary folder can be made ({error}): make room, or name another place with TMPDIR") from None


async def _warmed_up(definitions: Definitions) -> None:
    """`warm_up` in a thread of its own, which an end does not wait for: compiling takes up to a minute, and the port answers meanwhile."""
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


async def _work(
    app: faust.App,
    options: WorkerOptions,
    flusher: Flusher,
    feeder: Feeder,
    watchdog: Watchdog,
    succession: Succession,
    stop: asyncio.Event,
) -> int:
    @app.on_partitions_revoked.connect
    async def flush_before_the_group_goes_on(_app: Any, revoked: Any, **_: Any) -> None:
        with contextlib.suppress(asyncio.TimeoutError):  # whoever takes over reads the events again
            await asyncio.wait_for(flusher.flush(), REVOKED_SECONDS)

    app.finalize()
    crash = asyncio.create_task(_crashed(app, options.session_seconds))
    starting = asyncio.create_task(app.start())
    await asyncio.wait([starting, crash], return_when=asyncio.FIRST_COMPLETED)  # it starts for ever when the group refuses it
    if crash.done():
        _end_for(crash.exception())
    await starting
    log.info("worker of %s started on %s", options.topics.app_id, options.bootstrap)
    works = [flusher.run(), feeder.run(), watchdog.run(), succession.run(), keep_small()]
    if options.standby_partitions:
        works.append(flusher.owner.standbys.run())
    if options.stuck_seconds:
        works.append(LoopGuard(options.stuck_seconds).run())
    tasks = [crash, *(asyncio.create_task(work) for work in works)]
    ends = {asyncio.create_task(stop.wait()), asyncio.create_task(flusher.owner.outdated.wait())}
    done, _ = await asyncio.wait([*tasks, *ends], return_when=asyncio.FIRST_COMPLETED)
    for task in done - ends:
        _end_for(task.exception())
    log.info("stopping: last flush")
    try:
        left = await asyncio.wait_for(_stop(app, tasks, flusher, feeder, succession, options.stop_sink_seconds), STOP_SECONDS)
    except Exception as error:
        end_process(f"the orderly end failed: {error!r}", error)
    code = 0 if stop.is_set() else GO_OVER
    if code == GO_OVER:
        log.info("going over to the revision in force")
    if feeder.gave_up or not left:
        logging.shutdown()
        os._exit(code)  # Python would wait for the insert's thread, or the consumer's
    return code


def _remedy(error: SinkRefused) -> str:
    if _UNKNOWN_TABLE in str(error):
        return "if it was dropped: `shopstream migrate --repair` makes it again, `shopstream rebuild --from earliest` fills it"
    return "nothing is lost: mend that (`shopstream doctor` checks the warehouse) and start again"


async def _meet_kafka(options: WorkerOptions) -> None:
    """Until Kafka answers. Raises TopicsError when topics are missing, or when the changelog's configuration would lose state."""
    names = options.topics
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type((KafkaConnectionError, OSError)),
        wait=wait_exponential_jitter(0.5, 10),
        before_sleep=lambda _: log.warning("Kafka at %s can't be reached, trying again", options.bootstrap),
    ):
        with attempt:
            admin = AIOKafkaAdminClient(bootstrap_servers=options.bootstrap, **options.security.aiokafka())
            try:
                await admin.start()
                there = await admin.list_topics()
                kept = await _configs(admin, names.changelog) if names.changelog in there else {}
            finally:
                await admin.close()
    missing = {*names.sources, *names.rejected, names.changelog} - set(there)
    if missing:
        raise TopicsError(f"there is no topic {', '.join(sorted(missing))} at {options.bootstrap}: create them with `shopstream topics`")
    check_keeps_all(names.changelog, kept)


async def _configs(admin: AIOKafkaAdminClient, topic: str) -> dict[str, str]:
    """Of the topic; empty when this user may not look, which `shopstream topics` must then have done."""
    (response,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    ((code, message, _, _, entries),) = response.resources
    if code:
        log.warning("the configuration of %s is not known, whether it keeps everything is not checked: %s", topic, message)
    return {name: value for name, value, *_ in entries}


def _end_for(error: BaseException | None) -> None:
    """Something that runs for ever has ended."""
    if isinstance(error, SinkRefused):
        end_process(f"the worker ends: {error}; {_remedy(error)}", error)
    if isinstance(error, GroupRefused):
        end_process(f"the worker ends: {error}")
    end_process(f"the worker ends: {error!r}", error)


class GroupRefused(Exception):
    """The consumer group does not take this worker; the message says what to do."""


async def _crashed(app: faust.App, session_seconds: float) -> None:
    """Ends with an error as soon as a service of Faust's has crashed, or the group has refused this worker for good."""
    while not app.crashed:
        if (error := app.consumer.refusal) is not None:
            remedy = (
                f"the broker allows no session of {session_seconds:g} s. Raise SHOPSTREAM_SESSION_SECONDS (6 is allowed everywhere), or set "
                "group.min.session.timeout.ms on every broker."
            )
            raise GroupRefused(
                remedy if isinstance(error, InvalidSessionTimeoutError) else f"the consumer group refuses this worker: {error!r}"
            )
        await asyncio.sleep(0.2)
    raise RuntimeError(f"Faust crashed: {app.crash_reason!r}") from app.crash_reason


async def _stop(
    app: faust.App, tasks: list[asyncio.Task[None]], flusher: Flusher, feeder: Feeder, succession: Succession, sink_seconds: float
) -> bool:
    """Flush, bring the warehouse up to date, leave the group; whether the group was left. Each has its time, whatever is away."""
    app.consumer.stop_flow()
    app.flow_control.suspend()
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await succession.finish()
    flusher.owner.hold()
    with contextlib.suppress(asyncio.TimeoutError):  # Kafka is away: who comes next reads the events again
        await asyncio.wait_for(flusher.flush(), LAST_FLUSH_SECONDS)
    await feeder.close(sink_seconds)
    await flusher.owner.close()
    leaving = asyncio.create_task(app.stop())
    done, _ = await asyncio.wait([leaving], timeout=LEAVE_SECONDS)  # not cancelled when its time is over: it would wait on
    for task in done:
        task.result()
    if not done:
        log.warning("Kafka is away: the group forgets this worker after its session timeout")
    return bool(done)
