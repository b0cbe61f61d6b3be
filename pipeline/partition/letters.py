"""Dead letters of a partition: what becomes of a rejected record, and who sends it while two revisions run beside each other.

While a partition is `beside` the revision in force, it withholds its letters: those of the one in force count. Once it succeeds that one, what the
other has not sent goes out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from pipeline.topic_names import Topics
from schemas.rejects import Reason, RejectedRecord


class RejectRow(NamedTuple):
    """A row of the warehouse's `rejects` (schemas.rows.REJECTS)."""

    topic: str
    partition: int
    offset: int
    reason: str
    cause: str
    key: bytes
    raw: bytes
    record_ts: int
    version: int = 0  # number of the flush it goes out with


class Letter(NamedTuple):
    """A dead letter's topic and what is in it."""

    topic: str
    row: RejectRow

    @property
    def value(self) -> bytes:
        """The envelope's JSON."""
        row = self.row
        return msgspec.json.encode(
            RejectedRecord(
                reason=Reason(row.reason),
                cause=row.cause,
                topic=row.topic,
                partition=row.partition,
                offset=row.offset,
                key=row.key or None,
                raw=row.raw,
                record_ts=row.record_ts,
            )
        )


class Letters:
    """Which dead letters go out with a flush. `beside` and `withheld` are part of the position record."""

    def __init__(self, topics: Topics) -> None:
        self.beside = False
        self.withheld: list[Letter] = []
        self._topics = topics
        self._dealt_with: dict[str, int] = {}  # up to these offsets the revision in force has sent its dead letters
        self._due: list[Letter] = []

    def dealt_with(self, offsets: dict[str, int]) -> None:
        """So far the revision in force has come, by topic: what it has rejected there is no business of ours."""
        self._dealt_with = offsets
        self.withheld = [letter for letter in self.withheld if not self._is_dealt_with(letter.row)]

    def succeed(self, offsets: dict[str, int], unsent: Iterable[Letter]) -> None:
        """The revision in force has ended at these offsets, for good. unsent: what it should have sent itself."""
        self.dealt_with(offsets)
        self._due, self.withheld, self.beside = [*unsent, *self.withheld], [], False

    def going_out(self, rejected: list[Letter]) -> list[Letter]:
        """What goes out with a flush whose rejects are these."""
        if self.beside:
            self.withheld += [letter for letter in rejected if not self._is_dealt_with(letter.row)]
            return []
        due, self._due = self._due, []
        return due + rejected

    def _is_dealt_with(self, row: RejectRow) -> bool:
        """A re-keyed record is another one in each revision; while both run, those of the one in force count."""
        return row.topic == self._topics.rekeyed or row.offset < self._dealt_with.get(row.topic, 0)
