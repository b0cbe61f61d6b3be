"""The partition protocol, driven by hand: what is applied, what goes out in a flush, what a restore brings back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from pipeline.changelog import ChangelogError
from pipeline.definitions import Definitions, Funnel, Kpi, Match, Step
from pipeline.partition import HELD_BACK, BrakesOn, ContinuityError, Flush, Options, Partition, Run
from pipeline.topic_names import Topics

T0 = 1_767_225_600_000  # 2026-01-01
HOUR = 3_600_000
TOPICS = Topics()
VIEW, CART, PURCHASE = Match(("view_item",)), Match(("add_to_cart",)), Match(("purchase",))
DEFINITIONS = Definitions(
    funnels=(Funnel("checkout", (Step("View", VIEW), Step("Cart", CART)), 24 * HOUR, "1d", version="f1"),),
    kpis=(Kpi("views", "events", "count", VIEW, windows=("1d",), version="k1"),),
)


@dataclass
class Fake:
    offset: int
    value: bytes | None
    key: bytes | None
    timestamp: int = T0 + 1000 * HOUR
    headers: list[tuple[str, bytes]] = field(default_factory=list)


def event(offset: int, name: str, ts: int, user: str = "u1", event_id: str | None = None) -> Fake:
    body = {"event_id": event_id or f"e{offset}-{name}", "event": name, "ts": ts, "user_id": user}
    return Fake(offset, json.dumps(body).encode(), user.encode())


def run(*records: Fake, topic: str = "clickstream") -> Run:
    return Run(topic, 0, list(records), records[-1].offset + 1, records[0].offset)


def partition(definitions: Definitions = DEFINITIONS, **options: Any) -> Partition:
    return Partition(0, 1, definitions, TOPICS, Options(**options))


def flush(subject: Partition) -> Flush:
    taken = subject.snapshot()
    assert taken is not None
    subject.committed(taken)
    return taken


def changelog(*flushes: Flush) -> list[tuple[bytes | None, bytes | None]]:
    return [(r.key, r.value) for f in flushes for r in f.records if r.topic == TOPICS.changelog]


def values(subject: Partition) -> dict[tuple[int, ...], int]:
    cells = subject.board.cells
    n = len(cells)
    return {tuple(k): v for k, v in zip(cells.arrays.keys[:n].tolist(), cells.arrays.values[:n].tolist(), strict=True) if v}


def views(rows: Any) -> int:
    return sum(rows.get("kpi_cells", {}).get("value", []))


def test_nothing_new_means_no_flush() -> None:
    subject = partition()
    assert subject.snapshot() is None
    subject.offer(run(event(0, "view_item", T0)))
    assert flush(subject).n == 1
    assert subject.snapshot() is None


def test_sink_gets_the_value_of_the_committed_flush_not_what_came_after() -> None:
    subject = partition()
    subject.offer(run(event(0, "view_item", T0)))
    taken = subject.snapshot()
    assert taken is not None
    subject.offer(run(event(1, "view_item", T0 + 1)))
    assert subject.sink_rows() is None
    subject.committed(taken)
    sent = subject.sink_rows()
    assert sent is not None
    assert sent[0] == 1
    assert views(sent[1]) == 1
    assert sent[1]["progress"]["next_offset"] == [1]


def test_rows_are_sent_again_until_acknowledged() -> None:
    subject = partition()
    subject.offer(run(event(0, "view_item", T0)))
    flush(subject)
    subject.offer(run(event(1, "add_to_cart", T0 + 1)))
    flush(subject)
    sent = subject.sink_rows()
    assert sent is not None
    assert sent[0] == 2
    assert views(sent[1]) == 1
    subject.sunk(2)
    assert subject.sink_rows() is None


def test_restart_from_the_changelog_is_the_same_state() -> None:
    first = partition()
    first.offer(run(event(0, "view_item", T0), event(1, "add_to_cart", T0 + 5, "u2")))
    flushes = [flush(first)]
    first.offer(run(event(2, "add_to_cart", T0 + 9), event(3, "view_item", T0 - HOUR, "u2")))
    flushes.append(flush(first))
    assert [f.snapshot for f in flushes] == [True, False]

    second = partition()
    told: list[float] = []
    second.restore(changelog(*flushes), told.append)
    assert told[0] == 0
    assert told == sorted(told)
    assert len(told) == 2
    assert told[-1] < 1
    assert values(second) == values(first)
    assert second.positions == first.positions
    assert second.watermark == first.watermark
    later = run(event(4, "add_to_cart", T0 + 20, "u2"), event(5, "view_item", T0 + 30, "u3"))
    first.offer(later)
    second.offer(later)
    assert values(second) == values(first)
    assert second.snapshot().n == 3  # type: ignore[union-attr]


def test_a_cell_raised_by_one_delta_and_lowered_by_the_next_is_sent_again() -> None:
    first = partition()
    first.offer(run(event(0, "view_item", T0)))
    flushes = [flush(first)]
    first.sunk(1)
    first.offer(run(event(1, "view_item", T0, "u2")))  # one more at level 1, which the sink may have got without our knowing
    flushes.append(flush(first))
    first.offer(run(event(2, "add_to_cart", T0 + 1, "u2")))  # from level 1 to level 2
    flushes.append(flush(first))
    second = partition()
    second.restore(changelog(*flushes))
    sent = second.sink_rows()
    assert sent is not None
    assert sent[0] == 3
    cells = sent[1]["funnel_cells"]
    assert sorted(zip(cells["level"], cells["value"], cells["version"], strict=True)) == [(1, 1, 3), (2, 1, 3)]


def test_totals_that_do_not_fit_the_events_are_refused() -> None:
    first = partition()
    first.offer(run(event(0, "view_item", T0)))
    flushes = [flush(first)]
    first.offer(run(event(1, "view_item", T0)))
    first.states["clickstream"].applied += 1
    flushes.append(flush(first))
    with pytest.raises(ChangelogError, match="do not add up"):
        partition().restore(changelog(*flushes))


def test_restart_sends_rows_the_sink_never_confirmed() -> None:
    first = partition()
    first.offer(run(event(0, "view_item", T0)))
    flushes = [flush(first)]
    second = partition()
    second.restore(changelog(*flushes))
    sent = second.sink_rows()
    assert sent is not None
    assert sent[0] == 1
    assert views(sent[1]) == 1


def test_copy_after_a_restart_is_a_duplicate() -> None:
    first = partition()
    first.offer(run(event(0, "view_item", T0, event_id="same")))
    second = partition()
    second.restore(changelog(flush(first)))
    second.offer(run(event(1, "view_item", T0, event_id="same")))
    assert second.states["clickstream"].duplicates == 1
    assert second.states["clickstream"].applied == 1


def test_run_that_does_not_begin_at_the_position_is_refused() -> None:
    subject = partition()
    subject.offer(run(event(0, "view_item", T0)))
    with pytest.raises(ContinuityError):
        subject.offer(run(event(0, "view_item", T0)))
    with pytest.raises(ContinuityError):
        subject.offer(run(event(2, "view_item", T0)))


def test_each_topic_has_its_own_watermark() -> None:
    subject = partition()
    subject.offer(run(event(0, "view_item", T0 + 100 * HOUR)))
    subject.offer(run(event(0, "purchase", T0), topic="orders"))
    assert subject.states["orders"].too_late == 0
    subject.offer(run(event(1, "view_item", T0 + 75 * HOUR)))
    assert subject.states["clickstream"].too_late == 1


def progress(subject: Partition) -> int:
    """The watermark that the last flush told the warehouse."""
    sent = subject.sink_rows()
    assert sent is not None
    return int(sent[1]["progress"]["watermark"][0])


def test_partition_waits_for_a_topic_that_has_shown_no_event() -> None:
    subject = partition()
    subject.offer(run(event(0, "view_item", T0 + 100 * HOUR)))
    flush(subject)
    assert progress(subject) == HELD_BACK
    subject.offer(run(event(0, "purchase", T0 + 40 * HOUR), topic="orders"))
    flush(subject)
    assert progress(subject) == T0 + 40 * HOUR


def test_idle_topic_stops_holding_the_watermark_back_without_a_further_event() -> None:
    subject = partition()
    subject.offer(run(event(0, "view_item", T0 + 100 * HOUR)))
    flush(subject)
    subject.idle.add("orders")
    flush(subject)
    assert progress(subject) == T0 + 100 * HOUR
    assert subject.snapshot() is None


def test_topic_that_wakes_up_is_judged_by_the_horizon_and_holds_it_where_it_is() -> None:
    subject = partition()
    subject.offer(run(event(0, "view_item", T0 + 100 * HOUR)))
    subject.idle.add("orders")
    flush(subject)
    horizon = T0 + 76 * HOUR
    subject.idle.discard("orders")
    subject.offer(run(event(0, "purchase", horizon - 1), event(1, "purchase", horizon), topic="orders"))
    assert (subject.states["orders"].too_late, subject.states["orders"].applied) == (1, 1)
    subject.offer(run(event(1, "view_item", T0 + 300 * HOUR)))
    flush(subject)
    assert subject.horizon == horizon
    subject.offer(run(event(2, "purchase", horizon + HOUR), topic="orders"))
    assert subject.states["orders"].too_late == 1


def test_too_late_event_goes_to_the_dead_letters_with_its_bytes() -> None:
    subject = partition()
    late = event(1, "view_item", T0)
    subject.offer(run(event(0, "view_item", T0 + 25 * HOUR), late))
    records = [r for r in flush(subject).records if r.topic == "clickstream.rejected"]
    assert len(records) == 1
    sent = subject.sink_rows()
    assert sent is not None
    rejects = sent[1]["rejects"]
    assert rejects["reason"] == ["too_late"]
    assert rejects["raw"] == [late.value]
    assert rejects["offset"] == [1]


def test_event_id_is_one_for_all_users_and_topics_of_a_partition() -> None:
    subject = partition()
    subject.offer(run(event(0, "view_item", T0, "u1", "same"), event(1, "view_item", T0 + 1, "u2", "same")))
    subject.offer(run(event(0, "order_created", T0 + 2, "u1", "same"), topic="orders"))
    subject.offer(run(event(2, "view_item", T0 + 10 * 60_000 + 1, "u1", "same")))
    assert subject.states["clickstream"].duplicates == 1
    assert subject.states["orders"].duplicates == 1
    assert subject.states["clickstream"].applied == 2


def test_flood_of_rejects_puts_the_brake_on_and_applies_nothing() -> None:
    subject = partition(brake_records=10, brake_ratio=0.5)
    subject.offer(run(*[event(i, "view_item", T0) for i in range(10)]))
    before = values(subject)
    with pytest.raises(BrakesOn, match="clickstream"):
        subject.offer(run(*[Fake(10 + i, b"{", b"u1") for i in range(30)]))
    assert values(subject) == before
    assert subject.positions == {"clickstream": 10}


@pytest.mark.parametrize("size", [1, 7, 10, 64, 300])
def test_flood_inside_good_records_puts_the_brake_on_however_they_are_cut_into_runs(size: int) -> None:
    subject = partition(brake_records=10, brake_ratio=0.5)
    good = [event(i, "view_item", T0 + i) for i in range(300)]
    records = [*good[:150], *(Fake(i, b"no json", b"u1") for i in range(150, 170)), *good[170:]]

    def offer_all() -> None:
        for at in range(0, len(records), size):
            subject.offer(run(*records[at : at + size]))

    with pytest.raises(BrakesOn, match=r"([6-9]|10) of 10 records in a row"):
        offer_all()
    applied = subject.positions.get("clickstream", 0)
    assert 155 - size < applied <= 155  # the sixth bad one is at 155
    assert subject.snapshot() is None or subject.states["clickstream"].rejected <= 5


def test_bad_records_far_apart_put_no_brake_on() -> None:
    subject = partition(brake_records=10, brake_ratio=0.5)
    for at in range(0, 100, 20):
        subject.offer(run(*(Fake(i, b"no json", b"u1") if i % 2 else event(i, "view_item", T0 + i) for i in range(at, at + 20))))
    assert subject.states["clickstream"].rejected == 50


def test_wrong_partition_is_sent_on_once_with_its_bytes() -> None:
    subject = Partition(0, 64, DEFINITIONS, TOPICS, Options())
    record = event(0, "view_item", T0, "someone")
    subject.offer(run(record))
    out = [r for r in flush(subject).records if r.topic == TOPICS.rekeyed]
    if out:  # 63 of 64 users belong elsewhere; "someone" does
        assert out[0].value == record.value
        assert out[0].partition != 0
    assert len(out) == 1
    assert subject.states["clickstream"].rekeyed == 1


def test_changed_definition_keeps_what_did_not_change() -> None:
    first = partition()
    first.offer(run(event(0, "view_item", T0), event(1, "add_to_cart", T0 + 5)))
    log = changelog(flush(first))
    changed = Definitions(
        funnels=(Funnel("checkout", (Step("View", VIEW), Step("Buy", PURCHASE)), 24 * HOUR, "1d", version="f2"),), kpis=DEFINITIONS.kpis
    )
    second = partition(changed)
    second.restore(log)
    second.offer(run(event(2, "view_item", T0 + 6, "u9")))
    taken = flush(second)
    assert taken.snapshot
    sent = second.sink_rows()
    assert sent is not None
    assert views(sent[1]) == 2
    by_version = dict(zip(sent[1]["funnel_cells"]["definition"], sent[1]["funnel_cells"]["value"], strict=True))
    assert by_version["f2"] == 1
    third = partition(changed)
    third.restore([*log, *changelog(taken)])
    assert values(third) == values(second)


def test_snapshot_comes_when_the_deltas_outgrow_it() -> None:
    subject = partition(snapshot_bytes=500)
    kinds = []
    for i in range(12):
        subject.offer(run(event(i, "view_item", T0 + i, f"u{i}")))
        kinds.append(flush(subject).snapshot)
    assert kinds[0]
    assert not kinds[1]
    assert any(kinds[2:])


def test_offsets_without_records_count_as_progress_and_not_as_position() -> None:
    first = partition()
    first.advance(TOPICS.rekeyed, 2)
    log = changelog(flush(first))
    sent = first.sink_rows()
    assert sent is not None
    assert sent[1]["progress"]["next_offset"] == [2]
    assert first.positions == {}
    second = partition()
    second.restore(log)
    assert second.sink_rows() == (1, {})
    second.offer(Run(TOPICS.rekeyed, 0, [], 3, 0))


def test_state_of_another_partition_count_is_refused() -> None:
    first = partition()
    first.offer(run(event(0, "view_item", T0)))
    with pytest.raises(ChangelogError, match="1 partitions, the topics have 2"):
        Partition(0, 2, DEFINITIONS, TOPICS, Options()).restore(changelog(flush(first)))
