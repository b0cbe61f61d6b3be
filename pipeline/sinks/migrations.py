"""Renders the numbered SQL files of `schemas.migrations` for a server's version and the deployment's settings, and applies what is missing.

In: a function that runs one statement (`server.py`, `embedded.py`). Out: names of the migrations applied.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable

Run = Callable[[str], list[tuple[Any, ...]]]

MODERN = (20, 3)
"""The first long-term release where LowCardinality, column codecs and TTL are all on by default; 18.16 has none of them so."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLACEHOLDER = re.compile(r"\{(\w+)(?:\(([^{}]*)\))?\}")
_RACES = ("TABLE_ALREADY_EXISTS", "Code: 57", "Code: 60", "Code: 82", "Code: 81", "Code: 76", "Code: 107", "Code: 219")
_COLUMN_THERE = "column with this name already exists"
ATTEMPTS = 20
RETRY_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Deployment:
    """Settings of the warehouse that its SQL depends on.

    cluster: every statement runs ON CLUSTER (one shard: tables are not Distributed). replicated: engines keep replicas, with the
    server's macros {shard} and {replica}. retain_days: rows of older windows are deleted by TTL, 0 keeps all; ignored before ClickHouse 20.3.
    """

    database: str = "shopstream"
    cluster: str = ""
    replicated: bool = False
    retain_days: int = 0

    def __post_init__(self) -> None:
        for name, value in (("database", self.database), ("cluster", self.cluster)):
            if value and not _IDENTIFIER.fullmatch(value):
                raise ValueError(f"{name} {value!r}: use letters, digits and underscores, not starting with a digit")
        if not self.database:
            raise ValueError("the warehouse needs the name of a database")


@dataclass(frozen=True, slots=True)
class Migration:
    name: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def load() -> list[Migration]:
    """All migrations in the order of their numbers."""
    files = [file for file in resources.files("schemas.migrations").iterdir() if file.name.endswith(".sql")]
    return [Migration(file.name[:-4], file.read_text(encoding="utf-8")) for file in sorted(files, key=lambda file: file.name)]


def parse_version(text: str) -> tuple[int, int]:
    """'18.16.1' or '26.9.2.1' to (18, 16) or (26, 9); SinkRefused when it is no version."""
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise SinkRefused(f"the warehouse gives its version as {text!r}")
    return int(match[1]), int(match[2])


def render(text: str, version: tuple[int, int], deployment: Deployment) -> str:
    """The SQL with its `{name}` and `{name(argument, …)}` placeholders filled in; KeyError for an unknown one."""
    modern = version >= MODERN

    def replacing(table: str, column: str = "") -> str:
        if not deployment.replicated:
            return f"ReplacingMergeTree({column})"
        path = f"'/clickhouse/tables/{{shard}}/{deployment.database}/{table}', '{{replica}}'"
        return f"ReplicatedReplacingMergeTree({path}{', ' + column if column else ''})"

    def ttl(column: str) -> str:
        return f"TTL toDate({column}) + INTERVAL {deployment.retain_days} DAY" if modern and deployment.retain_days else ""

    rules: dict[str, Callable[..., str]] = {
        "database": lambda: deployment.database,
        "on_cluster": lambda: f"ON CLUSTER {deployment.cluster}" if deployment.cluster else "",
        "lowcardinality": lambda inner: f"LowCardinality({inner})" if modern else inner,
        "drop_view": lambda: "DROP VIEW" if modern else "DROP TABLE",
        "zstd": lambda: "CODEC(ZSTD(3))" if modern else "",
        "replacing": replacing,
        "ttl": ttl,
    }

    def fill(match: re.Match[str]) -> str:
        arguments = [argument.strip() for argument in match[2].split(",")] if match[2] else []
        return rules[match[1]](*arguments)

    return _PLACEHOLDER.sub(fill, text)


def statements(sql: str) -> Iterator[str]:
    """The statements of a file: each ends with a `;` at the end of a line; lines that begin with `--` are comments."""
    lines = [line for line in sql.splitlines() if not line.lstrip().startswith("--")]
    for statement in re.split(r";[ \t]*\n", "\n".join(lines) + "\n"):
        if statement.strip():
            yield statement.strip()


def migrate(run: Run, deployment: Deployment, again: bool = False) -> list[str]:
    """Apply what `schema_migrations` does not list; names applied by this call. again: apply all, which makes what was dropped.

    Every statement is idempotent, so processes that migrate at once do no harm: the loser of a race for a table tries again.
    SinkRefused when a migration was edited after it was applied.
    """
    for attempt in range(ATTEMPTS):
        try:
            return _migrate_once(run, deployment, again)
        except (SinkRefused, SinkUnavailable) as error:
            if attempt == ATTEMPTS - 1 or not any(sign in str(error) for sign in _RACES):
                raise
            time.sleep(RETRY_SECONDS)
    raise AssertionError("unreachable")


def _migrate_once(run: Run, deployment: Deployment, again: bool) -> list[str]:
    version = parse_version(str(run("SELECT version()")[0][0]))
    # A user of a real deployment may use the database but not create one.
    if not run(f"SELECT name FROM system.databases WHERE name = '{deployment.database}'"):  # noqa: S608 an identifier, checked
        run(render("CREATE DATABASE IF NOT EXISTS {database} {on_cluster}", version, deployment))
    run(render(_BOOKKEEPING, version, deployment))
    recorded = run(f"SELECT name, checksum FROM {deployment.database}.schema_migrations")  # noqa: S608 an identifier, checked
    applied = {str(name): str(checksum) for name, checksum in recorded}
    done = []
    for migration in load():
        if migration.name in applied:
            if applied[migration.name] != migration.checksum:
                raise SinkRefused(f"migration {migration.name} was changed after it was applied to this warehouse; add a new one instead")
            if not again:
                continue
        for statement in statements(render(migration.text, version, deployment)):
            try:
                run(statement)
            except SinkRefused as error:  # 18.16 knows no ADD COLUMN IF NOT EXISTS
                if _COLUMN_THERE not in str(error):
                    raise
        run(
            f"INSERT INTO {deployment.database}.schema_migrations (name, checksum, applied_at) "
            f"SELECT '{migration.name}', '{migration.checksum}', now()"
        )
        done.append(migration.name)
    return done


_BOOKKEEPING = """
CREATE TABLE IF NOT EXISTS {database}.schema_migrations {on_cluster} (name String, checksum String, applied_at DateTime('UTC'))
ENGINE = {replacing(schema_migrations)} ORDER BY name
"""
