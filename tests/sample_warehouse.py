"""A warehouse filled from event files through `pipeline.partition`, without Kafka; the tests of the commands read it.

Out: a folder for `chdb:///folder`. Every record goes through decode, lateness, duplicates and the tables as in a worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from kafka.partitioner.default import murmur2

from pipeline.definitions import Definitions
from pipeline.files import Keyed, read
from pipeline.partition import Partition, Run
from pipeline.sinks.catalog import install
from pipeline.sinks.warehouse import Warehouse
from pipeline.topic_names import Topics

SAMPLE = Path(__file__).parents[1] / "sample"
RECORD_TS = 1_893_456_000_000  # 2030: nothing of the sample is from the future
RUN = 4000


class Record(NamedTuple):
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: int
    headers: tuple[tuple[str, bytes], ...] = ()


def sample_records() -> list[Keyed]:
    """The bundled sample: three weeks of a small shop, with late, double and bad events."""
    return [*read(SAMPLE / "clickstream.ndjson.gz", "clickstream"), *read(SAMPLE / "orders.ndjson.gz", "orders")]


def fill(
    warehouse: Warehouse, definitions: Definitions, records: Iterable[Keyed], partitions: int = 2, topics: Topics | None = None
) -> None:
    """Apply `records` in their order within a topic partition, flush, and insert what a worker's sink would; the catalog first."""
    topics = topics or Topics()
    warehouse.migrate()
    install(warehouse, definitions, 1)
    lanes: dict[tuple[str, int], list[Keyed]] = {}
    for record in records:
        key = (record.key or "").encode()
        lanes.setdefault((record.topic, (murmur2(key) & 0x7FFFFFFF) % partitions), []).append(record)
    for number in range(partitions):
        partition = Partition(number, partitions, definitions, topics)
        mine = {topic: lane for (topic, p), lane in lanes.items() if p == number}
        _offer(partition, number, mine, {"clickstream": topics.clickstream, "orders": topics.orders})
        flush = partition.snapshot()
        if flush is not None:
            partition.committed(flush)
        taken = partition.sink_rows()
        if taken is not None:
            warehouse.insert(taken[1])


def _offer(partition: Partition, number: int, lanes: Mapping[str, list[Keyed]], names: Mapping[str, str]) -> None:
    offsets = dict.fromkeys(lanes, 0)
    for kind, lane in lanes.items():
        left = iter(lane)
        while chunk := list(islice(left, RUN)):
            begin = offsets[kind]
            records = [Record(begin + i, r.key.encode() if r.key else None, r.value, RECORD_TS) for i, r in enumerate(chunk)]
            offsets[kind] += len(records)
            partition.offer(Run(names[kind], number, records, offsets[kind], begin))
