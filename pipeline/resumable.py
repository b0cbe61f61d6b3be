"""A file to Kafka exactly once, whatever interrupts it: each chunk of records goes out in one Kafka transaction together with how far the file has got.

In: what `pipeline.files` reads. Out: records on the source topics, and a position a file on the compacted topic `<app id>.replay`. Called by
`shopstream replay`, and by `shopstream traffic` for records that are the same at each start without being in a file.

The producer's transactional id is the file's own. Starting it ends a former replay of the same file that may still run, and settles the transaction it left
open; only then is the position read, with `read_committed`. So a record is visible with its position or not at all, and the next start skips what is sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import aiokafka
import msgspec
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, ProducerFenced

from pipeline.event_times import moved, time_of
from pipeline.files import Keyed
from pipeline.replay import new_producer, send

CHUNK = 20_000
PACED_SECONDS = 0.5
POSITION_SECONDS = 90
"""A killed replay's open transaction holds the positions of all files back until Kafka gives it up: 60 s at most."""


class ReplayError(Exception):
    """The replay can't go on; nothing is lost or doubled, and the same command goes on from where it stopped."""


class Position(msgspec.Struct, frozen=True):
    """How far a file has got: records sent, and by how many ms their event times were moved (None: not at all)."""

    file: str
    sent: int = 0
    moved_ms: int | None = None
    done: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """Where records go. `topic_of`: topic by topic kind; all have `partitions`. `client`: aiokafka's bootstrap_servers and security arguments."""

    client: dict[str, Any]
    topic_of: dict[str, str]
    partitions: int
    app_id: str

    @property
    def positions(self) -> str:
        return f"{self.app_id}.replay"


@dataclass(slots=True)
class Replay:
    """One file on its way. `identity` says which it is (`identity_of`); `speed` 0 is flat out."""

    target: Target
    identity: str
    file: str
    speed: float = 0.0
    progress: Callable[[int], None] = lambda _: None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    _producer: Any = None

    async def begin(self) -> Position:
        """Take the file over from whoever may have been at it; where it stands. Raises ReplayError."""
        self._producer = new_producer(self.target.client, f"{self.target.app_id}.replay.{self.identity}")
        try:
            await self._producer.start()
            return await asyncio.wait_for(self._position(), POSITION_SECONDS)
        except (KafkaError, TimeoutError) as error:
            raise _said(error) from error

    async def send(self, records: Iterator[Keyed], position: Position) -> Position:
        """Send what comes after `position`; where it stands at the end, or when `stop` is set. Raises ReplayError."""
        for _ in islice(records, position.sent):
            pass
        return await self.send_chunks(_paced(records, self.speed, self.stop), position)

    async def send_chunks(self, chunks: AsyncIterator[list[Keyed]], position: Position) -> Position:
        """The same for chunks that begin at `position` and come when their time has come, each a transaction. Raises ReplayError."""
        try:
            async for chunk in chunks:
                if position.moved_ms is not None:
                    chunk = [record._replace(value=moved(record.value, position.moved_ms)) for record in chunk]
                position = msgspec.structs.replace(position, sent=position.sent + len(chunk))
                await self._transaction(chunk, position)
                self.progress(len(chunk))
            if not self.stop.is_set():
                position = msgspec.structs.replace(position, done=True)
                await self._transaction([], position)
        except (KafkaError, TimeoutError) as error:
            raise _said(error) from error
        return position

    async def close(self) -> None:
        if self._producer is not None:
            await self._producer.stop()

    async def _transaction(self, chunk: list[Keyed], position: Position) -> None:
        await self._producer.begin_transaction()
        await send(self._producer, chunk, self.target.topic_of, self.target.partitions)
        await self._producer.send_and_wait(self.target.positions, msgspec.json.encode(position), self.identity.encode(), 0)
        await self._producer.commit_transaction()

    async def _position(self) -> Position:
        """Read up to the topic's very end: the last stable offset may lie before our own position while another file's transaction is open."""
        place = TopicPartition(self.target.positions, 0)
        plain = aiokafka.AIOKafkaConsumer(**self.target.client, enable_auto_commit=False)
        committed = aiokafka.AIOKafkaConsumer(
            **self.target.client, isolation_level="read_committed", enable_auto_commit=False, auto_offset_reset="earliest"
        )
        position = Position(self.file)
        async with plain, committed:
            end = (await plain.end_offsets([place]))[place]
            committed.assign([place])
            await committed.seek_to_beginning(place)
            while await committed.position(place) < end:
                for found in (await committed.getmany(place, timeout_ms=200)).values():
                    for record in found:
                        if record.key == self.identity.encode():
                            position = msgspec.json.decode(record.value, type=Position)
        return position


def identity_of(path: Path, map_file: Path | None, topic: str, target: Target) -> str:
    """Hash of all that decides which records go where: the content of the file and of its map, and the topics. A changed file is another file."""
    digest = hashlib.blake2b(repr((topic, sorted(target.topic_of.items()), target.partitions, path.suffixes)).encode(), digest_size=12)
    for part in filter(None, (path, map_file)):
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def shift_to_now(records: Iterator[Keyed], speed: float, now_ms: int) -> int:
    """By how many ms to move event times so that the newest event arrives at its own time: now, or at a speed when its turn comes.

    Times that lie ahead of `now_ms` were wrong when they were recorded, and count for nothing here.
    """
    first = newest = None
    for record in records:
        ts = time_of(record.value)
        if ts is not None and ts <= now_ms:
            first = ts if first is None else first
            newest = ts if newest is None else max(newest, ts)
    if first is None or newest is None:
        return 0
    return now_ms + (int(max(0, newest - first) / speed) if speed else 0) - newest


async def _paced(records: Iterator[Keyed], speed: float, stop: asyncio.Event) -> AsyncIterator[list[Keyed]]:
    """Chunks: as large as is good when flat out; at a speed those whose time has come, twice a second or so."""
    if not speed:
        while not stop.is_set() and (whole := list(islice(records, CHUNK))):
            yield whole
            await asyncio.sleep(0)
        return
    first: int | None = None
    started = time.monotonic()
    chunk: list[Keyed] = []
    for record in records:
        ts = time_of(record.value)
        if ts is not None:
            first = ts if first is None else first
            due = started + (ts - first) / 1000 / speed
            while not stop.is_set() and due > time.monotonic():
                if chunk:
                    yield chunk
                    chunk = []
                await _sleep(PACED_SECONDS, stop)
        if stop.is_set():
            break
        chunk.append(record)
        if len(chunk) >= CHUNK:
            yield chunk
            chunk = []
    if chunk and not stop.is_set():
        yield chunk


async def _sleep(seconds: float, stop: asyncio.Event) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


def _said(error: Exception) -> ReplayError:
    if isinstance(error, ProducerFenced):
        return ReplayError("another replay of the same file has taken over; this one ends, and nothing is doubled.")
    return ReplayError(
        f"Kafka does not take the records ({error!r}). Nothing is lost or doubled: once it answers, the same command goes on from where this one stopped."
    )
