"""Which revision of the numbers reports show, and which are computed beside it: the table `revisions` of the warehouse.

A revision is one computation of everything from the topics (`shopstream rebuild`), with an app id, definition versions and progress rows of its own.
One row shows it: every report and every name changes at that instant. Revision 0 has no row.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.definitions import Definitions
from pipeline.definitions_version import version_at
from pipeline.sinks.catalog import TABLES
from pipeline.sinks.sql import literal
from pipeline.sinks.warehouse import Warehouse
from schemas.rows import COLUMNS


class Revision(NamedTuple):
    """follows: the revision that was in force when it was begun. plan: what it is computed from, equal for equal work. since: windows that start
    before it (ms) keep the rows they had. moved: some users' events are in partitions that are not theirs. shown_at: ms, 0 while it is not in force."""

    revision: int
    follows: int = 0
    plan: str = ""
    since: int = 0
    moved: bool = False
    shown_at: int = 0


_COLUMNS = ", ".join(Revision._fields)


def in_force(warehouse: Warehouse) -> int:
    """The revision that reports show."""
    return int(warehouse.query("SELECT revision FROM current_revision")[0][0])


def known(warehouse: Warehouse) -> list[Revision]:
    """All that were ever begun, oldest first; revision 0 is not among them."""
    rows = warehouse.query(f"SELECT {_COLUMNS} FROM revisions ORDER BY revision, shown_at")  # noqa: S608 our own names
    newest = {int(row[0]): Revision(int(row[0]), int(row[1]), str(row[2]), int(row[3]), bool(row[4]), int(row[5])) for row in rows}
    return list(newest.values())


def find(warehouse: Warehouse, revision: int) -> Revision:
    """What is known of one; of revision 0, that it follows nothing."""
    return next((one for one in known(warehouse) if one.revision == revision), Revision(revision))


def ancestry(warehouse: Warehouse, revision: int) -> list[Revision]:
    """A revision, the one that it follows, and so on to revision 0."""
    every = {one.revision: one for one in known(warehouse)}
    line = [every.get(revision, Revision(revision))]
    while line[-1].revision > 0:
        line.append(every.get(line[-1].follows, Revision(line[-1].follows)))
    return line


def write(warehouse: Warehouse, one: Revision) -> None:
    """Begin it (shown_at 0), or show it: from the next query on it is what every report says."""
    values = ", ".join(literal(int(value) if isinstance(value, bool) else value) for value in one)
    warehouse.query(f"INSERT INTO revisions ({_COLUMNS}) SELECT {values}")


def positions(warehouse: Warehouse, revision: int) -> dict[int, dict[str, int]]:
    """Next offset of each source topic of a revision, by partition, as far as its rows are in the warehouse."""
    found: dict[int, dict[str, int]] = {}
    rows = warehouse.query(
        'SELECT topic, "partition", argMax(next_offset, version) FROM progress WHERE revision = %(revision)s GROUP BY topic, "partition"',
        {"revision": revision},
    )
    for topic, number, offset in rows:
        found.setdefault(int(number), {})[str(topic)] = int(offset)
    return found


def keep_before(warehouse: Warehouse, definitions: Definitions, one: Revision) -> None:
    """Give `one` the rows of windows that start before its `since` as the revision that it follows has them, for definitions that did not change.

    definitions: with the versions of revision 0. May be repeated: the rows keep their own versions, and a worker sends none of these windows.
    """
    for table, start, known in (
        ("funnel_cells", "window_start", definitions.funnels),
        ("retention_cells", "cohort_start", definitions.retentions),
        ("kpi_cells", "window_start", definitions.kpis),
    ):
        for each in known:
            before, after = version_at(each.version, one.follows), version_at(each.version, one.revision)
            name = COLUMNS[table][0]
            values = ", ".join(literal(after) if column == "definition" else f'"{column}"' for column in COLUMNS[table])
            columns = ", ".join(f'"{column}"' for column in COLUMNS[table])
            warehouse.query(
                f"INSERT INTO {table} ({columns}) SELECT {values} FROM {table} "  # noqa: S608 our own names
                f"WHERE {name} = {literal(each.name)} AND definition = {literal(before)} AND toInt64({start}) * 1000 < {one.since}"
            )


def drop_others(warehouse: Warehouse, revision: int) -> None:
    """Delete the rows of every revision but this one. ClickHouse does it in the background."""
    for cells, catalog in (("funnel_cells", "catalog_funnels"), ("retention_cells", "catalog_retentions"), ("kpi_cells", "catalog_kpis")):
        known = warehouse.query(f"SELECT DISTINCT definition FROM {catalog} WHERE revision = {revision}")  # noqa: S608 our own names
        versions = ["", *(str(version) for (version,) in known)]
        warehouse.query(f"ALTER TABLE {cells} DELETE WHERE definition NOT IN {literal(versions)}")
    for table in ("progress", *TABLES):
        warehouse.query(f"ALTER TABLE {table} DELETE WHERE revision != {revision}")
