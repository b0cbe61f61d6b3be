"""What a revision changes below the warehouse: versions and names of its own, dead letters sent once, a horizon that waits, windows that are left alone."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.changelog import SEALED, Sealed
from pipeline.definitions import Definitions
from pipeline.definitions_file import load
from pipeline.definitions_version import at_revision, version_at
from pipeline.partition import Flush, Options, Partition, end_of
from pipeline.topic_names import Topics
from tests.unit.test_partition import DEFINITIONS, HOUR, T0, Fake, event, run

TOPICS = Topics().at(1)
BAD = b"not JSON"


def versions(definitions: Definitions) -> list[str]:
    return [each.version for each in (*definitions.funnels, *definitions.retentions, *definitions.kpis)]


def test_revision_0_leaves_the_versions_and_every_other_has_its_own() -> None:
    wanted = load()
    assert at_revision(wanted, 0) is wanted
    first, second = versions(at_revision(wanted, 1)), versions(at_revision(wanted, 2))
    every = [*versions(wanted), *first, *second]
    assert len(set(every)) == 3 * len(set(versions(wanted)))
    assert first == [version_at(version, 1) for version in versions(wanted)]
    assert versions(at_revision(wanted, 1)) == first


def test_revision_0_has_the_names_it_always_had() -> None:
    names = Topics("c", "o", "shop")
    assert names.at(0) is names
    one = names.at(1)
    assert (one.app_id, one.changelog, one.rekeyed) == ("shop.r1", "shop.r1.changelog", "shop.r1.rekeyed")
    assert (one.clickstream, one.orders, one.rejected) == (names.clickstream, names.orders, names.rejected)


def beside(held: bool = False, **options: Any) -> Partition:
    subject = Partition(0, 1, DEFINITIONS, TOPICS, Options(**options))
    subject.begin_beside(held)
    return subject


def flush(subject: Partition) -> Flush:
    taken = subject.snapshot()
    assert taken is not None
    subject.committed(taken)
    return taken


def letters(*flushes: Flush) -> list[bytes]:
    return [r.value for f in flushes for r in f.records if r.topic in TOPICS.rejected]


def changelog(*flushes: Flush) -> list[tuple[bytes | None, bytes | None]]:
    return [(r.key, r.value) for f in flushes for r in f.records if r.topic == TOPICS.changelog]


def test_what_was_rejected_before_the_older_one_ended_is_not_sent_and_what_came_after_is_sent_once() -> None:
    subject = beside()
    subject.letters.dealt_with({"clickstream": 1})
    subject.offer(run(Fake(0, BAD, None), Fake(1, BAD, None), Fake(2, BAD, None), event(3, "view_item", T0)))
    first = flush(subject)
    assert letters(first) == []
    sent = subject.sink_rows()
    assert sent is not None
    assert sent[1]["rejects"]["offset"] == [0, 1, 2], "the warehouse's rows merge"
    assert sent[1]["progress"]["revision"] == [1]
    subject.succeed({"clickstream": 2})
    subject.offer(run(Fake(4, BAD, None)))
    second = flush(subject)
    assert [b'"offset":2' in letters(second)[0], b'"offset":4' in letters(second)[1], len(letters(second))] == [True, True, 2]
    subject.offer(run(event(5, "view_item", T0)))
    assert letters(flush(subject)) == []


def test_what_is_withheld_outlives_a_restart() -> None:
    subject = beside()
    subject.offer(run(Fake(0, BAD, None), Fake(1, BAD, None)))
    first = flush(subject)
    again = Partition(0, 1, DEFINITIONS, TOPICS)
    again.restore(changelog(first))
    assert again.letters.beside
    again.succeed({"clickstream": 1})
    second = flush(again)
    assert len(letters(second)) == 1
    once_more = Partition(0, 1, DEFINITIONS, TOPICS)
    once_more.restore(changelog(first, second))
    assert not once_more.letters.beside
    once_more.offer(run(Fake(2, BAD, None)))
    assert len(letters(flush(once_more))) == 1


def test_end_of_a_changelog_says_what_was_never_sent() -> None:
    subject = beside()
    subject.offer(run(Fake(0, BAD, None), event(1, "view_item", T0)))
    records = changelog(flush(subject))
    end = end_of(records)
    assert end is not None
    assert (end.positions, end.beside, [letter.row.offset for letter in end.withheld]) == ({"clickstream": 2}, True, [0])
    assert end_of([]) is None
    with pytest.raises(Sealed, match="revision 2"):
        end_of([*records, (SEALED, b"2")])


def test_the_horizon_waits_for_what_other_partitions_send_on() -> None:
    for held, applied in ((True, 2), (False, 1)):
        subject = beside(held)
        subject.idle = {"orders"}
        subject.offer(run(event(0, "view_item", T0 + 100 * HOUR)))
        flush(subject)
        subject.offer(run(event(0, "view_item", T0 + 90 * HOUR, "u2"), event(1, "view_item", T0, "u3"), topic=TOPICS.rekeyed))
        assert subject.states["clickstream"].applied + subject.states[TOPICS.rekeyed].applied == applied + 1
        subject.release()
        flush(subject)
        assert subject.horizon == T0 + 76 * HOUR


def test_rows_of_windows_that_are_left_alone_are_not_sent() -> None:
    day = 24 * HOUR
    subject = beside(rows_since_ms=T0 + day)
    subject.offer(run(event(0, "view_item", T0), event(1, "view_item", T0 + day)))
    flush(subject)
    sent = subject.sink_rows()
    assert sent is not None
    for table in ("kpi_cells", "funnel_cells"):
        assert {int(start) for start in sent[1][table]["window_start"]} == {T0 + day}
        assert len({len(column) for column in sent[1][table].values()}) == 1
