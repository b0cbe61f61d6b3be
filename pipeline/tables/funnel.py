"""Funnels: users by the deepest level of their best attempt, per entry window, segment and time to convert.

In: accepted batches. Out: cells (metric + funnel << 32 | level << 16 | bucket, window start, segment << 32). Called by `pipeline.tables.board`.

A user's events count in event-time order; the order of arrival changes nothing.
- An attempt begins with an event matching step 1 (`any`: any step) and belongs to the entry window of that event. Later steps count up to
  and with start + conversion window. One event satisfies at most one step of an attempt.
- ordered: an event lifts an attempt at level l to the deepest step T it matches with only optional steps between. Events of equal time count
  in whatever order takes the attempt deepest: the required steps up to T and T itself each need an event of their own.
- strict: the next event of the funnel's topics must lift the attempt, else it ends. Equal times: lowest step matched first, unmatched last,
  then by hash of event_id.
- any: an event satisfies the first step it matches that is still open. Equal times: by hash of event_id. Level = number of steps done.
- An exclusion kills, before the steps of its time, the attempts at a level in [after, before). What they had reached still counts.
- hold_constant: an attempt takes only events (steps and exclusions) with the value of its first one; without the field an event is no step.
- Of a user's attempts in an entry window the best counts: deepest, then shortest, then latest, then smallest hash of its first event's id.
  The segment is the breakdown field of its first event.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.columns import I32, I64, Strings
from pipeline.definitions import ANY_EVENT, Funnel
from pipeline.plan import Plan
from pipeline.tables.funnel_kernel import ANY, ORDERED, STRICT, Scratch, Spec
from pipeline.tables.funnel_store import DONE, MORE_ARENA, MORE_CELLS, MORE_SCRATCH, Rows, apply_rows, sweep
from pipeline.tables.kernel import Arena, Cells, grown
from pipeline.tables.table import Arrays, Batch
from pipeline.windows import boundary_table, window_indices, window_starts
from schemas.events import TOPIC_OF_EVENT, TOPICS
from schemas.rows import Rows as SinkRows

ORDERS = {"ordered": ORDERED, "strict": STRICT, "any": ANY}
MOST_EXCLUSIONS = 32
SWEEP_USERS = 2048
SWEEP_EVERY = 16
"""A sweep over all users begins each 1/16 of the lateness and takes 2,048 users a call: what a user keeps too long is at most so old."""


def topics_of(funnel: Funnel) -> int:
    """Mask of the topics on which the funnel's step events come; unknown names come on clickstream."""
    names = {name for step in funnel.steps for name in step.match.events}
    if ANY_EVENT in names:
        return (1 << len(TOPICS)) - 1
    return sum(1 << topic for topic in {TOPIC_OF_EVENT.get(name, 0) for name in names})


def compile_spec(plan: Plan) -> Spec:
    """The plan's funnels as arrays; ValueError when one has more exclusions than the kernel holds."""
    funnels = plan.definitions.funnels
    most = max((len(f.exclusions) for f in funnels), default=0)
    if most > MOST_EXCLUSIONS:
        raise ValueError(f"a funnel has {most} exclusions; at most {MOST_EXCLUSIONS} are possible")
    numbers = np.zeros((len(funnels), 12), np.int64)
    steps = np.zeros((len(funnels), 16), np.int64)
    exclusions = np.zeros((len(funnels), max(most, 1), 3), np.int64)
    union = np.zeros((len(funnels), plan.words), np.uint64)
    shape, starts = boundary_table(tuple(funnel.entry_window for funnel in funnels), plan.definitions.time_zone)
    for i, funnel in enumerate(funnels):
        segment = plan.field(funnel.breakdown) if funnel.breakdown else -1
        hold = plan.field(funnel.hold_constant) if funnel.hold_constant else -1
        optional = sum(1 << s for s, step in enumerate(funnel.steps) if step.optional)
        stride = 2 + (segment >= 0 or hold >= 0) + bool(funnel.exclusions)
        numbers[i] = (
            len(funnel.steps), funnel.conversion_ms, ORDERS[funnel.order], optional, segment, hold,
            *shape[i], topics_of(funnel), len(funnel.exclusions), stride,
        )  # fmt: skip
        predicates = [plan.predicate(step.match) for step in funnel.steps]
        steps[i, : len(predicates)] = predicates
        for x, exclusion in enumerate(funnel.exclusions):
            exclusions[i, x] = plan.predicate(exclusion.match), exclusion.after, exclusion.before
        for p in predicates + [int(x) for x in exclusions[i, : len(funnel.exclusions), 0]]:
            union[i, p >> 6] |= np.uint64(1) << np.uint64(p & 63)
    return Spec(numbers, steps, exclusions, union, starts)


def _scratch(capacity: int) -> Scratch:
    def table(width: int) -> I64:
        return np.empty((capacity, width), np.int64)

    def flat(words: int) -> I64:
        return np.empty(words, np.int64)

    return Scratch(
        table(5), table(4), table(5), table(4), table(4), table(4), table(7), flat(4 * capacity), flat(4 * capacity), flat(48)
    )  # fmt: skip


class FunnelTable:
    """All funnels of one partition; one block a user and funnel that still has something open."""

    def __init__(self, plan: Plan, metric: int) -> None:
        self.metric = metric
        self.funnels = plan.definitions.funnels
        self.metrics = len(self.funnels)
        self.time_zone = plan.definitions.time_zone
        self.lateness_ms = plan.definitions.lateness_ms
        self.spec = compile_spec(plan)
        self.heads: I32 = np.full((1024, self.metrics), -1, np.int32)
        self.arena = Arena()
        self.horizon = -1
        self.swept = 0  # users that the running sweep is done with
        self.sweep_horizon = -1
        self._scratch = _scratch(1024)

    def apply(self, batch: Batch, cells: Cells) -> None:
        """Add the batch's events to their users' attempts and correct the cells."""
        if batch.users > len(self.heads):
            self.heads = grown(self.heads, max(2 * len(self.heads), batch.users), fill=-1)
        columns = batch.columns
        rows = Rows(
            columns.topic, columns.event_id, columns.ts, np.ascontiguousarray(columns.bits), np.ascontiguousarray(columns.fields),
            batch.user, batch.order, batch.starts,
        )  # fmt: skip
        group, funnel, status = 0, 0, -1
        while status != DONE:
            status, group, funnel, amount = apply_rows(
                self.spec, rows, self.metric, self.horizon, group, funnel, self.heads, self.arena.arrays, cells.arrays, self._scratch
            )
            if status == MORE_CELLS:
                cells.grow(amount)
            elif status != DONE:
                self._make_room(status, amount)

    def expire(self, horizon: int) -> None:
        """No event before `horizon` comes any more: users' older events are folded when next touched, or by the sweep."""
        self.horizon = max(self.horizon, horizon)
        if self.swept >= len(self.heads):
            if self.horizon < self.sweep_horizon + max(self.lateness_ms // SWEEP_EVERY, 60_000):
                return
            self.swept, self.sweep_horizon = 0, self.horizon
        last = min(self.swept + SWEEP_USERS, len(self.heads))
        status = -1
        while status != DONE:
            status, self.swept, amount = sweep(self.spec, self.horizon, self.swept, last, self.heads, self.arena.arrays, self._scratch)
            if status != DONE:
                self._make_room(status, amount)

    def _make_room(self, status: int, amount: int) -> None:
        if status == MORE_ARENA:
            self.arena.grow(amount)
        elif status == MORE_SCRATCH:
            self._scratch = _scratch(2 * amount)
        else:
            raise OverflowError("one user has more events within the lateness than a block of the arena holds")

    def final_at(self, keys: I64) -> I64:
        """Per cell key: end of its entry window + conversion window + lateness, ms."""
        which = (keys[:, 0] >> 32) - self.metric
        out = np.empty(len(keys), np.int64)
        for i, funnel in enumerate(self.funnels):
            chosen = which == i
            window = window_indices(funnel.entry_window, self.time_zone, keys[chosen, 1])
            out[chosen] = window_starts(funnel.entry_window, self.time_zone, window + 1) + funnel.conversion_ms + self.lateness_ms
        return out

    def rows(self, keys: I64, values: I64, versions: I64, strings: Strings, partition: int) -> SinkRows:
        """Cells [m] as rows of `funnel_cells`."""
        which = ((keys[:, 0] >> 32) - self.metric).tolist()
        columns: dict[str, Any] = {
            "funnel": [self.funnels[i].name for i in which],
            "definition": [self.funnels[i].version for i in which],
            "window_start": keys[:, 1],
            "segment": [strings[i] for i in (keys[:, 2] >> 32).tolist()],
            "level": keys[:, 0] >> 16 & 0xFFFF,
            "bucket": keys[:, 0] & 0xFFFF,
            "partition": np.full(len(keys), partition, np.int64),
            "value": values,
            "final_at": self.final_at(keys),
            "version": versions,
        }
        return {"funnel_cells": columns}

    def dump(self) -> Arrays:
        clock: npt.NDArray[np.int64] = np.array([self.horizon, self.swept, self.sweep_horizon], np.int64)
        state: Arrays = {"heads": self.heads, "clock": clock}
        return state | self.arena.dump()

    def load(self, arrays: Arrays) -> None:
        self.heads = arrays["heads"].copy()
        self.horizon, self.swept, self.sweep_horizon = (int(x) for x in arrays["clock"])
        self.arena.load(arrays)
