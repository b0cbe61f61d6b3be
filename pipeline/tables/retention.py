"""Retention: users by cohort period and by the later periods they came back in, with sums and the last active period.

In: accepted batches. Out: cells (metric + retention << 32 | measure << 16 | n, cohort start, segment << 32). Called by `pipeline.tables.board`.

- A user's cohort is the period of their first event ever that matches `cohort`; the segment is its breakdown field (equal times: smaller event_id hash).
- A user is active in n = 1..periods when an event matching `returning` lies in the cohort's period + n. n = 0 counts the cohort.
- A late event that moves the first occurrence earlier takes all the user's counts out of the old cohort and into the new one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.columns import I64, Strings
from pipeline.definitions import Period, Retention
from pipeline.plan import Plan
from pipeline.tables.kernel import Arena, Cells, grown
from pipeline.tables.retention_kernel import BITS, DONE, LAST, MORE_ARENA, MORE_CELLS, MORE_ROWS, Events, Spec, State, apply_rows
from pipeline.tables.table import Arrays, Batch
from pipeline.windows import DAY_MS, HOUR_MS, WINDOW_OF_PERIOD, boundaries, window_indices
from schemas.rows import Rows

MEASURES = ("users", "last", "value")
SHORTEST_MS: dict[Period, int] = {"day": DAY_MS - HOUR_MS, "week": 7 * DAY_MS - HOUR_MS, "month": 28 * DAY_MS - HOUR_MS}


def first_words(retention: Retention, lateness_ms: int) -> int:
    """Words a row needs while no event is more than the lateness newer than the horizon; both ends may cut into a period."""
    bits = retention.periods + 1 + -(-lateness_ms // SHORTEST_MS[retention.period]) + 1
    return -(-bits // 64)


def _empty_state(words: int) -> State:
    return State(np.full(1024, -1, np.int32), np.empty((1024, BITS + words), np.int64), np.zeros(1, np.int64))


class RetentionTable:
    """All retentions of one partition."""

    def __init__(self, plan: Plan, metric: int) -> None:
        self.metric = metric
        self.retentions = plan.definitions.retentions
        self.metrics = len(self.retentions)
        self.time_zone = plan.definitions.time_zone
        self.lateness_ms = plan.definitions.lateness_ms
        self.horizon = -1
        self.specs = [self._spec(plan, i, retention) for i, retention in enumerate(self.retentions)]
        self.states = [_empty_state(first_words(retention, self.lateness_ms)) for retention in self.retentions]
        self.arena = Arena()

    def _spec(self, plan: Plan, i: int, retention: Retention) -> Spec:
        return Spec(
            self.metric + i,
            plan.predicate(retention.cohort),
            plan.predicate(retention.returning),
            plan.field(retention.breakdown) if retention.breakdown else -1,
            plan.number(retention.value) if retention.value else -1,
            retention.periods,
            boundaries(WINDOW_OF_PERIOD[retention.period], self.time_zone).starts,
        )

    def apply(self, batch: Batch, cells: Cells) -> None:
        """Add the batch's events to their users' activity and correct the cells."""
        c = batch.columns
        events = Events(
            c.event_id, c.ts, np.ascontiguousarray(c.bits), np.ascontiguousarray(c.fields), np.ascontiguousarray(c.numbers),
            batch.user, batch.order, batch.starts,
        )  # fmt: skip
        periods, sums = np.empty(len(c), np.int64), np.empty(len(c), np.int64)
        for i, (spec, retention) in enumerate(zip(self.specs, self.retentions, strict=True)):
            state = self.states[i]
            if batch.users > len(state.rows):
                self.states[i] = state._replace(rows=grown(state.rows, max(2 * len(state.rows), batch.users), fill=-1))
            horizon = self._period(retention, self.horizon)
            status, g = -1, 0
            while status != DONE:
                status, g, amount = apply_rows(spec, events, horizon, g, self.states[i], self.arena.arrays, cells.arrays, periods, sums)
                if status == MORE_CELLS:
                    cells.grow(amount)
                elif status == MORE_ARENA:
                    self.arena.grow(amount)
                elif status != DONE:
                    self.states[i] = _with_room(self.states[i], status, amount)

    def _period(self, retention: Retention, ts: int) -> int:
        return int(window_indices(WINDOW_OF_PERIOD[retention.period], self.time_zone, np.array([ts], np.int64))[0])

    def expire(self, horizon: int) -> None:
        """No event before `horizon` comes any more: earlier activity of users without a cohort is dropped when its room is needed."""
        self.horizon = max(self.horizon, horizon)

    def final_at(self, keys: I64) -> I64:
        """Per cell key: end of its period n (of the last period for 'last') + lateness, ms."""
        which = (keys[:, 0] >> 32) - self.metric
        measure, n = keys[:, 0] >> 16 & 0xFFFF, keys[:, 0] & 0xFFFF
        out = np.empty(len(keys), np.int64)
        for i, (spec, retention) in enumerate(zip(self.specs, self.retentions, strict=True)):
            chosen = which == i
            after = np.where(measure[chosen] == LAST >> 16, retention.periods, n[chosen]) + 1
            period = np.searchsorted(spec.starts, keys[chosen, 1], side="right") - 1
            out[chosen] = spec.starts[np.minimum(period + after, len(spec.starts) - 1)] + self.lateness_ms
        return out

    def rows(self, keys: I64, values: I64, versions: I64, strings: Strings, partition: int) -> Rows:
        """Cells [m] as rows of `retention_cells`."""
        which = ((keys[:, 0] >> 32) - self.metric).tolist()
        columns: dict[str, Any] = {
            "retention": [self.retentions[i].name for i in which],
            "definition": [self.retentions[i].version for i in which],
            "cohort_start": keys[:, 1],
            "segment": [strings[i] for i in (keys[:, 2] >> 32).tolist()],
            "period": keys[:, 0] & 0xFFFF,
            "measure": [MEASURES[i] for i in (keys[:, 0] >> 16 & 0xFFFF).tolist()],
            "partition": np.full(len(keys), partition, np.int64),
            "value": values,
            "final_at": self.final_at(keys),
            "version": versions,
        }
        return {"retention_cells": columns}

    def dump(self) -> Arrays:
        clock: npt.NDArray[np.int64] = np.array([self.horizon], np.int64)
        out: Arrays = {"clock": clock} | self.arena.dump()
        for i, state in enumerate(self.states):
            out |= {f"rows{i}": state.rows, f"words{i}": state.words[: int(state.used[0])]}
        return out

    def load(self, arrays: Arrays) -> None:
        self.horizon = int(arrays["clock"][0])
        self.arena.load(arrays)
        for i in range(self.metrics):
            words = arrays[f"words{i}"]
            self.states[i] = State(arrays[f"rows{i}"].copy(), grown(words, max(1024, len(words))), np.array([len(words)], np.int64))


def _with_room(state: State, status: int, amount: int) -> State:
    """The same state with twice the rows, or with words for `amount` periods a row."""
    if status == MORE_ROWS:
        return state._replace(words=grown(state.words, 2 * len(state.words)))
    words: I64 = np.zeros((len(state.words), BITS + -(-amount // 64)), np.int64)
    words[:, : state.words.shape[1]] = state.words
    return state._replace(words=words)
