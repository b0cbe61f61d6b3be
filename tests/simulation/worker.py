"""One worker process as `pipeline.streaming` drives it, cut into steps: everything that waits is a generator that yields a `Request`.

`world` decides when a request is carried out and what its sender hears, when the worker crashes, sleeps and wakes. What breaks the protocol on
purpose (`mutations`) overrides these methods.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from pipeline.changelog import ChangelogError
from pipeline.partition import Flush, Partition, Run
from pipeline.sinks.warehouse import SinkUnavailable
from pipeline.streaming.standby import Standby
from schemas.rows import Rows
from tests.simulation.case import TOPICS, Case
from tests.simulation.log import Fenced, Log, Producer
from tests.simulation.warehouse import KEYS, MemoryWarehouse

Records = list[tuple[bytes | None, bytes | None]]


class NoReply(Exception):
    """A request to Kafka failed, or was carried out and the reply was lost: its sender does not know."""


class ProcessEnds(Exception):
    """What was read makes no sense, as another worker has fenced this one and writes on: a loud end, and a restart is exact. An owner must never see this."""


@dataclass(eq=False, slots=True)
class Request:
    """A call of a broker or a warehouse that its sender waits for. `act(part)` carries it out, only in part for an insert when `part` says so."""

    what: str
    act: Callable[[int], Any]
    lost: type[Exception] = NoReply  # what the sender gets without a reply
    done: bool = False


Steps = Generator[Request, Any, Any]


@dataclass(eq=False, slots=True)
class Task:
    """Something that waits: a take-over, a flush, an insert, a deletion."""

    steps: Steps
    request: Request


@dataclass(eq=False, slots=True)
class Cursor:
    """The consumer's place in one source partition."""

    begin: int = 0  # of the next run
    position: int = 0  # past markers
    start: int = 0
    epoch: int = 0


@dataclass(eq=False, slots=True)
class Owned:
    partition: Partition
    producer: Producer
    cursors: dict[str, Cursor] = field(default_factory=lambda: {topic: Cursor() for topic in TOPICS.sources})


class Worker:
    """Partitions of one process; `tasks` by ("take" | "flush" | "delete", partition) or ("feed", -1)."""

    def __init__(self, case: Case, log: Log, warehouse: MemoryWarehouse) -> None:
        self.case, self.log, self.warehouse = case, log, warehouse
        self.owned: dict[int, Owned] = {}
        self.wanted: set[int] = set()
        self.held = False
        self.epochs: dict[tuple[str, int], int] = {}
        self.runs: defaultdict[tuple[str, int], deque[Run]] = defaultdict(deque)  # fetched and on their way to the partition
        self.tasks: dict[tuple[str, int], Task] = {}
        self.standbys: dict[int, Standby] = {}
        self.standbys: dict[int, Standby] = {}
        self.asleep = False

    # --- tasks ------------------------------------------------------------------------------------------------------------

    def spawn(self, kind: str, number: int, steps: Steps) -> bool:
        """Run a task to its first request; False when the like of it is running."""
        if (kind, number) in self.tasks:
            return False
        try:
            self.tasks[kind, number] = Task(steps, next(steps))
        except StopIteration:
            return False
        return True

    def go(self, key: tuple[str, int], result: Any = None, error: Exception | None = None) -> None:
        """A task hears of its request and runs to the next one."""
        task = self.tasks[key]
        try:
            task.request = task.steps.throw(error) if error is not None else task.steps.send(result)
        except StopIteration:
            if self.tasks.get(key) is task:
                del self.tasks[key]

    # --- rebalance --------------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        self.held = True
        for number in self.owned:
            self._new_epochs(number)

    def assigned(self, wanted: set[int]) -> None:
        self.wanted, self.held = wanted, False
        for number in range(self.case.partitions):
            if number not in wanted:
                self.tasks.pop(("take", number), None)
                self.owned.pop(number, None)
            elif number in self.owned:
                self.join(number)
            else:
                self.spawn("take", number, self.take(number))

    def lost(self, number: int) -> None:
        """A transaction failed: only the changelog knows what became of it."""
        self.owned.pop(number, None)
        if number in self.wanted:
            self.spawn("take", number, self.take(number))

    # --- taking over ------------------------------------------------------------------------------------------------------

    def take(self, number: int) -> Steps:
        producer, records, standby = yield from self.fence_and_read(number)
        partition = self.from_standby(standby, records) if standby is not None else None
        if standby is not None and partition is None:
            producer, records, _ = yield from self.fence_and_read(number)
        try:
            partition = partition or self.from_changelog(number, records)
        except ChangelogError as error:
            if self.log.coordinators[producer.transactional_id].epoch != producer.epoch:
                raise ProcessEnds(str(error)) from error
            raise
        self.owned[number] = Owned(partition, producer)
        self.join(number)

    def from_standby(self, standby: Standby, rest: Records) -> Partition | None:
        """None when it does not fit: the changelog is read again."""
        try:
            return standby.take_over(rest)
        except ChangelogError:
            return None

    def from_changelog(self, number: int, records: Records) -> Partition:
        partition = self.new_partition(number)
        if records:
            self.restore(partition, records)
        elif self.warehouse.version(number):
            raise ChangelogError(f"partition {number} has no changelog, but the warehouse holds its rows")
        return partition

    def fence_and_read(self, number: int) -> Steps:
        """The former owner is out before the end of the changelog is asked for; from the beginning when Kafka does not answer.

        With a standby only what comes after it is read, unless a part of that was deleted.
        """
        while True:
            try:
                producer = yield from self.fence(number)
                standby = self.standbys.pop(number, None)
                if standby is not None and not self.fits(standby, number):
                    standby = None
                return producer, (yield from self.read_changelog(number, standby.offset if standby else None)), standby
            except NoReply:
                pass

    def fits(self, standby: Standby, number: int) -> bool:
        return standby.offset > 0 and self.log.start(TOPICS.changelog, number) <= standby.offset <= self.changelog_end(number)

    def fence(self, number: int) -> Steps:
        return (yield Request(f"start producer {number}", lambda _: self.log.start_producer(transactional_id(number))))

    def changelog_end(self, number: int) -> int:
        return self.log.end(TOPICS.changelog, number)

    def read_changelog(self, number: int, offset: int | None = None) -> Steps:
        """Two records at a time; what is before a new snapshot can be deleted meanwhile, then the consumer begins again at the first there is."""
        end, position = self.changelog_end(number), self.log.start(TOPICS.changelog, number) if offset is None else offset
        records: Records = []
        while position < end:
            found, position = self.log.read(TOPICS.changelog, number, position, 2)
            records += [(record.key, record.value) for record in found]
            yield Request(f"read changelog {number} to {position} of {end}", lambda _: None)
        return records

    def follow(self, number: int, most: int) -> bool:
        """A standby of a partition that is not ours reads on."""
        if number in self.owned or ("take", number) in self.tasks:
            return False
        standby = self.standbys.setdefault(number, Standby(self.new_partition(number)))
        records, _ = self.log.read(TOPICS.changelog, number, standby.offset, most)
        if records:
            standby.follow(records)
        return bool(records)

    def new_partition(self, number: int) -> Partition:
        partition = Partition(number, self.case.partitions, self.case.definitions, TOPICS, self.case.options)
        if self.case.evict:
            partition._evict_at = 0  # at the first flush
        return partition

    def restore(self, partition: Partition, records: Records) -> None:
        partition.restore(records)

    def positions(self, partition: Partition) -> dict[str, int]:
        return partition.positions

    def join(self, number: int) -> None:
        """Seek to the positions. Runs fetched before are of an older epoch."""
        self._new_epochs(number)
        owned = self.owned[number]
        positions = self.positions(owned.partition)
        for topic, cursor in owned.cursors.items():
            cursor.start = cursor.begin = cursor.position = positions.get(topic, self.log.start(topic, number))
            cursor.epoch = self.epochs[topic, number]

    def _new_epochs(self, number: int) -> None:
        for topic in TOPICS.sources:
            self.epochs[topic, number] = self.epochs.get((topic, number), 0) + 1

    # --- intake -----------------------------------------------------------------------------------------------------------

    def fetch(self, number: int, topic: str, most: int) -> bool:
        cursor = self.owned[number].cursors[topic]
        before = cursor.position
        records, cursor.position = self.log.read(topic, number, cursor.position, most)
        if records:
            following = records[-1].offset + 1
            self.runs[topic, number].append(Run(topic, number, records, following, cursor.begin, cursor.epoch))
            cursor.begin = following
        return cursor.position > before

    def offer(self, number: int, topic: str) -> bool:
        """Apply the next run that was fetched; drop one from before the last seek, which reads it again."""
        runs = self.runs[topic, number]
        if not runs:
            return False
        run = runs.popleft()
        if self.current(run):
            self.owned[number].partition.offer(run)
        return True

    def current(self, run: Run) -> bool:
        return run.epoch == self.epochs[run.topic, run.partition]

    def look_at_end(self, number: int, topic: str) -> bool:
        """Markers after the last record are progress."""
        owned = self.owned[number]
        cursor = owned.cursors[topic]
        if self.held or cursor.position < self.log.end(topic, number):
            return False
        applied = owned.partition.positions.get(topic, -1)
        if cursor.begin == (cursor.start if applied < 0 else applied):
            owned.partition.advance(topic, cursor.position)
        return True

    # --- flush ------------------------------------------------------------------------------------------------------------

    def flush(self, number: int) -> Steps:
        owned = self.owned[number]
        flush = yield from self.snapshot(owned.partition)
        if flush is None:
            return
        try:
            first = yield from self.transact(owned.producer, flush)
        except (NoReply, Fenced):
            if self.owned.get(number) is owned:
                self.lost(number)
            return
        owned.partition.committed(flush)
        if flush.snapshot and first:
            self.spawn("delete", number, self.delete_before(number, first))

    def snapshot(self, partition: Partition) -> Steps:
        return partition.snapshot()
        yield

    def transact(self, producer: Producer, flush: Flush) -> Steps:
        """The offset of the flush's first changelog record."""
        offsets: list[int] = []
        chunk = self.case.send_at_once
        for at in range(0, len(flush.records), chunk):
            records = flush.records[at : at + chunk]
            sent = yield Request(
                f"send {len(records)} records of flush {flush.n}",
                lambda _, records=records: [producer.send(r.topic, r.partition, r.key, r.value, r.headers) for r in records],
            )
            offsets += [offset for offset, record in zip(sent, records, strict=True) if record.topic == TOPICS.changelog]
        yield Request(f"commit flush {flush.n}", lambda _: producer.commit())
        return min(offsets, default=None)

    def delete_before(self, number: int, offset: int) -> Steps:
        try:
            yield Request(f"delete changelog {number} before {offset}", lambda _: self.log.delete_before(TOPICS.changelog, number, offset))
        except NoReply:
            return

    # --- sink -------------------------------------------------------------------------------------------------------------

    def feed(self) -> Steps:
        waiting = [(owned.partition, *rows) for owned in self.owned.values() if (rows := owned.partition.sink_rows())]
        if not waiting:
            return
        yield from self.insert([rows for _, _, rows in waiting])
        for partition, n, _ in waiting:
            partition.sunk(n)

    def insert(self, parts: list[Rows]) -> Steps:
        def act(tables: int) -> None:
            for rows in parts:
                self.warehouse.insert(rows, tables or len(KEYS))

        while True:
            try:
                yield Request("insert", act, SinkUnavailable)
                return
            except SinkUnavailable:
                pass


def transactional_id(number: int) -> str:
    return f"{TOPICS.app_id}-{number}"
