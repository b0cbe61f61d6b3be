"""A pipeline on a real Kafka and a real ClickHouse server that a test may hurt: workers as processes, a known day of events, the truth about it.

`Day` makes the events and asks the SQL oracle once; `Rig` is one pipeline of its own (app id, topics, database) for one case.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from kafka import KafkaConsumer, TopicPartition

from embedded.kafka import EmbeddedKafka
from generator import Faults, shop
from pipeline.definitions_file import DEFAULT_FILE, loads
from pipeline.files import Keyed
from pipeline.replay import replay
from pipeline.sinks.catalog import install
from pipeline.sinks.embedded import EmbeddedWarehouse
from pipeline.sinks.open import open_warehouse
from pipeline.sinks.revisions import in_force
from pipeline.topic_names import Topics
from pipeline.topics import ensure_topics
from schemas.rejects import RejectedRecord
from tests.clickhouse_server import ClickHouseServer
from tests.integration.driving import reported, same
from tests.oracle.sql import Oracle
from tests.seed import SEED

PARTITIONS = 4
SESSION_SECONDS = 6
SETTLE_SECONDS = 120.0
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)
"""Return codes that no fault of ours explains."""
LATEST_MS = 20 * 3_600_000
DEFINITIONS = DEFAULT_FILE.read_text().replace('windows = ["1m", "1h", "1d"]', 'windows = ["1h", "1d"]')
"""The bundled ones without minutes: half a million rows a case would test the patience only."""


@dataclass(frozen=True)
class Day:
    """Two weeks of a shop in two minutes: out of order, 5% twice, 0.2% bad; and what every report must say about it."""

    messages: list[Keyed]
    good: int
    bad: Counter[bytes]
    """What breaks the contract and what is too late, as the dead letters have it."""
    truth: tuple[dict[Any, Any], ...]
    too_late: int = 0

    @property
    def copies(self) -> int:
        return len(self.messages) - self.good - self.bad.total()


def make_day(seed: int, users: int = 8000) -> Day:
    """About 27 messages a user."""
    made = shop(seed, users, 14, faults=Faults(late=0.05, duplicated=0.05, bad=0.002, latest_ms=LATEST_MS))
    return day_of([Keyed(m.topic, m.key.decode(), m.value) for m in made])


def day_of(messages: list[Keyed], too_late: Sequence[bytes] = (), definitions: str = DEFINITIONS) -> Day:
    """What must come of these messages; `too_late` are those among them that come behind the allowed lateness."""
    late = Counter(too_late)
    known = {m.value: m for m in messages if m.value not in late and is_good(m.value)}
    bad = Counter(m.value for m in messages if m.value not in late and m.value not in known)
    warehouse = EmbeddedWarehouse("")
    try:
        oracle = Oracle(warehouse.query, loads(definitions), [(m.topic, m.value) for m in known.values()])
        truth = (oracle.funnels(), oracle.retentions(), oracle.kpis())
    finally:
        warehouse.close()
    return Day(messages, len(known), bad + late, truth, late.total())


def is_good(value: bytes) -> bool:
    """What the generator has spoiled is cut off, lacks a field, has a wrong type, or a ts below zero."""
    try:
        body = msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return isinstance(body.get("event_id"), str) and isinstance(body.get("user_id"), str) and body.get("ts", -1) > 0


@dataclass
class Rig:
    """One pipeline. `start` and `produce` as often as the case likes, then `settle` and `check`."""

    bootstrap: str
    server: ClickHouseServer
    day: Day
    folder: Path
    name: str
    settings: dict[str, str] = field(default_factory=dict)
    replication: int = 1
    warehouse_url: str = ""
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    produced: int = 0
    partitions: int = PARTITIONS
    definitions: str = DEFINITIONS
    may_crash: bool = False  # what is done to the workers may make a library crash

    def __post_init__(self) -> None:
        self.random = random.Random(f"{SEED} {self.name}")
        self.topics = Topics(f"{self.name}.clickstream", f"{self.name}.orders", self.name)
        self.url = self.server.url(self.name.replace("-", "_"), user="default")
        self.warehouse = open_warehouse(self.url, self.server.password)
        self._producers: list[threading.Thread] = []
        print(f"SHOPSTREAM_TEST_SEED={SEED} {self.name}")

    @property
    def servers(self) -> list[str]:
        return self.bootstrap.split(",")

    @property
    def definitions_file(self) -> Path:
        path = self.folder / "shopstream.toml"
        path.write_text(self.definitions)
        return path

    def prepare(self) -> None:
        """Topics and warehouse."""
        ensure_topics({"bootstrap_servers": self.servers}, self.topics, PARTITIONS, self.replication, min(2, self.replication))
        self.warehouse.migrate()
        install(self.warehouse, loads(DEFINITIONS), 1)

    @property
    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("worker-*.log")))

    def environment(self, **settings: str) -> dict[str, str]:
        """Of a command for this pipeline."""
        return os.environ | {
            "SHOPSTREAM_BROKER": self.bootstrap,
            "SHOPSTREAM_APP_ID": self.topics.app_id,
            "SHOPSTREAM_CLICKSTREAM_TOPIC": self.topics.clickstream,
            "SHOPSTREAM_ORDERS_TOPIC": self.topics.orders,
            "SHOPSTREAM_WAREHOUSE": self.warehouse_url or self.url,
            "SHOPSTREAM_WAREHOUSE_PASSWORD": self.server.password,
            "SHOPSTREAM_DEFINITIONS": str(self.definitions_file),
            "SHOPSTREAM_IDLE_SECONDS": "0",
            "SHOPSTREAM_METRICS_PORT": "0",
            "SHOPSTREAM_SESSION_SECONDS": str(SESSION_SECONDS),
            **self.settings,
            **settings,
        }

    def start(self, module: str = "pipeline.cli.main", **settings: str) -> subprocess.Popen[bytes]:
        """One more worker process; `module` is what it runs."""
        environment = self.environment(**settings)
        with (self.folder / f"worker-{len(self.workers):02d}.log").open("ab") as log:
            worker = subprocess.Popen([sys.executable, "-m", module, "worker"], env=environment, stdout=log, stderr=log)
        self.workers.append(worker)
        return worker

    def produce(self, share: float) -> None:
        """Send the next messages, up to this share of the day."""
        upto = round(share * len(self.day.messages))
        part, self.produced = self.day.messages[self.produced : upto], upto
        targets = {"clickstream": self.topics.clickstream, "orders": self.topics.orders}
        asyncio.run(replay({"bootstrap_servers": self.bootstrap}, part, targets, self.partitions, lambda *_: None))

    def produce_aside(self, share: float) -> None:
        """The same in the background, after what is already being sent there; `settle` waits for it."""
        before = list(self._producers)

        def send() -> None:
            for thread in before:
                thread.join()
            self.produce(share)

        thread = threading.Thread(target=send)
        thread.start()
        self._producers.append(thread)

    def produce_steadily(self, share: float, seconds: float) -> None:
        """The same in the background, spread over so many seconds."""
        steps = round(4 * seconds)
        first = self.produced / len(self.day.messages)

        def send() -> None:
            for step in range(1, steps + 1):
                self.produce(first + (share - first) * step / steps)
                time.sleep(seconds / steps)

        thread = threading.Thread(target=send)
        thread.start()
        self._producers.append(thread)

    def until(self, done: Callable[[], bool], seconds: float, what: str, every: float = 0.1) -> None:
        """Wait for it, looking `every` so many seconds. Fails with the workers' logs."""
        deadline = time.monotonic() + seconds
        while not done():
            self.check_no_crash()
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds:.0f} s (SHOPSTREAM_TEST_SEED={SEED})\n{self.log[-6000:]}")
            time.sleep(every)

    def applied(self) -> int:
        """Events that the warehouse has heard to be applied."""
        return int(self.warehouse.query("SELECT sum(applied) FROM current_progress")[0][0])

    def while_applying(self, least: int = 1, everywhere: bool = False) -> None:
        """Until at least so many events more are applied (and some in every partition), and then a random moment longer."""
        target = self.applied() + least
        self.until(lambda: self.applied() >= target, SETTLE_SECONDS, f"{target} events applied")
        if everywhere:
            begun = 'SELECT uniqExact("partition") FROM current_progress WHERE applied > 0'
            self.until(lambda: self.warehouse.query(begun) == [(self.partitions,)], SETTLE_SECONDS, "some applied in every partition")
        time.sleep(self.random.uniform(0, 1.0))

    def exit_code(self, worker: subprocess.Popen[bytes], seconds: float = 60) -> int:
        """Wait until the worker has ended. Fails with the workers' logs."""
        self.until(lambda: worker.poll() is not None, seconds, "the worker has ended")
        return worker.returncode

    def wait_until_frozen(self, worker: subprocess.Popen[bytes]) -> None:
        """Until a worker with a fault point `name:n:stop` has come to it."""
        self.until(lambda: os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WNOHANG) is not None, 60, "the worker froze at its fault point")

    def wait_until_owned(self, worker: int, partitions: int = 1) -> None:
        """Until a worker has said that it took over this many partitions."""
        path = self.folder / f"worker-{worker:02d}.log"
        self.until(lambda: path.read_text(errors="replace").count("taken over at") >= partitions, 60, f"worker {worker} owns {partitions}")

    def bring_back(self, broker: EmbeddedKafka) -> None:
        """Start the broker again and wait until it knows its topics: the producer of the test itself has no patience."""
        broker.start()
        topics = (self.topics.clickstream, self.topics.orders)
        places = [TopicPartition(topic, p) for topic in topics for p in range(PARTITIONS)]
        with closing(KafkaConsumer(bootstrap_servers=self.servers)) as consumer:
            self.until(lambda: all(len(consumer.partitions_for_topic(t) or ()) == PARTITIONS for t in topics), 30, "it knows its topics")
            self.until(lambda: len(consumer.end_offsets(places)) > 0, 30, "it serves them")

    def settle(self, seconds: float = SETTLE_SECONDS) -> None:
        """Until everything produced is in the warehouse."""
        for thread in self._producers:
            thread.join()
        consumer = KafkaConsumer(bootstrap_servers=self.servers)
        try:

            def done() -> bool:
                sources = self.topics.at(in_force(self.warehouse)).sources
                ends = consumer.end_offsets([TopicPartition(topic, p) for topic in sources for p in range(self.partitions)])
                rows = self.warehouse.query('SELECT topic, "partition", next_offset FROM current_progress')
                reached = {(topic, int(p)): int(offset) for topic, p, offset in rows}
                return all(reached.get((tp.topic, tp.partition), 0) >= end for tp, end in ends.items())

            self.until(done, seconds, "everything applied", every=0.5)
        finally:
            consumer.close()

    def finish(self, lived: Iterable[subprocess.Popen[bytes]] = ()) -> None:
        """Settle, end the workers in order, check. lived: workers that must have come through it all."""
        self.settle()
        assert all(worker.poll() is None for worker in lived), self.log
        self.stop_workers()
        self.check()

    def check(self) -> None:
        """Every number of every report, the accounts, the dead letters in the warehouse and in Kafka: all as the day has them."""
        self.check_no_crash()
        self.check_warehouse()
        assert self.dead_letters() == self.day.bad

    def check_no_crash(self) -> None:
        self.server.check_alive()
        assert self.may_crash or not any(worker.poll() in CRASHES for worker in self.workers), f"a worker has crashed\n{self.log[-6000:]}"

    def check_warehouse(self) -> None:
        """All of it but the dead letters in Kafka."""
        assert self.produced == len(self.day.messages)
        for kind, found, wanted in zip(
            ("funnel_report", "retention_report", "kpi_report"), reported(self.warehouse), self.day.truth, strict=True
        ):
            same(f"{kind} (SHOPSTREAM_TEST_SEED={SEED})", found, wanted)
        sums = self.warehouse.query("SELECT sum(applied), sum(duplicates), sum(rejected), sum(too_late) FROM current_progress")
        assert [int(n) for n in sums[0]] == [self.day.good, self.day.copies, self.day.bad.total() - self.day.too_late, self.day.too_late]
        rows = self.warehouse.query('SELECT topic, "partition", "offset", any(raw) FROM rejects GROUP BY topic, "partition", "offset"')
        assert Counter(raw if isinstance(raw, bytes) else raw.encode() for *_, raw in rows) == self.day.bad

    def dead_letters(self) -> Counter[bytes]:
        """Raw bytes of what was committed to the dead-letter topics."""
        consumer = KafkaConsumer(bootstrap_servers=self.servers, isolation_level="read_committed", auto_offset_reset="earliest")
        try:
            tps = [TopicPartition(topic, p) for topic in self.topics.rejected for p in range(self.partitions)]
            consumer.assign(tps)
            consumer.seek_to_beginning(*tps)
            ends = consumer.end_offsets(tps)
            found: Counter[bytes] = Counter()
            while any(consumer.position(tp) < ends[tp] for tp in tps):
                for records in consumer.poll(timeout_ms=500).values():
                    found.update(msgspec.json.decode(record.value, type=RejectedRecord).raw for record in records)
            return found
        finally:
            consumer.close()

    def stop_workers(self) -> None:
        """SIGTERM to all that live; each must end well."""
        living = [worker for worker in self.workers if worker.poll() is None]
        for worker in living:
            worker.terminate()
        for worker in living:
            code = worker.wait(90)
            assert code in (0, -signal.SIGTERM), f"a worker ended with {code}\n{self.log[-6000:]}"

    def close(self) -> None:
        for thread in self._producers:
            thread.join()
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        self.warehouse.close()
