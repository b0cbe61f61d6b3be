"""What a partition is told, and what it gives away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.decode import Record


@dataclass(frozen=True, slots=True)
class Options:
    """Limits of a partition. A brake goes on when of any `brake_records` records of a topic in a row more than `brake_ratio` would be rejected."""

    max_message_bytes: int = 1 << 20
    brake_ratio: float = 0.5
    brake_records: int = 1000
    snapshot_bytes: int = 10 << 20  # a snapshot is due when the deltas since the last one exceed this and a sixth of its own size
    rows_since_ms: int = 0  # rows of windows that start before it are not sent: a rebuild has left them as they were


class Run(NamedTuple):
    """Records of one topic partition that follow each other; what a Faust message carries."""

    topic: str
    partition: int
    records: Sequence[Record]
    next_offset: int
    begin: int = -1  # the consumer's position before this run, -1 when not known
    epoch: int = 0  # counts the seeks of the topic partition: a run of an older epoch is read again


class ContinuityError(Exception):
    """A run does not begin at the partition's position. Applying it would lose or double events, so the process ends; a restart is exact."""


class OutRecord(NamedTuple):
    topic: str
    partition: int
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Flush:
    """What goes out in one transaction: changelog records, rejects and re-keyed records."""

    n: int
    records: list[OutRecord]
    snapshot: bool  # the changelog before this flush is not needed any more
