"""The whole worker beside a plain Faust agent, each on one core: CPU seconds per million events, and events a second.

`make bench` (or `python -m benchmarks.worker [events] [peer events] [server]`). Ours: decode, validation, users, sessions, 2 funnels, 1 retention, 6 KPIs,
changelog transactions and the ClickHouse sink (embedded, in the parent's process over loopback; `server`: Debian's server over TCP). The peer: JSON decoded by Faust, one tumbling
table of counts by event name with its changelog. Both read the same topic; the medians of three measurements of ours are shown.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.definitions import TWO_FUNNELS_AND_A_RETENTION
from embedded.kafka import EmbeddedKafka
from generator.bench import events
from pipeline.definitions_file import load
from pipeline.files import Keyed
from pipeline.replay import replay
from pipeline.sinks.catalog import install
from pipeline.sinks.open import open_warehouse
from pipeline.sinks.shared import new_key, serve
from pipeline.topic_names import Topics
from pipeline.topics import ensure_topics
from tests.clickhouse_server import ClickHouseServer

USERS = 100_000
PARTITIONS = 4
ROUNDS = 3
TICKS = os.sysconf("SC_CLK_TCK")
console = Console()

DEFINITIONS = (
    TWO_FUNNELS_AND_A_RETENTION
    + """
[[kpi]]
name = "orders"
aggregate = "count"
event = "purchase"
dimensions = ["channel"]
[[kpi]]
name = "gmv"
aggregate = "sum"
event = "purchase"
field = "value"
dimensions = ["channel"]
[[kpi]]
name = "buyers"
aggregate = "users"
event = "purchase"
[[kpi]]
name = "active"
aggregate = "users"
event = "*"
dimensions = ["device"]
[[kpi]]
name = "visits"
source = "sessions"
aggregate = "count"
[[kpi]]
name = "dwell"
source = "sessions"
aggregate = "dwell"
"""
)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def sink(folder: Path, round_: int, server: bool) -> Iterator[tuple[Any, dict[str, str]]]:
    """An empty warehouse, and what a worker must be told to write into it."""
    if server:
        with ClickHouseServer() as running:
            warehouse = open_warehouse(running.url(user="default"), running.password)
            yield warehouse, {"SHOPSTREAM_WAREHOUSE": running.url(user="default"), "SHOPSTREAM_WAREHOUSE_PASSWORD": running.password}
            warehouse.close()
        return
    warehouse = open_warehouse(f"chdb://{folder}/warehouse{round_}")
    key = new_key()
    with serve(warehouse, authkey=key.encode()) as shared:
        yield warehouse, {"SHOPSTREAM_WAREHOUSE": shared.url, "SHOPSTREAM_WAREHOUSE_KEY": key}
    warehouse.close()


def measure_worker(bootstrap: str, total: int, folder: Path, round_: int, server: bool = False) -> tuple[float, float]:
    """(CPU seconds per million events, events a second) from the first rows in the warehouse to all of them."""
    definitions = folder / "bench.toml"
    definitions.write_text(DEFINITIONS)
    topics = Topics(app_id=f"bench{round_}")
    ensure_topics({"bootstrap_servers": [bootstrap]}, topics, PARTITIONS)
    with sink(folder, round_, server) as (warehouse, told):
        warehouse.migrate()
        install(warehouse, load(definitions), 1)
        environment = os.environ | told | {
            "SHOPSTREAM_BROKER": bootstrap, "SHOPSTREAM_APP_ID": topics.app_id, "SHOPSTREAM_METRICS_PORT": "0",
            "SHOPSTREAM_DEFINITIONS": str(definitions),
        }  # fmt: skip
        log = (folder / "worker.log").open("ab")
        worker = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli.main", "worker"],
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, {0}),
        )
        try:
            first: tuple[int, float, float] | None = None
            while True:
                done = _applied(warehouse)
                now, cpu = time.monotonic(), cpu_seconds(worker.pid)
                if done and first is None:
                    first = (done, now, cpu)
                if done >= total and first is not None:
                    n = done - first[0]
                    return (cpu - first[2]) / n * 1e6, n / (now - first[1])
                if worker.poll() is not None:
                    raise SystemExit((folder / "worker.log").read_text()[-2000:])
                time.sleep(0.05)
        finally:
            worker.terminate()
            worker.wait(90)


def _applied(warehouse: Any) -> int:
    query = 'SELECT sum(a) FROM (SELECT argMax(applied + duplicates, version) AS a FROM progress GROUP BY topic, "partition")'
    return int(warehouse.query(query)[0][0] or 0)


def measure_peer(bootstrap: str, total: int) -> tuple[float, float]:
    """The same two figures for `benchmarks.plain_faust`."""
    command = [sys.executable, "-m", "benchmarks.plain_faust", bootstrap, str(total)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, preexec_fn=lambda: os.sched_setaffinity(0, {0}))
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    if not lines:
        raise SystemExit(f"the peer failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    _, cpu, rate = lines[0].split()
    return float(cpu), float(rate)


def main(total: int = 3_000_000, peer: int = 30_000, server: bool = False) -> None:
    with EmbeddedKafka() as kafka, tempfile.TemporaryDirectory() as temporary:
        ensure_topics({"bootstrap_servers": [kafka.bootstrap]}, Topics(), PARTITIONS)
        with console.status(f"sending {total:,} events of 255 bytes"):
            for part in range(0, total, 500_000):
                n = min(500_000, total - part)
                keys, values = events(n, USERS, seed=part + 1, start_ms=1_772_323_200_000 + part * 4)
                records = [Keyed("clickstream", k.decode(), v) for k, v in zip(keys, values, strict=True)]
                asyncio.run(
                    replay({"bootstrap_servers": kafka.bootstrap}, records, {"clickstream": "clickstream"}, PARTITIONS, lambda *_: None)
                )
        ours = []
        for round_ in range(ROUNDS):
            ours.append(measure_worker(kafka.bootstrap, total, Path(temporary), round_, server))
            console.print(f"worker, round {round_ + 1}: {ours[-1][0]:.2f} CPU s per million, {ours[-1][1]:,.0f} events/s", highlight=False)
        cpu, rate = statistics.median(o[0] for o in ours), statistics.median(o[1] for o in ours)
        peer_cpu, peer_rate = measure_peer(kafka.bootstrap, peer)
    table = Table(title=f"{total:,} events, {USERS:,} users (Zipf 0.8), {PARTITIONS} partitions, one core")
    for column in ("", "CPU s per million events", "events/s"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("Shopstream worker, everything", f"{cpu:.2f}", f"{rate:,.0f}")
    table.add_row(f"plain Faust, one windowed table ({peer:,} events)", f"{peer_cpu:.0f}", f"{peer_rate:,.0f}")
    table.add_row("ratio", f"{peer_cpu / cpu:.0f}×", f"{rate / peer_rate:.0f}×")
    console.print(table)


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:] if a.isdigit()), server="server" in sys.argv[1:])
