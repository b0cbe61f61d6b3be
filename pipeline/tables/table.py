"""What every table is: a pure function of the events applied, which adds and retracts in the partition's cells.

`pipeline.partition` calls `apply` for each accepted batch; a restore loads the arrays of a snapshot and applies the batches since.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.columns import I32, I64, Columns, Strings
from pipeline.tables.kernel import Cells
from schemas.rows import Rows

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Accepted events with their users' dense indices, and the same rows grouped by user."""

    columns: Columns
    user: I32  # [n] index in the partition's UserIndex
    users: int  # users known to the partition so far: per-user arrays need this length
    order: npt.NDArray[np.intp]  # [n] row numbers sorted by (user, ts); equal ones in arrival order
    starts: I64  # [distinct users + 1] user g's rows are order[starts[g]:starts[g + 1]]

    @staticmethod
    def of(columns: Columns, user: I32, users: int) -> Batch:
        order = _by_user_and_time(user, columns.ts, users)
        sorted_user = user[order]
        starts = np.flatnonzero(np.concatenate(([True], sorted_user[1:] != sorted_user[:-1], [True])))
        return Batch(columns, user, users, order, starts.astype(np.int64))


def _by_user_and_time(user: I32, ts: I64, users: int) -> npt.NDArray[np.intp]:
    """Rows [n] sorted by (user, ts), equal ones in arrival order: as one sort of words when user, time and row fit into 63 bits, as they nearly always do."""
    n = len(ts)
    first = int(ts.min()) if n else 0
    row_bits, time_bits = n.bit_length(), (int(ts.max()) - first).bit_length() if n else 0
    if users.bit_length() + time_bits + row_bits > 63:
        return np.lexsort((ts, user))
    words = ((user.astype(np.int64) << time_bits) | (ts - first)) << row_bits | np.arange(n)
    words.sort()
    return words & ((1 << row_bits) - 1)


class Table(Protocol):
    """One family of numbers. Its cells are those whose key's metric (keys[:, 0] >> 32) is in [metric, metric + metrics).

    No I/O, no clock, no randomness; the result depends on which events were applied, never on their order or on how they were cut into batches.
    Constructor: (plan, metric), where `metric` is the first metric number it may use.
    """

    metric: int
    metrics: int

    def apply(self, batch: Batch, cells: Cells) -> None: ...

    def expire(self, horizon: int) -> None:
        """No event with ts < horizon (ms; smallest watermark − lateness) will be applied any more: forget what only such events could change."""
        ...

    def final_at(self, keys: I64) -> I64:
        """Per cell key [m, 3]: the watermark (ms) from which its value can't change (window end + conversion window + lateness)."""
        ...

    def rows(self, keys: I64, values: I64, versions: I64, strings: Strings, partition: int) -> Rows:
        """Those cells as rows for the sink (see schemas.rows)."""
        ...

    def dump(self) -> Arrays: ...

    def load(self, arrays: Arrays) -> None: ...
