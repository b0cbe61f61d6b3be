"""What must be true once everything has recovered: two oracles, the accounts and the dead letters.

In: a finished `World`. Out: nothing, or `Wrong`. One oracle is a partition that was never interrupted, the other a plain recomputation.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import xxhash

from pipeline.partition import Partition, Run
from tests.oracle.plain_funnel import PlainEvent, best_outcomes
from tests.simulation.case import COUNT, FUNNEL, HOUR, LATENESS, NOW, TOPICS, Case, home
from tests.simulation.log import Stored
from tests.simulation.warehouse import MemoryWarehouse, Row
from tests.simulation.worker import Worker
from tests.simulation.world import World

CELLS = ("funnel_cells", "retention_cells", "kpi_cells")
STEP_OF = {name: i for i, step in enumerate(FUNNEL.steps, 1) for name in step.match.events}
Place = tuple[str, int, int]
"""Topic, partition, offset."""
Letters = Counter[Place]


class Wrong(Exception):
    """The end is not what it must be."""


def check(world: World, worker: Worker) -> None:
    """Raises Wrong."""
    letters = dead_letters(world)
    _same("dead letters and the warehouse's rejects", letters, Counter(key[:3] for key in world.warehouse.newest["rejects"]))
    _check_accounts(world, worker, letters)
    counted, funnel = plain_cells(world, letters)
    found_counts, found_funnel = _plain_view(world)
    _same("counts (plain recomputation)", found_counts, counted)
    _same("funnel (plain recomputation)", found_funnel, funnel)
    if world.case.compared:
        expected = uninterrupted(world)
        for table in CELLS:
            _same(table, {key: rest for key, (_, rest) in world.warehouse.newest[table].items() if _value(table, rest)}, expected[table])
        _same("rejects", {key: rest for key, (_, rest) in world.warehouse.newest["rejects"].items()}, expected["rejects"])


def _same(what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        missing = {k: v for k, v in wanted.items() if found.get(k) != v}
        surplus = {k: v for k, v in found.items() if wanted.get(k) != v}
        raise Wrong(f"{what}: wanted {dict(list(missing.items())[:5])}, found {dict(list(surplus.items())[:5])}")


def _value(table: str, rest: Row) -> int:
    return int(rest[0])  # the column after the key


# --- accounts ---------------------------------------------------------------------------------------------------------------


def dead_letters(world: World) -> Letters:
    """How often each record is in the committed dead letters."""
    found: Letters = Counter()
    for topic in TOPICS.rejected:
        for number in range(world.case.partitions):
            for record in world.log.read(topic, number, 0)[0]:
                letter = json.loads(record.value or b"")
                found[letter["topic"], letter["partition"], letter["offset"]] += 1
    return found


def _check_accounts(world: World, worker: Worker, letters: Letters) -> None:
    rekeyed = sent_on = 0
    for number in range(world.case.partitions):
        for topic in TOPICS.sources:
            records = world.log.read(topic, number, 0)[0]
            state = worker.owned[number].partition.states.get(topic)
            accounted = (state.applied, state.duplicates, state.rejected, state.too_late, state.rekeyed) if state else (0,) * 5
            where = f"{topic}[{number}]"
            if sum(accounted) != len(records):
                raise Wrong(f"{where}: {len(records)} records, accounted for {accounted}")
            if (buried := sum(n for place, n in letters.items() if place[:2] == (topic, number))) != accounted[2] + accounted[3]:
                raise Wrong(f"{where}: {accounted[2:4]} rejected and too late, {buried} dead letters")
            row = world.warehouse.newest["progress"].get((topic, number, 0))
            if records and (row is None or row[1][0] < records[-1].offset + 1 or row[1][2:] != accounted):
                raise Wrong(f"{where}: accounted for {accounted} of {len(records)}, the warehouse's progress is {row}")
            rekeyed += accounted[4]
            sent_on += len(records) if topic == TOPICS.rekeyed else 0
    if rekeyed != sent_on:
        raise Wrong(f"{rekeyed} records were sent on, {sent_on} arrived")


# --- plain recomputation ----------------------------------------------------------------------------------------------------


def plain_cells(world: World, letters: Letters) -> tuple[Counter[Row], Counter[Row]]:
    """Events by hour, users by (hour, level), each by partition, out of the topics and the verdicts.

    Where the order of reading decides on lateness the dead letters say what was too late, else it is worked out here.
    """
    case, accepted = world.case, {}
    late = None if not case.late else letters
    for record in case.records:  # which records were late is known by place, and places follow the order of producing
        if record.body is not None:
            accepted[record.body[0]] = record.body
    places, watermarks = _places(case), defaultdict(lambda: -1)
    kept: set[str] = set()
    strays = {(topic, number, r.offset): json.loads(r.value or b"")["event_id"] for topic, number, r in _rekeyed(world)}
    for record, place in zip(case.records, places, strict=True):
        if record.body is None:
            if letters[place] != 1:
                raise Wrong(f"{place} is bad and was found {letters[place]} times in the dead letters")
            continue
        event_id, _, ts, user = record.body
        if record.partition != home(user, case.partitions):
            if late is None:
                kept.add(event_id)
            continue
        before = watermarks[place[:2]]
        watermarks[place[:2]] = max(before, ts)
        too_late = ts < before - LATENESS if late is None else place in late
        if late is None and letters[place] != too_late:
            raise Wrong(f"{place}: too late is {too_late}, found {letters[place]} times in the dead letters")
        if not too_late:
            kept.add(event_id)
    if late is not None:
        kept |= {event_id for place, event_id in strays.items() if place not in late}
    return _count([accepted[event_id] for event_id in kept], case)


def _rekeyed(world: World) -> list[tuple[str, int, Stored]]:
    return [(TOPICS.rekeyed, n, r) for n in range(world.case.partitions) for r in world.log.read(TOPICS.rekeyed, n, 0)[0]]


def _places(case: Case) -> list[Place]:
    seen: Counter[tuple[str, int]] = Counter()
    places = []
    for record in case.records:
        places.append((record.topic, record.partition, seen[record.topic, record.partition]))
        seen[record.topic, record.partition] += 1
    return places


def _count(events: list[tuple[str, str, int, str]], case: Case) -> tuple[Counter[Row], Counter[Row]]:
    counts: Counter[Row] = Counter()
    by_user: dict[str, list[PlainEvent]] = defaultdict(list)
    for event_id, name, ts, user in events:
        counts[ts - ts % HOUR, home(user, case.partitions)] += 1
        if name in STEP_OF:
            by_user[user].append(PlainEvent(ts, xxhash.xxh64_intdigest(event_id.encode()), frozenset({STEP_OF[name]}), frozenset()))
    levels: Counter[Row] = Counter()
    for user, own in by_user.items():
        for start, outcome in best_outcomes(FUNNEL, own, "UTC", frozenset({0, 1})).items():
            levels[start, outcome.level, home(user, case.partitions)] += 1
    return counts, levels


def _plain_view(world: World) -> tuple[Counter[Row], Counter[Row]]:
    """The same numbers as the warehouse has them."""
    counts: Counter[Row] = Counter()
    for (kpi, _, _, start, dimension, _, _, _, number), (_, rest) in world.warehouse.newest["kpi_cells"].items():
        if kpi == COUNT.name and not dimension and rest[0]:
            counts[start, number] += rest[0]
    levels: Counter[Row] = Counter()
    for (_, _, start, _, level, _, number), (_, rest) in world.warehouse.newest["funnel_cells"].items():
        if rest[0]:
            levels[start, level, number] += rest[0]
    return counts, levels


# --- a partition that was never interrupted -----------------------------------------------------------------------------------


def uninterrupted(world: World) -> dict[str, dict[Row, Row]]:
    """Rows without version and without zeros, by table and key: every topic read in one run, one flush, then what was re-keyed."""
    case = world.case
    partitions = [Partition(n, case.partitions, case.definitions, TOPICS) for n in range(case.partitions)]
    strays: dict[int, list[Stored]] = defaultdict(list)
    for partition in partitions:
        for topic in TOPICS.sources[:2]:
            records = world.log.read(topic, partition.number, 0)[0]
            if records:
                partition.offer(Run(topic, partition.number, records, records[-1].offset + 1, 0))
        flush = partition.snapshot()
        for out in flush.records if flush else []:
            if out.topic == TOPICS.rekeyed:
                own = strays[out.partition]
                own.append(Stored(len(own), out.key, out.value, NOW, out.headers))
        if flush:
            partition.committed(flush)
    found: dict[str, dict[Row, Row]] = {table: {} for table in (*CELLS, "rejects")}
    warehouse = MemoryWarehouse()
    for partition in partitions:
        if own := strays[partition.number]:
            partition.offer(Run(TOPICS.rekeyed, partition.number, own, len(own), 0))
            flush = partition.snapshot()
            assert flush is not None
            partition.committed(flush)
        if (rows := partition.sink_rows()) is not None:
            warehouse.insert(rows[1])
    for table in found:
        found[table] = {key: rest for key, (_, rest) in warehouse.newest[table].items() if table == "rejects" or _value(table, rest)}
    return found
