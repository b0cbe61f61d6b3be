"""Kafka in memory, as far as the protocol leans on it: offsets, transactions, fencing, read_committed, deleted heads.

`worker` writes and reads it; tests/contract holds it against a real broker. Every offset is either a record or a marker, as in Kafka.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

Headers = list[tuple[str, bytes]]
TopicPartition = tuple[str, int]


class Fenced(Exception):
    """Another producer with the same transactional id was started, or the coordinator ended the transaction for its age."""


class Stored(NamedTuple):
    """A record as a consumer gets it; `pipeline.decode.Record`."""

    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: int
    headers: Headers


@dataclass(eq=False, slots=True)
class Transaction:
    """State and the partitions that still lack its marker, each with the offset of its first record there."""

    committed: bool | None = None  # None while it is open
    unmarked: dict[TopicPartition, int] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class PartitionLog:
    """`entries[offset]` is a record, or None for a marker; `transactions[offset]` is None for a record outside of any."""

    entries: list[Stored | None] = field(default_factory=list)
    transactions: list[Transaction | None] = field(default_factory=list)
    start: int = 0


@dataclass(eq=False, slots=True)
class Coordinator:
    """What the broker knows of a transactional id."""

    epoch: int = -1
    transaction: Transaction | None = None


class Producer:
    """A transactional producer: all methods raise Fenced once a newer one was started."""

    def __init__(self, log: Log, transactional_id: str, epoch: int) -> None:
        self.log = log
        self.transactional_id = transactional_id
        self.epoch = epoch

    def _coordinator(self) -> Coordinator:
        found = self.log.coordinators[self.transactional_id]
        if found.epoch != self.epoch:
            raise Fenced(f"{self.transactional_id}: epoch {self.epoch}, the newest is {found.epoch}")
        return found

    def send(self, topic: str, partition: int, key: bytes | None, value: bytes | None, headers: Headers | None = None) -> int:
        """Append within the transaction, which begins here when there is none; the record's offset."""
        coordinator = self._coordinator()
        if coordinator.transaction is None or coordinator.transaction.committed is not None:
            self.log.settle(self.transactional_id)
            coordinator.transaction = Transaction()
        offset = self.log.append(topic, partition, key, value, headers or [], transaction=coordinator.transaction)
        coordinator.transaction.unmarked.setdefault((topic, partition), offset)
        return offset

    def commit(self) -> None:
        """Decide; readers see the records of a partition when its marker is written there (`Log.mark`)."""
        self._end(True)

    def abort(self) -> None:
        self._end(False)

    def _end(self, committed: bool) -> None:
        coordinator = self._coordinator()
        if coordinator.transaction is not None and coordinator.transaction.committed is None:
            coordinator.transaction.committed = committed


class Log:
    """Topics come into being when first used. `fences=False` breaks it on purpose."""

    def __init__(self, timestamp: int = 0, fences: bool = True) -> None:
        self.partitions: dict[TopicPartition, PartitionLog] = {}
        self.coordinators: dict[str, Coordinator] = {}
        self.timestamp = timestamp  # of every record
        self.fences = fences

    def at(self, topic: str, partition: int) -> PartitionLog:
        found = self.partitions.get((topic, partition))
        if found is None:
            found = self.partitions[topic, partition] = PartitionLog()
        return found

    def append(
        self, topic: str, partition: int, key: bytes | None, value: bytes | None, headers: Headers, transaction: Transaction | None = None
    ) -> int:
        log = self.at(topic, partition)
        offset = len(log.entries)
        log.entries.append(Stored(offset, key, value, self.timestamp, headers))
        log.transactions.append(transaction)
        return offset

    # --- transactions -----------------------------------------------------------------------------------------------------

    def start_producer(self, transactional_id: str) -> Producer:
        """Fence the former one and settle its transaction: an open one is aborted, a decided one gets its markers."""
        coordinator = self.coordinators.setdefault(transactional_id, Coordinator())
        if self.fences:
            self._abort(coordinator)
        if self.fences or coordinator.epoch < 0:
            coordinator.epoch += 1
        self.settle(transactional_id)
        return Producer(self, transactional_id, coordinator.epoch)

    def time_out(self, transactional_id: str) -> bool:
        """The coordinator aborts a transaction that is open for too long; its producer is fenced. False when none is open."""
        coordinator = self.coordinators.get(transactional_id)
        if coordinator is None or coordinator.transaction is None or coordinator.transaction.committed is not None:
            return False
        self._abort(coordinator)
        coordinator.epoch += 1
        return True

    def _abort(self, coordinator: Coordinator) -> None:
        if coordinator.transaction is not None and coordinator.transaction.committed is None:
            coordinator.transaction.committed = False

    def mark(self, transactional_id: str) -> bool:
        """Write the marker of a decided transaction to one more of its partitions; False when nothing is left to do."""
        coordinator = self.coordinators.get(transactional_id)
        transaction = coordinator.transaction if coordinator else None
        if transaction is None or transaction.committed is None or not transaction.unmarked:
            return False
        (topic, partition), _ = transaction.unmarked.popitem()
        log = self.at(topic, partition)
        log.entries.append(None)
        log.transactions.append(None)
        return True

    def settle(self, transactional_id: str) -> None:
        while self.mark(transactional_id):
            pass

    # --- reading ----------------------------------------------------------------------------------------------------------

    def start(self, topic: str, partition: int) -> int:
        return self.at(topic, partition).start

    def end(self, topic: str, partition: int) -> int:
        """The last stable offset: where the first transaction without its marker begins, or the end."""
        log = self.at(topic, partition)
        firsts = [
            c.transaction.unmarked[topic, partition]
            for c in self.coordinators.values()
            if c.transaction is not None and (topic, partition) in c.transaction.unmarked
        ]
        return min(firsts, default=len(log.entries))

    def read(self, topic: str, partition: int, position: int, most: int = 1 << 30, *, committed: bool = True) -> tuple[list[Stored], int]:
        """Up to `most` committed records from `position` on, and the position after them: past the markers and aborted records that were passed."""
        log = self.at(topic, partition)
        position = max(position, log.start)
        end = self.end(topic, partition) if committed else len(log.entries)
        found: list[Stored] = []
        while position < end and len(found) < most:
            record, transaction = log.entries[position], log.transactions[position]
            if record is not None and (not committed or transaction is None or transaction.committed):
                found.append(record)
            position += 1
        return found, position

    def delete_before(self, topic: str, partition: int, offset: int) -> None:
        log = self.at(topic, partition)
        log.start = max(log.start, min(offset, len(log.entries)))
