"""Rendering of the warehouse's migrations for old and new servers, clusters and replicas; opening by URL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.sinks import migrations
from pipeline.sinks.migrations import Deployment, Migration, load, parse_version, render, statements
from pipeline.sinks.open import open_warehouse
from pipeline.sinks.shared import KEY_VARIABLE, serve
from pipeline.sinks.sql import bind, prepared, sink_error
from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable
from schemas.rows import COLUMNS

OLD, NEW = (18, 16), (26, 9)


def everything(version: tuple[int, int], deployment: Deployment) -> str:
    return "\n".join(render(migration.text, version, deployment) for migration in load())


def test_migrations_are_numbered_without_gap_or_double() -> None:
    assert [int(migration.name[:4]) for migration in load()] == list(range(1, len(load()) + 1))


def test_an_old_server_gets_no_newer_feature() -> None:
    sql = everything(OLD, Deployment(retain_days=30))
    assert not re.search(r"LowCardinality|CODEC|\bTTL\b|DateTime64", sql)


def test_a_new_server_gets_low_cardinality_codecs_and_ttl_when_asked() -> None:
    sql = everything(NEW, Deployment(retain_days=30))
    assert "funnel LowCardinality(String)" in sql
    assert "raw String CODEC(ZSTD(3))" in sql
    assert sql.count("TTL toDate(window_start) + INTERVAL 30 DAY") == 2
    assert "TTL" not in everything(NEW, Deployment())


def test_a_cluster_is_named_in_every_create() -> None:
    sql = everything(NEW, Deployment(cluster="shop"))
    creates = re.findall(r"^CREATE .*", sql, re.MULTILINE)
    assert len(creates) > 10
    assert all(" ON CLUSTER shop" in create for create in creates)
    assert "ON CLUSTER" not in everything(NEW, Deployment())


def test_replicated_engines_have_a_path_of_their_own_and_keep_the_version_column() -> None:
    sql = everything(NEW, Deployment("shop", replicated=True))
    engines = re.findall(r"ENGINE = (.*)", sql)
    assert all(engine.startswith("ReplicatedReplacingMergeTree('/clickhouse/tables/{shard}/shop/") for engine in engines)
    assert len(set(engines)) == len(engines)
    assert "ReplicatedReplacingMergeTree('/clickhouse/tables/{shard}/shop/kpi_cells', '{replica}', version)" in sql


def test_the_sorting_key_of_a_base_table_is_all_that_identifies_a_row() -> None:
    sql = everything(OLD, Deployment())
    for table, columns in COLUMNS.items():
        body = re.search(rf"CREATE TABLE IF NOT EXISTS shopstream\.{table} .*?;", sql, re.DOTALL)
        assert body is not None
        altered = re.findall(rf"ALTER TABLE shopstream\.{table}  ADD COLUMN (\w+) \w+, (.*);", sql)
        assert (*re.findall(r"^    (\w+) ", body[0], re.MULTILINE), *(name for name, _ in altered)) == columns
        key = re.search(r"ORDER BY \((.*)\)", altered[-1][1] if altered else body[0])
        assert key is not None
        values = {"value", "final_at", "version", "cause", "key", "raw", "record_ts", *COLUMNS["progress"][2:-1]}
        assert set(key[1].split(", ")) == set(columns) - values


def test_an_unknown_placeholder_is_an_error() -> None:
    with pytest.raises(KeyError):
        render("SELECT {surprise}", NEW, Deployment())


def test_statements_end_with_a_semicolon_at_the_end_of_a_line_and_comments_vanish() -> None:
    assert list(statements("-- one;\nSELECT 1;\n  -- two\nSELECT ';'\nFROM x;\n\n")) == ["SELECT 1", "SELECT ';'\nFROM x"]


@pytest.mark.parametrize(("text", "version"), [("18.16.1", (18, 16)), ("26.9.2.1", (26, 9)), ("24.8.1.1-lts", (24, 8))])
def test_versions_are_compared_as_numbers(text: str, version: tuple[int, int]) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("name", ["", "a-b", "1a", "a.b", "a; DROP DATABASE b"])
def test_a_database_name_that_is_no_identifier_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="database"):
        Deployment(database=name)


class Recorder:
    """Answers a migration's questions from a list of what was applied before."""

    def __init__(self, applied: list[tuple[str, str]]) -> None:
        self.applied = applied
        self.statements: list[str] = []

    def __call__(self, sql: str) -> list[tuple[Any, ...]]:
        self.statements.append(sql)
        if sql.startswith("SELECT version()"):
            return [("26.9.1.1",)]
        if "system.databases" in sql:
            return [("shopstream",)]
        return list(self.applied) if sql.startswith("SELECT name, checksum") else []


def test_only_missing_migrations_run_and_an_existing_database_is_not_created() -> None:
    first, *rest = load()
    recorder = Recorder([(first.name, first.checksum)])
    assert migrations.migrate(recorder, Deployment()) == [migration.name for migration in rest]
    assert not any("CREATE DATABASE" in sql or "CREATE TABLE IF NOT EXISTS shopstream.kpi_cells" in sql for sql in recorder.statements)


def test_a_migration_edited_after_it_was_applied_is_refused() -> None:
    with pytest.raises(SinkRefused, match="0001_base_tables was changed"):
        migrations.migrate(Recorder([("0001_base_tables", Migration("0001_base_tables", "other").checksum)]), Deployment())


def test_the_loser_of_a_race_for_a_table_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrations, "RETRY_SECONDS", 0)
    recorder, failures = Recorder([]), [SinkRefused("Code: 57. DB::Exception: Table is being created"), SinkRefused("Code: 82. exists")]

    def run(sql: str) -> list[tuple[Any, ...]]:
        if sql.startswith("CREATE TABLE IF NOT EXISTS shopstream.progress") and failures:
            raise failures.pop()
        return recorder(sql)

    assert migrations.migrate(run, Deployment()) == [migration.name for migration in load()]
    assert failures == []


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("postgres://x", "chdb:///folder"),
        ("clickhouse://u:secret@h/db", "holds a password"),
        ("clickhouse://u@h/db?secured=1", "unknown option secured"),
        ("clickhouse://u@h/db?secure=maybe", "secure=maybe"),
        ("clickhouse://u@h/db?timeout=soon", "timeout=soon"),
        ("clickhouse://u@h/d-b", "letters, digits"),
        ("shared://127.0.0.1", "needs a port"),
    ],
)
def test_a_wrong_url_is_told_what_is_wrong_without_its_password(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        open_warehouse(url)
    assert "secret" not in str(caught.value)


def test_a_shared_warehouse_needs_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(SinkRefused, match=KEY_VARIABLE):
        open_warehouse("shared://127.0.0.1:1")


def test_a_shared_warehouse_is_served_on_loopback_only() -> None:
    with pytest.raises(ValueError, match="on 127"):
        serve(None, ("0.0.0.0", 0), b"k")  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [252, 241, 242, 209, 210, 202, 319])
def test_overload_and_network_are_unavailable(code: int) -> None:
    assert isinstance(sink_error(code, "x"), SinkUnavailable)


@pytest.mark.parametrize("code", [53, 60, 16, 62, 192, 193, 516, 497, None])
def test_types_names_and_rights_are_refused(code: int | None) -> None:
    assert isinstance(sink_error(code, "x"), SinkRefused)


def test_a_percent_sign_needs_doubling_only_with_parameters() -> None:
    assert bind("SELECT '%'", None) == "SELECT '%'"
    assert bind("SELECT '%%', %(a)s", {"a": "%(b)s"}) == "SELECT '%', '%(b)s'"
    with pytest.raises(KeyError):
        bind("SELECT %(a)s", {})


def test_progress_is_inserted_last_whatever_the_order_given() -> None:
    row: dict[str, Any] = {name: [1] for name in COLUMNS["progress"]} | {"topic": ["t"]}
    cell: dict[str, Any] = {name: [1] for name in COLUMNS["retention_cells"]} | {
        n: ["x"] for n in ("retention", "definition", "segment", "measure")
    }
    assert [table for table, _, _ in prepared({"progress": row, "retention_cells": cell})] == ["retention_cells", "progress"]


def test_only_the_two_sinks_import_their_clients() -> None:
    root = Path(migrations.__file__).parents[2]
    importing = {
        (path.name, client)
        for folder in ("pipeline", "agents", "schemas", "embedded")
        for path in (root / folder).rglob("*.py")
        for client in ("chdb", "clickhouse_driver")
        if re.search(rf"^\s*(import|from) {client}\b", path.read_text(), re.MULTILINE)
    }
    assert importing == {("embedded.py", "chdb"), ("server.py", "clickhouse_driver")}
