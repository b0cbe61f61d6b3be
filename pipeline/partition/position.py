"""The position record: what a delta or a snapshot carries besides arrays, and what the end of a changelog says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from pipeline.changelog import Reader, unpack_meta
from pipeline.decode import Reject
from pipeline.definitions import Definitions
from pipeline.partition.letters import Letter, RejectRow
from schemas.rejects import Reason

NO_WATERMARK = -1


class TopicState(msgspec.Struct):
    """A source topic's place in the position record. Counts are totals since the first event."""

    next_offset: int = 0
    watermark: int = NO_WATERMARK
    applied: int = 0
    duplicates: int = 0
    rejected: int = 0
    too_late: int = 0
    rekeyed: int = 0
    unknown_events: int = 0
    unknown_fields: int = 0
    reasons: dict[str, int] = {}  # rejected and too_late, by Reason; never changed in place

    def reasons_with(self, rejects: Sequence[Reject], too_late: int) -> dict[str, int]:
        """`reasons` and these."""
        if not rejects and not too_late:
            return self.reasons
        new = Counter(self.reasons)
        new.update(reject.reason.value for reject in rejects)
        if too_late:
            new[Reason.TOO_LATE.value] += too_late
        return dict(new)


class Position(msgspec.Struct):
    topics: dict[str, TopicState]
    horizon: int
    sunk: int  # newest flush that the sink has confirmed
    strings: list[str]  # new ones in a delta, all in a snapshot
    rejects: list[RejectRow]  # of this flush in a delta, all not yet sunk in a snapshot
    generations: list[Definitions]  # empty in a delta
    partitions: int
    beside: bool = False
    withheld: list[Letter] = []
    held: bool = False

    @property
    def offsets(self) -> dict[str, int]:
        """Next offset to apply by topic."""
        return {topic: state.next_offset for topic, state in self.topics.items()}


decode_position = msgspec.msgpack.Decoder(Position).decode
"""Made here, where one thread imports it, and not in the restores' threads: msgspec (0.22) makes what it knows of a type at first use, step by step, and a
second thread that decodes meanwhile reads what is not there yet and the process dies (SIGSEGV). Its threads are said to be safe (msgspec issue 401)."""


class End(NamedTuple):
    """Where a changelog ends. positions: next offset by source topic. withheld: what a partition that is still `beside` another has not sent."""

    positions: dict[str, int]
    beside: bool
    withheld: list[Letter]


def end_of(records: Iterable[tuple[bytes | None, bytes | None]]) -> End | None:
    """What a changelog's last flush says; None when its records hold no flush. Raises ChangelogError and Sealed."""
    reader = Reader()
    reader.read(records)
    reader.end()
    entries = reader.take()
    if not entries:
        return None
    position = unpack_meta(entries[-1].data, decode_position)
    return End(position.offsets, position.beside, position.withheld)
