"""The simulation's log and warehouse do what the real ones do: the same assertions on Apache Kafka, on ClickHouse (chdb) and on the doubles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol
from uuid import uuid4

import aiokafka
import numpy as np
import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from aiokafka.errors import KafkaError, OffsetOutOfRangeError
from aiokafka.structs import TopicPartition

from embedded.kafka import EmbeddedKafka
from pipeline.sinks.embedded import EmbeddedWarehouse
from schemas.rows import COLUMNS, Rows
from tests.simulation.log import Fenced, Log, Producer
from tests.simulation.warehouse import KEYS, AmbiguousVersion, MemoryWarehouse

Found = list[tuple[int, bytes]]
PARTITIONS = 2


# --- the log ------------------------------------------------------------------------------------------------------------------


class Transactional(Protocol):
    async def send(self, topic: str, partition: int, value: bytes) -> int: ...
    async def commit(self) -> None: ...
    async def abort(self) -> None: ...


class AnyLog(Protocol):
    """What the simulation asks of Kafka. Methods of a fenced producer raise Fenced."""

    async def topic(self) -> str: ...
    async def append(self, topic: str, partition: int, value: bytes) -> int: ...
    async def producer(self, transactional_id: str) -> Transactional: ...
    async def end(self, topic: str, partition: int) -> int: ...
    async def start(self, topic: str, partition: int) -> int: ...
    async def read(self, topic: str, partition: int, position: int) -> tuple[Found, int]: ...
    async def delete_before(self, topic: str, partition: int, offset: int) -> None: ...


class DoubleProducer:
    def __init__(self, log: Log, producer: Producer) -> None:
        self.log, self.inner = log, producer

    async def send(self, topic: str, partition: int, value: bytes) -> int:
        return self.inner.send(topic, partition, None, value)

    async def commit(self) -> None:
        self.inner.commit()
        self.log.settle(self.inner.transactional_id)

    async def abort(self) -> None:
        self.inner.abort()
        self.log.settle(self.inner.transactional_id)


class Double:
    def __init__(self) -> None:
        self.log = Log()

    async def topic(self) -> str:
        return uuid4().hex

    async def append(self, topic: str, partition: int, value: bytes) -> int:
        return self.log.append(topic, partition, None, value, [])

    async def producer(self, transactional_id: str) -> DoubleProducer:
        return DoubleProducer(self.log, self.log.start_producer(transactional_id))

    async def end(self, topic: str, partition: int) -> int:
        return self.log.end(topic, partition)

    async def start(self, topic: str, partition: int) -> int:
        return self.log.start(topic, partition)

    async def read(self, topic: str, partition: int, position: int) -> tuple[Found, int]:
        records, position = self.log.read(topic, partition, position)
        return [(record.offset, record.value or b"") for record in records], position

    async def delete_before(self, topic: str, partition: int, offset: int) -> None:
        self.log.delete_before(topic, partition, offset)


class KafkaProducer:
    """A transaction begins with the first send, as in the double. Markers come after the reply to a commit: here they are waited for."""

    def __init__(self, kafka: Kafka, producer: Any) -> None:
        self.kafka, self.inner = kafka, producer
        self.touched: set[TopicPartition] = set()

    async def _fenced_or(self, work: Any) -> Any:
        try:
            return await asyncio.wait_for(work, 30)
        except KafkaError as error:
            if type(error).__name__ in ("ProducerFenced", "InvalidProducerEpoch"):
                raise Fenced(str(error)) from error
            raise

    async def send(self, topic: str, partition: int, value: bytes) -> int:
        if not self.touched:
            await self._fenced_or(self.inner.begin_transaction())
        self.touched.add(TopicPartition(topic, partition))
        return int((await self._fenced_or(self.inner.send_and_wait(topic, value, partition=partition))).offset)

    async def commit(self) -> None:
        await self._end(self.inner.commit_transaction())

    async def abort(self) -> None:
        await self._end(self.inner.abort_transaction())

    async def _end(self, work: Any) -> None:
        touched, self.touched = list(self.touched), set()
        before = await self.kafka.uncommitted.end_offsets(touched)
        await self._fenced_or(work)
        for _ in range(200):
            after = await self.kafka.uncommitted.end_offsets(touched)
            if all(after[tp] > before[tp] for tp in touched):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"no markers: {before}")


class Kafka:
    def __init__(self, bootstrap: str) -> None:
        self.client = {"bootstrap_servers": bootstrap}
        self.started: list[Any] = []

    async def __aenter__(self) -> Kafka:
        self.admin, self.plain = AIOKafkaAdminClient(**self.client), aiokafka.AIOKafkaProducer(**self.client)
        self.consumer = aiokafka.AIOKafkaConsumer(
            **self.client, isolation_level="read_committed", enable_auto_commit=False, auto_offset_reset="earliest"
        )
        self.uncommitted = aiokafka.AIOKafkaConsumer(**self.client, enable_auto_commit=False)
        for one in (self.admin, self.plain, self.consumer, self.uncommitted):
            await one.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(one.stop() for one in self.started), return_exceptions=True)
        await self.plain.stop()
        await self.consumer.stop()
        await self.uncommitted.stop()
        await self.admin.close()

    async def topic(self) -> str:
        name = uuid4().hex
        await self.admin.create_topics([NewTopic(name, PARTITIONS, 1)])
        return name

    async def append(self, topic: str, partition: int, value: bytes) -> int:
        return int((await self.plain.send_and_wait(topic, value, partition=partition)).offset)

    async def producer(self, transactional_id: str) -> KafkaProducer:
        producer = aiokafka.AIOKafkaProducer(**self.client, transactional_id=transactional_id, acks="all")
        self.started.append(producer)
        await asyncio.wait_for(producer.start(), 30)
        return KafkaProducer(self, producer)

    async def end(self, topic: str, partition: int) -> int:
        tp = TopicPartition(topic, partition)
        return int((await self.consumer.end_offsets([tp]))[tp])

    async def start(self, topic: str, partition: int) -> int:
        tp = TopicPartition(topic, partition)
        return int((await self.consumer.beginning_offsets([tp]))[tp])

    async def read(self, topic: str, partition: int, position: int) -> tuple[Found, int]:
        tp, found = TopicPartition(topic, partition), []
        self.consumer.assign([tp])
        end = await self.end(topic, partition)
        self.consumer.seek(tp, position)
        for _ in range(100):
            if position >= end:
                break
            try:
                fetched = await self.consumer.getmany(tp, timeout_ms=200)
            except OffsetOutOfRangeError:
                continue
            found += [(record.offset, record.value) for records in fetched.values() for record in records]
            position = await self.consumer.position(tp)
        return found, position

    async def delete_before(self, topic: str, partition: int, offset: int) -> None:
        await self.admin.delete_records({TopicPartition(topic, partition): RecordsToDelete(before_offset=offset)})


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedKafka]:
    with EmbeddedKafka(quiet=True) as broker:
        yield broker


@pytest.fixture(params=["double", "kafka"])
async def log(request: pytest.FixtureRequest) -> AsyncIterator[AnyLog]:
    if request.param == "double":
        yield Double()
    else:
        async with Kafka(request.getfixturevalue("broker").bootstrap) as kafka:
            yield kafka


def name() -> str:
    return f"id-{uuid4().hex}"


async def test_records_of_a_transaction_are_read_once_it_is_committed(log: AnyLog) -> None:
    topic, producer = await log.topic(), await log.producer(name())
    assert await producer.send(topic, 0, b"a") == 0
    assert await producer.send(topic, 0, b"b") == 1
    assert await log.read(topic, 0, 0) == ([], 0)
    await producer.commit()
    assert (await log.read(topic, 0, 0))[0] == [(0, b"a"), (1, b"b")]


async def test_the_end_is_the_last_stable_offset(log: AnyLog) -> None:
    topic, producer = await log.topic(), await log.producer(name())
    await log.append(topic, 0, b"before")
    await producer.send(topic, 0, b"open")
    await log.append(topic, 0, b"after")
    assert await log.end(topic, 0) == 1
    assert (await log.read(topic, 0, 0))[0] == [(0, b"before")]
    await producer.commit()
    assert await log.end(topic, 0) == 4  # three records and a marker


async def test_a_marker_takes_an_offset_in_every_partition_of_the_transaction(log: AnyLog) -> None:
    topic, producer = await log.topic(), await log.producer(name())
    await producer.send(topic, 0, b"a")
    await producer.send(topic, 1, b"b")
    await producer.commit()
    assert [await log.end(topic, number) for number in range(PARTITIONS)] == [2, 2]
    assert await log.append(topic, 0, b"c") == 2
    assert await log.read(topic, 0, 1) == ([(2, b"c")], 3)


async def test_a_reader_at_the_end_is_past_the_marker(log: AnyLog) -> None:
    topic, producer = await log.topic(), await log.producer(name())
    await producer.send(topic, 0, b"a")
    await producer.commit()
    assert await log.read(topic, 0, 0) == ([(0, b"a")], 2)


async def test_aborted_records_keep_their_offsets_and_are_not_read(log: AnyLog) -> None:
    topic, producer = await log.topic(), await log.producer(name())
    await producer.send(topic, 0, b"dropped")
    await producer.abort()
    await producer.send(topic, 0, b"kept")
    await producer.commit()
    assert await log.read(topic, 0, 0) == ([(2, b"kept")], 4)


async def test_a_second_producer_aborts_what_the_first_left_open(log: AnyLog) -> None:
    topic, own = await log.topic(), name()
    first = await log.producer(own)
    await first.send(topic, 0, b"lost")
    second = await log.producer(own)
    assert await log.end(topic, 0) == 2
    await second.send(topic, 0, b"kept")
    await second.commit()
    assert (await log.read(topic, 0, 0))[0] == [(2, b"kept")]


async def test_a_fenced_producer_can_not_commit(log: AnyLog) -> None:
    topic, own = await log.topic(), name()
    first = await log.producer(own)
    await first.send(topic, 0, b"lost")
    await log.producer(own)
    with pytest.raises(Fenced):
        await first.commit()
    assert (await log.read(topic, 0, 0))[0] == []


async def test_a_fenced_producer_can_not_send(log: AnyLog) -> None:
    topic, own = await log.topic(), name()
    first = await log.producer(own)
    await first.send(topic, 0, b"kept")
    await first.commit()
    await log.producer(own)
    with pytest.raises(Fenced):
        await first.send(topic, 0, b"refused")
    assert (await log.read(topic, 0, 0))[0] == [(0, b"kept")]


async def test_what_was_committed_before_the_fence_stays(log: AnyLog) -> None:
    topic, own = await log.topic(), name()
    first = await log.producer(own)
    await first.send(topic, 0, b"kept")
    await first.commit()
    await log.producer(own)
    assert await log.read(topic, 0, 0) == ([(0, b"kept")], 2)


async def test_producers_of_different_ids_do_not_fence_each_other(log: AnyLog) -> None:
    topic = await log.topic()
    first, second = await log.producer(name()), await log.producer(name())
    await first.send(topic, 0, b"a")
    await second.send(topic, 0, b"b")
    await second.commit()
    assert await log.end(topic, 0) == 0
    await first.commit()
    assert (await log.read(topic, 0, 0))[0] == [(0, b"a"), (1, b"b")]


async def test_a_reader_below_the_deleted_head_goes_on_at_the_new_beginning(log: AnyLog) -> None:
    topic = await log.topic()
    for value in (b"a", b"b", b"c"):
        await log.append(topic, 0, value)
    await log.delete_before(topic, 0, 2)
    assert await log.start(topic, 0) == 2
    assert await log.end(topic, 0) == 3
    assert await log.read(topic, 0, 0) == ([(2, b"c")], 3)


async def test_a_late_deletion_of_less_changes_nothing(log: AnyLog) -> None:
    topic = await log.topic()
    for value in (b"a", b"b", b"c"):
        await log.append(topic, 0, value)
    await log.delete_before(topic, 0, 2)
    await log.delete_before(topic, 0, 1)
    assert await log.start(topic, 0) == 2


# --- the warehouse ------------------------------------------------------------------------------------------------------------


class AnyWarehouse(Protocol):
    def insert(self, rows: Rows) -> None: ...
    def newest(self, table: str, column: str) -> dict[tuple[Any, ...], Any]: ...


class DoubleWarehouse:
    def __init__(self) -> None:
        self.inner = MemoryWarehouse()

    def insert(self, rows: Rows) -> None:
        self.inner.insert(rows)

    def newest(self, table: str, column: str) -> dict[tuple[Any, ...], Any]:
        at = [c for c in COLUMNS[table] if c not in (*KEYS[table], "version")].index(column)
        return {key: rest[at] for key, (_, rest) in self.inner.newest[table].items()}


class ClickHouse:
    def __init__(self) -> None:
        self.inner = EmbeddedWarehouse("")
        self.inner.migrate()

    def insert(self, rows: Rows) -> None:
        self.inner.insert(rows)

    def newest(self, table: str, column: str) -> dict[tuple[Any, ...], Any]:
        keys = ", ".join(f"toString(`{key}`)" if key in ("window_start", "cohort_start") else f"`{key}`" for key in KEYS[table])
        rows = self.inner.query(
            f"SELECT {keys}, argMax(`{column}`, version) FROM {table} GROUP BY {', '.join(f'`{k}`' for k in KEYS[table])}"
        )
        return {row[:-1]: row[-1] for row in rows}


@pytest.fixture(params=["double", "clickhouse"])
def warehouse(request: pytest.FixtureRequest) -> Iterator[AnyWarehouse]:
    if request.param == "double":
        yield DoubleWarehouse()
        return
    clickhouse = ClickHouse()
    for table in KEYS:
        clickhouse.inner.query(f"TRUNCATE TABLE {table}")
    yield clickhouse
    clickhouse.inner.close()


def progress(applied: int, version: int, topic: str = "clickstream") -> Rows:
    row = (topic, 0, applied, 0, applied, 0, 0, 0, 0, version, 0)
    return {"progress": {column: [value] for column, value in zip(COLUMNS["progress"], row, strict=True)}}


def test_newest_version_wins_whenever_it_came(warehouse: AnyWarehouse) -> None:
    for applied, version in ((5, 2), (9, 4), (7, 3)):
        warehouse.insert(progress(applied, version))
    assert warehouse.newest("progress", "applied") == {("clickstream", 0, 0): 9}


def test_a_repeated_insert_changes_nothing(warehouse: AnyWarehouse) -> None:
    for _ in range(3):
        warehouse.insert(progress(5, 2))
    assert warehouse.newest("progress", "applied") == {("clickstream", 0, 0): 5}


def test_rows_of_different_keys_live_side_by_side(warehouse: AnyWarehouse) -> None:
    warehouse.insert(progress(5, 2))
    warehouse.insert(progress(6, 1, "orders"))
    assert warehouse.newest("progress", "applied") == {("clickstream", 0, 0): 5, ("orders", 0, 0): 6}


def test_a_row_of_value_zero_replaces(warehouse: AnyWarehouse) -> None:
    start = 1_767_225_600_000
    for value, version in ((3, 1), (0, 2)):
        row = ("events", "k1", "1h", start, "", "", "", -1, 0, value, start, version)
        columns = {c: np.array([v]) if isinstance(v, int) else [v] for c, v in zip(COLUMNS["kpi_cells"], row, strict=True)}
        warehouse.insert({"kpi_cells": columns})
    assert list(warehouse.newest("kpi_cells", "value").values()) == [0]


def test_the_doubles_keys_are_the_sorting_keys_of_the_tables() -> None:
    clickhouse = ClickHouse()
    found = dict(clickhouse.inner.query("SELECT name, sorting_key FROM system.tables WHERE database = 'default'"))
    clickhouse.inner.close()
    assert {table: tuple(found[table].split(", ")) for table in KEYS} == KEYS


def test_two_values_of_one_version_are_an_error_in_the_double() -> None:
    double = MemoryWarehouse()
    row = ("clickstream", 0, 7, "too_late", "cause", b"", b"", 0, 3)
    rows = {"rejects": {column: [value] for column, value in zip(COLUMNS["rejects"], row, strict=True)}}
    double.insert(rows)
    double.insert(rows)
    with pytest.raises(AmbiguousVersion):
        double.insert({"rejects": rows["rejects"] | {"cause": ["another"]}})
