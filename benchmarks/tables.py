"""CPU time of one partition by part: decode, each table, changelog, sink rows. `python -m benchmarks.tables [events]`.

In: seeded events as a fetch brings them, a flush every other run, as a worker does that catches up. Out: µs an event, medians of three rounds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.decode import RawRecord
from benchmarks.definitions import TWO_FUNNELS_AND_A_RETENTION
from generator.bench import START_MS, events
from pipeline.definitions import Definitions
from pipeline.definitions_file import load
from pipeline.partition import Partition, Run
from pipeline.streaming.memory import settle

USERS = 100_000
RUN = 16_000  # what a fetch brings of a partition
CHUNK = 30 * RUN
CHUNK_MS = 3_600_000
RUNS_A_FLUSH = 2
ROUNDS = 3
DEFINITIONS = (
    TWO_FUNNELS_AND_A_RETENTION
    + """
[[kpi]]
name = "views"
aggregate = "count"
event = "page_view"
dimensions = ["channel"]
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
dimensions = ["channel"]
[[kpi]]
name = "carts"
aggregate = "users"
event = "add_to_cart"
[[kpi]]
name = "active"
aggregate = "users"
event = "*"
dimensions = ["device"]
[[kpi]]
name = "visits"
source = "sessions"
aggregate = "count"
dimensions = ["channel"]
[[kpi]]
name = "bounces"
source = "sessions"
aggregate = "bounces"
[[kpi]]
name = "pages"
source = "sessions"
aggregate = "pages"
[[kpi]]
name = "dwell"
source = "sessions"
aggregate = "dwell"
[[kpi]]
name = "dwell_p90"
source = "sessions"
aggregate = "dwell_quantile"
quantile = 0.9
[[kpi]]
name = "new_buyers"
source = "first"
event = "purchase"
[[kpi]]
name = "paid"
source = "orders"
aggregate = "paid"
"""
)


class Clock:
    """CPU seconds by part; what a part calls of another part counts for the other."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def part(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            self._inner.append(0.0)
            start = time.thread_time()
            try:
                return call(*args)
            finally:
                took = time.thread_time() - start
                self.spent[name] += took - self._inner.pop()
                self._inner[-1] += took

        return timed


def watch(clock: Clock, owner: object, names: dict[str, str]) -> None:
    for method, part in names.items():
        setattr(owner, method, clock.part(part, getattr(owner, method)))


def partition_of(definitions: Definitions, clock: Clock) -> Partition:
    partition = Partition(0, 1, definitions)
    partition.idle.add(partition.topics.orders)
    watch(clock, partition, {"offer": "offer, the rest", "snapshot": "flush, the rest", "_pack_delta": "changelog: deltas"})
    watch(clock, partition, {"_pack_snapshot": "changelog: snapshots", "_capture": "flush: what changed", "sink_rows": "sink: rows"})
    watch(clock, partition.decoder, {"decode": "decode"})
    watch(clock, partition.board, {"apply": "board: grouping by user"})
    watch(clock, partition.board.users, {"resolve": "board: users"})
    watch(clock, partition.board.seen, {"duplicates": "seen"})
    for table in partition.board.tables:
        watch(clock, table, {"apply": f"table: {type(table).__name__}"})
    return partition


def runs(total: int) -> Iterator[Run]:
    for at in range(0, total, CHUNK):
        n = min(CHUNK, total - at)
        start_ms = START_MS + at // CHUNK * CHUNK_MS
        keys, values = events(n, USERS, seed=at + 1, start_ms=start_ms, span_ms=CHUNK_MS)
        records = [RawRecord(at + i, key, value, start_ms + CHUNK_MS) for i, (key, value) in enumerate(zip(keys, values, strict=True))]
        for first in range(0, n, RUN):
            some = records[first : first + RUN]
            yield Run("clickstream", 0, some, at + first + len(some), at + first)


def flush(partition: Partition) -> int:
    """Snapshot, commit and sink at once; bytes for the changelog."""
    taken = partition.snapshot()
    if taken is None:
        return 0
    partition.committed(taken)
    sendable = partition.sink_rows()
    if sendable is not None:
        partition.sunk(sendable[0])
    return sum(len(record.value) for record in taken.records)


def measure(definitions: Definitions, total: int) -> tuple[dict[str, float], int]:
    """CPU µs an event by part, and the changelog's bytes."""
    clock, logged = Clock(), 0
    partition = partition_of(definitions, clock)
    for number, run in enumerate(runs(total)):
        partition.offer(run)
        if number % RUNS_A_FLUSH == RUNS_A_FLUSH - 1:
            logged += flush(partition)
    return {name: spent / total * 1e6 for name, spent in clock.spent.items()}, logged


def main(total: int = 1_920_000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.toml"
        file.write_text(DEFINITIONS)
        definitions = load(file)
    start = time.process_time()
    measure(definitions, 4 * RUN)
    print(f"compiling or loading the kernels, and a warm-up: {time.process_time() - start:.1f} CPU s")
    settle()  # as the worker does
    rounds = [measure(definitions, total) for _ in range(ROUNDS)]
    medians = {name: statistics.median(parts[name] for parts, _ in rounds) for name in rounds[0][0]}
    print(f"{total:,} events of 255 bytes, {USERS:,} users (Zipf 0.8), one partition, runs of {RUN:,}; CPU µs an event")
    for name, spent in medians.items():
        print(f"{name:28} {spent:6.3f}")
    print(f"{'all':28} {statistics.median(sum(parts.values()) for parts, _ in rounds):6.3f}")
    print(f"changelog: {rounds[0][1] / total:.1f} bytes an event")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
