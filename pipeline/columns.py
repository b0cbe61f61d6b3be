"""The unit that flows through the system: a run of events as columns.

In: `pipeline.decode` builds one from the raw records of one topic partition. Out: `pipeline.tables` applies it, and
`pipeline.partition` writes it to the changelog, from which a restore applies it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]

MONEY_SCALE = 10_000
"""Numbers travel as integers of 1/10,000: 0.01 of any ISO 4217 currency is exact, and int64 holds 9.2e14 units."""


@dataclass(frozen=True, slots=True)
class Columns:
    """`n` valid events of one partition in the order they were read; every array's first axis has length `n`.

    String ids refer to the partition's `Strings` (id 0 is the empty string: the field was absent).
    Field and number columns are those that `Plan.fields` and `Plan.numbers` name, in that order.
    """

    topic: U8  # [n] index into schemas.events.TOPICS
    user: U64  # [n, 2] 128-bit hash of user_id
    event_id: U64  # [n] xxHash64 (seed 0) of event_id
    ts: I64  # [n] event time, ms since 1970 UTC
    event: I32  # [n] string id of the event's name
    bits: U64  # [n, Plan.words] bit p of word p // 64 is set when predicate p holds
    fields: I32  # [n, len(Plan.fields)] string ids
    numbers: I64  # [n, len(Plan.numbers)] in 1/MONEY_SCALE; 0 when absent
    order: U64  # [n] xxHash64 of order_id, 0 when absent
    currency: I32  # [n] string id; the shop's currency when absent

    def __len__(self) -> int:
        return len(self.ts)

    def take(self, rows: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Columns:
        """The chosen rows (indices or a mask), as new arrays."""
        return Columns(*(getattr(self, f.name)[rows] for f in fields(self)))

    @staticmethod
    def concatenate(parts: list[Columns]) -> Columns:
        """All parts' rows one after the other; `parts` must not be empty."""
        return Columns(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Columns)))


class _Ids(dict[str, int]):
    """Text to id. Looking up a text that is not there gives it the next id, so that a column is interned in one pass of `map`; None is ''."""

    __slots__ = ("texts",)

    def __init__(self, texts: list[str]) -> None:
        super().__init__({"": 0})
        self.texts = texts

    def __missing__(self, text: str | None) -> int:
        if text is None:
            return 0
        new = self[text] = len(self.texts)
        self.texts.append(text)
        return new


class Strings:
    """A partition's interned strings: text to a dense id and back. Id 0 is ''. Only grows; `since(n)` is what a changelog record carries."""

    __slots__ = ("ids", "texts")

    def __init__(self, texts: list[str] | None = None) -> None:
        self.texts: list[str] = [""]
        self.ids: dict[str, int] = _Ids(self.texts)
        self.extend((texts or [""])[1:])

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, string_id: int) -> str:
        return self.texts[string_id]

    def intern(self, text: str) -> int:
        return self.ids[text]

    def column(self, texts: Iterable[str | None], n: int) -> I32:
        """Ids [n] of `n` texts, new ones interned; None is ''."""
        return np.fromiter(map(self.ids.__getitem__, texts), np.int32, n)  # type: ignore[arg-type]

    def extend(self, texts: list[str]) -> None:
        for text in texts:
            self.intern(text)

    def since(self, length: int) -> list[str]:
        return self.texts[length:]
