"""What the generator says is true of its shop, held against SQL over the same events; and that its memory of them stays bounded."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from types import ModuleType
from typing import Any

import pytest

from generator.answers import DEMO_FILE, FUNNELS, RETENTIONS, Answers
from generator.incidents import DAY_MS, HOUR_MS
from generator.live import LiveFaults, LiveShop, Sent
from generator.tally import Tally
from pipeline.definitions_file import load
from pipeline.sinks.embedded import EmbeddedWarehouse
from tests.integration.test_against_sql import same
from tests.oracle.sql import Oracle

FAULTS = LiveFaults(late=0.1, duplicated=0.03, bad=0.01, too_late=0.01)


@pytest.fixture(scope="module")
def warehouse() -> Iterator[EmbeddedWarehouse]:
    opened = EmbeddedWarehouse("")
    yield opened
    opened.close()


def sent(seed: int, hours: int, visitors: int = 60) -> list[Sent]:
    shop = LiveShop(seed, visitors, faults=FAULTS)
    return list(takewhile(lambda m: m.arrival_ms < shop.start_ms + hours * HOUR_MS, shop.messages()))


@pytest.mark.parametrize(("seed", "hours"), [(1, 24 * 19 + 7), (2, 24 * 3 + 13), (3, 5)])
def test_answers_equal_sql_at_any_moment(warehouse: EmbeddedWarehouse, seed: int, hours: int) -> None:
    answers = Answers(FAULTS.latest_ms)
    facts = []
    for message in sent(seed, hours):
        if message.fact:
            answers.add(message.fact)
            facts.append((message.topic, message.value))
        answers.settle(message.arrival_ms)
    oracle = Oracle(warehouse.query, load(DEMO_FILE), facts)
    same("funnels", answers.funnels(), oracle.funnels())
    same("retentions", answers.retentions(), {key: value[:2] for key, value in oracle.retentions().items()})
    same("KPIs", answers.kpis(), oracle.kpis())


def test_settling_changes_no_answer_and_lets_go_of_the_events() -> None:
    folded, kept = Answers(FAULTS.latest_ms), Answers(FAULTS.latest_ms)
    for message in sent(4, 24 * 21):
        if message.fact:
            folded.add(message.fact)
            kept.add(message.fact)
        folded.settle(message.arrival_ms)
    assert (folded.funnels(), folded.retentions(), folded.kpis()) == (kept.funnels(), kept.retentions(), kept.kpis())
    remembered = [sum(len(events) for book in answers._funnels for events in book._events.values()) for answers in (folded, kept)]
    assert remembered[0] * 4 < remembered[1]


def test_memory_is_a_few_bytes_a_settled_number_and_a_few_hundred_a_waiting_visitor() -> None:
    shop, answers = LiveShop(9, 60), Answers(LiveFaults().latest_ms)
    settled = {}
    for message in shop.messages():
        if message.fact:
            answers.add(message.fact)
        answers.settle(message.arrival_ms)
        day = (message.arrival_ms - shop.start_ms) // DAY_MS
        if day in (30, 60) and day not in settled:
            tallies = [book._totals for book in (*answers._funnels, *answers._retentions)]
            settled[day] = size([*tallies, answers._kpis._counts, answers._kpis._cents, answers._kpis._sessions._totals])
        if day > 60:
            break
    numbers = len(answers.funnels()) + len(answers.retentions()) + len(answers.kpis())
    assert (settled[60] - settled[30]) / (numbers / 2) < 30
    assert size(shop._visits) / len(shop._visits) < 1000


def size(root: object) -> int:
    """Bytes of everything that can be reached; classes, modules and functions are not data."""
    seen, queue, total = set(), [root], 0
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, ModuleType | type) or callable(thing):
            continue
        seen.add(id(thing))
        total += sys.getsizeof(thing)
        queue += gc.get_referents(thing)
    return total


def test_tally_reaches_back_and_tells_no_zeros() -> None:
    tally: Tally[str] = Tally()
    for series, window, number in (("a", 10, 2), ("a", 13, 1), ("a", 7, 5), ("b", 3, 1), ("a", 10, 1)):
        tally.add(series, window, number)
    assert sorted(tally) == [("a", 7, 5), ("a", 10, 3), ("a", 13, 1), ("b", 3, 1)]


def test_definitions_file_asks_what_the_answers_are_to() -> None:
    definitions = load(DEMO_FILE)
    assert [f.name for f in definitions.funnels] == [f.name for f in FUNNELS]
    assert [(r.name, r.periods) for r in definitions.retentions] == [(r.name, r.periods) for r in RETENTIONS]
    assert FAULTS.latest_ms < definitions.lateness_ms < FAULTS.too_late_ms


def test_the_same_seed_makes_the_same_endless_shop() -> None:
    assert sent(5, 50) == sent(5, 50)
    assert sent(5, 50) != sent(6, 50)


def test_messages_come_by_arrival_and_every_fate_is_met() -> None:
    messages = sent(7, 24 * 8)
    assert messages == sorted(messages, key=lambda m: m.arrival_ms)
    fates = Counter(m.fate for m in messages)
    assert set(fates) == {"", "late", "duplicate", "bad", "too_late"}
    assert all((m.fact is None) == (m.fate in ("duplicate", "bad", "too_late")) for m in messages)
    late = [m.arrival_ms - m.fact.ts for m in messages if m.fate == "late" and m.fact]
    assert max(late) <= FAULTS.latest_ms


def test_customers_come_back_over_weeks_and_days_have_a_rhythm() -> None:
    days: dict[str, set[int]] = {}
    hours: Counter[int] = Counter()
    for message in sent(8, 24 * 21):
        if message.fact:
            days.setdefault(message.key, set()).add(message.fact.ts // DAY_MS)
            hours[message.fact.ts % DAY_MS // HOUR_MS] += 1
    gaps = Counter(day - min(seen) for seen in days.values() for day in seen)
    assert all(gaps[n] for n in range(1, 15))
    assert gaps[1] > gaps[14]
    assert hours[20] > 5 * hours[3]


@pytest.mark.parametrize(("kind", "event"), [("payments", "payment_failed"), ("pages", "page_error")])
def test_an_incident_shows_in_the_events(kind: str, event: str) -> None:
    shop = LiveShop(10, 150)
    during: Counter[Any] = Counter()
    for message in takewhile(lambda m: m.arrival_ms < shop.start_ms + 21 * DAY_MS, shop.messages()):
        if message.fact and message.fact.body["event"] in (event, "purchase", "view_item"):
            incident = shop.incidents.at(message.fact.ts)
            during[bool(incident and incident.kind == kind), message.fact.body["event"]] += 1
    base = "purchase" if kind == "payments" else "view_item"
    assert during[True, event] / during[True, base] > 5 * during[False, event] / during[False, base]
