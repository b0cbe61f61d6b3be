"""The worker's state as readings, taken at the moment of a scrape, so that metrics cost the hot path nothing.

In: the owner of the partitions, the watchdog, the newest answers of the warehouse. Out: readings for `telemetry.prometheus`, and whether the worker is ready.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from aiokafka.structs import TopicPartition

from pipeline.definitions import Definitions
from pipeline.partition import NO_WATERMARK, Partition, TopicState
from pipeline.streaming.owner import Owned, Owner
from pipeline.streaming.watchdog import Watchdog
from pipeline.tables.first import FirstTable
from pipeline.tables.funnel import FunnelTable
from pipeline.tables.kpi import EventKpiTable
from pipeline.tables.orders import OrderTable
from pipeline.tables.retention import RetentionTable
from pipeline.tables.sessions import SessionTable
from pipeline.telemetry import metrics as m
from pipeline.telemetry.meter import Histogram, Reading
from pipeline.telemetry.server import State
from pipeline.telemetry.watched import Watch

FAMILIES: dict[type[Any], str] = {
    FunnelTable: "funnel",
    RetentionTable: "retention",
    FirstTable: "first",
    EventKpiTable: "kpi",
    SessionTable: "sessions",
    OrderTable: "orders",
}


@dataclass(frozen=True, slots=True)
class WorkerState:
    """Reads everything there is to know of a running worker; changes nothing. `warm` is set once the kernels are compiled."""

    owner: Owner
    watchdog: Watchdog
    watch: Watch
    warm: asyncio.Event = field(default_factory=asyncio.Event)

    def read(self) -> tuple[Iterable[Reading], Iterable[Histogram]]:
        """For one scrape."""
        return list(self._all()), self.owner.meter.histograms.values()

    def _all(self) -> Iterator[Reading]:
        owner = self.owner
        yield from owner.meter.readings()
        yield from self.watch.readings()
        yield Reading(m.BUILD, 1, (_version(), _hash(owner.definitions)))
        yield Reading(m.READY, self.readiness().good)
        yield Reading(m.OWNED, len(owner.owned))
        yield Reading(m.RECOVERING, len(owner.taking))
        yield Reading(m.STANDBYS, len(owner.standbys.following))
        for number, lag in owner.standbys.lags.items():
            yield Reading(m.STANDBY_LAG, lag, (str(number),))
        yield Reading(m.REBALANCES, owner.rebalances)
        yield Reading(m.SINK_WAITING, not owner.sink_ready.is_set())
        newest = max((owned.account.sunk_event for owned in owner.owned.values()), default=NO_WATERMARK)
        if newest != NO_WATERMARK:
            yield Reading(m.FRESHNESS, time.time() - newest / 1000)
        yield from _recoveries(owner)
        for number, owned in owner.owned.items():
            yield from _partition(str(number), owned)
            for topic in owner.topics.sources:
                yield from self._topic(TopicPartition(topic, number), owned)

    def _topic(self, tp: TopicPartition, owned: Owned) -> Iterator[Reading]:
        labels, account = (tp.topic, str(tp.partition)), owned.account
        yield from _totals(labels, account.states.get(tp.topic) or TopicState())
        yield Reading(m.BRAKED, tp.topic in owned.braked, labels)
        yield Reading(m.STALLED_SECONDS, self.watchdog.stalled_seconds(tp), labels)
        reached = account.reached.get(tp.topic, self.owner.starts.get(tp))
        if reached is None:
            return
        yield Reading(m.COMMITTED_OFFSET, reached, labels)
        if tp.topic in account.ends:
            lag = max(0, account.ends[tp.topic] - reached)
            yield Reading(m.LAG_EVENTS, lag, labels)
            yield Reading(m.LAG_SECONDS, account.lag_seconds(tp.topic, time.time()) if lag else 0, labels)

    def readiness(self) -> State:
        """Good while the worker is a member of the group and reads everything it was assigned; a member without partitions stands by and is ready."""
        owner = self.owner
        if not self.warm.is_set():
            return State(False, "warming up: kernels are compiled, up to a minute the first time")
        if owner.consumer is None or not owner.rebalances:
            return State(False, "not a member of the consumer group yet")
        if owner.held:
            return State(False, "the group rebalances")
        if taking := sorted(owner.taking):
            going_on = {str(n): owner.recoveries[n] for n in taking if n in owner.recoveries}
            details = {
                "recovery": {number: round(recovery.ratio, 3) for number, recovery in going_on.items()},
                "remaining_seconds": {number: round(r.remaining, 1) for number, r in going_on.items() if r.remaining is not None},
            }
            return State(False, f"restoring: partitions {', '.join(map(str, taking))} are being taken over", details)
        if waiting := sorted(number for number, owned in owner.owned.items() if not owned.joined):
            return State(False, f"partitions {', '.join(map(str, waiting))} are not read yet")
        standbys = {str(number): lag for number, lag in sorted(owner.standbys.lags.items())}
        return State(True, f"owns {len(owner.owned)} partitions", {"partitions": sorted(owner.owned), "standby_lag": standbys})


def _totals(labels: tuple[str, str], state: TopicState) -> Iterator[Reading]:
    consumed = state.applied + state.duplicates + state.rejected + state.too_late + state.rekeyed
    yield Reading(m.CONSUMED, consumed, labels)
    yield Reading(m.APPLIED, state.applied, labels)
    yield Reading(m.DUPLICATES, state.duplicates, labels)
    yield Reading(m.TOO_LATE, state.too_late, labels)
    yield Reading(m.REKEYED, state.rekeyed, labels)
    yield Reading(m.UNKNOWN_EVENTS, state.unknown_events, labels)
    yield Reading(m.UNKNOWN_FIELDS, state.unknown_fields, labels)
    for reason, n in state.reasons.items():
        yield Reading(m.REJECTED, n, (*labels, reason))
    if state.watermark != NO_WATERMARK:
        yield Reading(m.WATERMARK, state.watermark / 1000, labels)


def _recoveries(owner: Owner) -> Iterator[Reading]:
    for number, recovery in owner.recoveries.items():
        if number not in owner.wanted:
            continue
        yield Reading(m.RECOVERY_RATIO, recovery.ratio, (str(number),))
        yield Reading(m.RECOVERY_SECONDS, recovery.elapsed, (str(number),))
        if (remaining := recovery.remaining) is not None:
            yield Reading(m.RECOVERY_REMAINING, remaining, (str(number),))


def _partition(number: str, owned: Owned) -> Iterator[Reading]:
    partition, board = owned.partition, owned.partition.board
    snapshot, deltas = partition.changelog_bytes
    yield Reading(m.CHANGELOG_SNAPSHOT, snapshot, (number,))
    yield Reading(m.CHANGELOG_DELTAS, deltas, (number,))
    yield Reading(m.UNSUNK_FLUSHES, max(0, owned.account.flush - partition.sunk_flush), (number,))
    sizes = {"users": len(board.users), "cells": len(board.cells), "event_ids": len(board.seen), "strings": len(board.strings)}
    for part, rows in sizes.items():
        yield Reading(m.STATE_ROWS, rows, (number, part))
    for part, size in _state_bytes(partition).items():
        yield Reading(m.STATE_BYTES, size, (number, part))


def _state_bytes(partition: Partition) -> dict[str, int]:
    board = partition.board
    sizes = {"users": reserved(board.users), "cells": reserved(board.cells), "event_ids": reserved(board.seen)}
    for table in board.tables:
        family = FAMILIES[type(table)]
        sizes[family] = sizes.get(family, 0) + reserved(table)
    return sizes


def reserved(thing: Any, depth: int = 5) -> int:
    """Bytes of the numpy arrays that an object holds: in its attributes, and in tuples and lists of them."""
    if isinstance(thing, np.ndarray):
        return int(thing.nbytes)
    if depth == 0 or isinstance(thing, (str, bytes, int, float, dict, type(None))):
        return 0
    if isinstance(thing, (tuple, list)):
        return sum(reserved(item, depth - 1) for item in thing[:256])
    names = list(getattr(thing, "__dict__", ())) or [name for name in getattr(type(thing), "__slots__", ()) if hasattr(thing, name)]
    return sum(reserved(getattr(thing, name), depth - 1) for name in names)


@cache
def _version() -> str:
    try:
        return version("shopstream")
    except PackageNotFoundError:
        return "unknown"


@cache
def _hash(definitions: Definitions) -> str:
    return sha256(repr(definitions).encode()).hexdigest()[:12]
