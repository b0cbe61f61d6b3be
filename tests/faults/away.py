"""`python -m tests.faults.away --minutes 10 --rate 20000`: ClickHouse is away while events keep coming; how far the worker's memory grows, and how fast it catches up.

Not part of the test run: it takes a quiet machine and a quarter of an hour. The case that CI runs is tests/faults/test_warehouse_faults.py's.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
from rich.console import Console

from benchmarks.worker import DEFINITIONS
from embedded.kafka import EmbeddedKafka
from generator.bench import START_MS, events
from pipeline.definitions_file import loads
from pipeline.files import Keyed
from pipeline.replay import new_producer, send
from pipeline.sinks.catalog import install
from tests.clickhouse_server import ClickHouseServer, free_port
from tests.faults.rig import PARTITIONS, Day, Rig
from tests.faults.soak import state_bytes

USERS = 100_000
MINUTE_MS = 60_000
BEFORE_SECONDS = 60.0  # the worker at work before the server goes
MIB = 1 << 20
CLOCK_RATE = 60
"""Event time runs so many times faster: minutes of wall time touch many windows, as days would."""


@dataclass
class Producer:
    """`rate` events every second in a thread of its own, and what the KPIs must say about them: {(kpi, window start in ms): value}."""

    bootstrap: str
    topic: str
    rate: int
    sent: int = 0
    orders: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    gmv: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    active: defaultdict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))

    def __post_init__(self) -> None:
        self.ended = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.thread.start()

    async def _run(self) -> None:
        producer = new_producer({"bootstrap_servers": self.bootstrap})
        await producer.start()
        began, second = time.monotonic(), 0
        while not self.ended.is_set():
            span = 1000 * CLOCK_RATE
            keys, values = events(self.rate, USERS, seed=second + 1, start_ms=START_MS + second * span, span_ms=span)
            await send(
                producer,
                [Keyed("clickstream", k.decode(), v) for k, v in zip(keys, values, strict=True)],
                {"clickstream": self.topic},
                PARTITIONS,
            )
            for key, value in zip(keys, values, strict=True):
                self._account(key, value)
            self.sent += len(values)
            second += 1
            await asyncio.sleep(max(0.0, began + second - time.monotonic()))
        await producer.stop()

    def _account(self, key: bytes, value: bytes) -> None:
        at = value.index(b'"ts":') + 5
        minute = int(value[at : at + 13]) // MINUTE_MS * MINUTE_MS
        self.active[minute].add(key)
        if b'"event":"purchase"' in value:
            self.orders[minute] += 1
            self.gmv[minute] += msgspec.json.decode(value)["value"]

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()

    def truth(self) -> dict[tuple[str, int], float]:
        return {
            **{("orders", minute): float(n) for minute, n in self.orders.items()},
            **{("gmv", minute): round(total, 2) for minute, total in self.gmv.items()},
            **{("active", minute): float(len(users)) for minute, users in self.active.items()},
        }


@dataclass
class Memory:
    """The worker's resident memory, sampled every second."""

    process: psutil.Process
    largest: int = 0

    @property
    def now(self) -> int:
        found: int = self.process.memory_info().rss
        self.largest = max(self.largest, found)
        return found


def said(rig: Rig) -> dict[tuple[str, int], float]:
    rows = rig.warehouse.query(
        "SELECT kpi, toInt64(window_start) * 1000, toFloat64(value) FROM kpi_report "
        "WHERE window = '1m' AND dimension = '' AND kpi IN ('orders', 'gmv', 'active')"
    )
    return {(str(kpi), int(start)): round(float(value), 2) for kpi, start, value in rows}


def applied(rig: Rig, topic: str) -> int:
    rows: list[Any] = rig.warehouse.query(
        'SELECT sum(n) FROM (SELECT argMax(applied, version) AS n FROM progress WHERE topic = %(topic)s GROUP BY topic, "partition")',
        {"topic": topic},
    )
    return int(rows[0][0] or 0)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--rate", type=int, default=20_000, help="events a second")
    options = arguments.parse_args()
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="shopstream-away-") as name:
        folder = Path(name)
        with EmbeddedKafka(folder / "kafka", quiet=True) as kafka, ClickHouseServer() as server:
            (folder / "rig").mkdir()
            rig = Rig(kafka.bootstrap, server, Day([], 0, None, ()), folder / "rig", "away")  # type: ignore[arg-type]  the day is the producer's
            definitions = folder / "rig" / "away.toml"
            definitions.write_text(DEFINITIONS)
            try:
                rig.prepare()
                install(rig.warehouse, loads(DEFINITIONS), 2)
                port = free_port()
                worker = rig.start(SHOPSTREAM_DEFINITIONS=str(definitions), SHOPSTREAM_METRICS_PORT=str(port))
                memory = Memory(psutil.Process(worker.pid))
                producer = Producer(kafka.bootstrap, rig.topics.clickstream, options.rate)
                rig.until(lambda: applied(rig, rig.topics.clickstream) >= 10 * options.rate, 120, "the first ten seconds applied")
                time.sleep(BEFORE_SECONDS)
                before, memory.largest, state_before = memory.now, 0, state_bytes(port)
                console.print(f"at work: {applied(rig, rig.topics.clickstream):,} applied, memory {before / MIB:.0f} MiB")
                server.kill()
                for minute in range(1, round(options.minutes) + 1):
                    until = time.monotonic() + 60
                    while time.monotonic() < until:
                        memory.now  # noqa: B018  sampled
                        time.sleep(1)
                    console.print(f"away for {minute} min: {producer.sent:,} sent, memory {memory.now / MIB:.0f} MiB")
                server.start()
                began, behind = time.monotonic(), producer.sent - applied(rig, rig.topics.clickstream)
                console.print(f"back: {behind:,} events to catch up with while {options.rate:,} more come every second")
                start = applied(rig, rig.topics.clickstream)
                while producer.sent - applied(rig, rig.topics.clickstream) > 2 * options.rate:
                    memory.now  # noqa: B018  sampled
                    time.sleep(0.2)
                    assert rig.workers[0].poll() is None, rig.log[-6000:]
                seconds = time.monotonic() - began
                rate = (applied(rig, rig.topics.clickstream) - start) / seconds
                producer.stop()
                rig.until(lambda: applied(rig, rig.topics.clickstream) == producer.sent, 120, "everything applied")
                rig.until(lambda: said(rig) == producer.truth(), 10, "every number as the producer counted it")
                state = state_bytes(port)
                rig.stop_workers()
            finally:
                rig.close()
    console.print(
        f"caught up after {seconds:.1f} s at {rate:,.0f} events/s, {rate / options.rate:.1f} times the rate they came at; memory {before / MIB:.0f} → at most "
        f"{memory.largest / MIB:.0f} MiB (+{(memory.largest - before) / MIB:.0f}), of it the state's {state_before / MIB:.0f} → {state / MIB:.0f} MiB; {producer.sent:,} events, {len(producer.truth())} numbers as counted"
    )


if __name__ == "__main__":
    main()
