"""deploy/clickhouse/grants.sql suffices: ClickHouse itself (chdb, a new version) enforces it on all that a worker, a migration and the reports do.

The server that Debian has knows no grants; chdb takes them from a users file, for its one user. So each role is a process of its own on one folder. It lets
everyone read system tables, which a server may not: those that are read are held against the file by name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.sinks.embedded import EmbeddedWarehouse

ROOT = Path(__file__).parents[2]
GRANTS = (ROOT / "deploy" / "clickhouse" / "grants.sql").read_text()
OPEN = """
import sys, pytest
from pipeline.sinks.embedded import EmbeddedWarehouse
from pipeline.sinks.warehouse import SinkRefused
from pipeline.definitions_file import load
from tests.sample_warehouse import SAMPLE, fill, sample_records
definitions = load(SAMPLE / "shopstream.toml")
warehouse = EmbeddedWarehouse(sys.argv[1])

def refused(sql):
    with pytest.raises(SinkRefused, match="grant"):
        warehouse.query(sql)

"""
MIGRATOR = (
    OPEN
    + """
assert warehouse.migrate()
assert warehouse.migrate() == []
assert warehouse.migrate(again=True)
from pipeline.sinks.revisions import drop_others
drop_others(warehouse, 0)
refused("CREATE USER another HOST NONE")
refused("CREATE DATABASE another")
"""
)
WORKER = (
    OPEN
    + """
from pipeline.cli.checks import _migrations, _warehouse_clock, _warehouse_disks
from pipeline.telemetry.watched import questions

EmbeddedWarehouse.migrate = lambda self: []
fill(warehouse, definitions, sample_records())
readings = {reading.metric.name for reading in questions(warehouse, definitions)}
assert {"shopstream_warehouse_rows", "shopstream_kpi"} <= readings, readings
assert {finding.state for finding in [*_migrations(warehouse), *_warehouse_clock(warehouse), *_warehouse_disks(warehouse)]} == {"ok"}
assert _warehouse_disks(warehouse)
from pipeline.sinks import revisions
one = revisions.Revision(1, 0, "plan", since=2_000_000_000_000)
revisions.write(warehouse, one)
revisions.keep_before(warehouse, definitions, one)
refused("DROP TABLE kpi_cells")
refused("ALTER TABLE kpi_cells DELETE WHERE 1")
refused("CREATE TABLE another (a Int8) ENGINE = Memory")
"""
)
READER = (
    OPEN
    + """
from tests.command_line import shopstream
from unittest.mock import patch
opened = lambda *_, **__: warehouse
assert warehouse.query("SELECT count() FROM funnel_report")[0][0] > 10
for words in ("report funnel", "report retention", "report kpi", "report health", "rejects list"):
    with patch("pipeline.sinks.open.open_warehouse", opened), patch.object(EmbeddedWarehouse, "close", lambda self: None):
        said = shopstream(*words.split(), "--json", SHOPSTREAM_WAREHOUSE="clickhouse://reader@127.0.0.1/default")
    assert said.code == 0, (words, said.all)
refused("INSERT INTO kpi_cells (kpi) VALUES ('x')")
refused("DROP VIEW kpi_report")
"""
)
OF_CHDB = "GRANT READ ON FILE"
"""chdb looks for a table of its database `default` among files, too; a server doesn't."""


def rights(role: str) -> list[str]:
    """What grants.sql gives to the role, for chdb's own user and database."""
    found = re.findall(rf"^GRANT (.+? ON [\w.*]+) TO {role};", GRANTS, re.M)
    assert found, role
    return ["GRANT " + grant.replace("shopstream.*", "default.*") for grant in found]


def act(code: str, folder: Path, role: str) -> None:
    users = folder.with_name(f"{role}.users.xml")
    config = folder.with_name(f"{role}.xml")
    queries = "".join(f"<query>{query}</query>" for query in (*rights(role), OF_CHDB))
    users.write_text(
        "<clickhouse><profiles><default/></profiles><quotas><default/></quotas><users><default><password/><networks><ip>::/0</ip></networks>"
        f"<profile>default</profile><quota>default</quota><grants>{queries}</grants></default></users></clickhouse>"
    )
    config.write_text(f"<clickhouse><users_config>{users}</users_config></clickhouse>")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, f"{folder}?config-file={config}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_each_role_can_do_its_work_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "warehouse"
    act(MIGRATOR, folder, "shopstream_migrates")
    act(WORKER, folder, "shopstream_writes")
    act(READER, folder, "shopstream_reads")


def test_every_statement_is_one_to_clickhouse() -> None:
    warehouse = EmbeddedWarehouse("")
    text = "\n".join(line for line in GRANTS.splitlines() if not line.startswith("--"))
    statements = [statement.strip() for statement in text.split(";") if statement.strip()]
    assert len(statements) > 10
    for statement in statements:
        warehouse.query("SELECT formatQuery(%(statement)s)", {"statement": statement})
    with pytest.raises(Exception, match="Syntax error"):
        warehouse.query("SELECT formatQuery(%(statement)s)", {"statement": "CREATE USERS a"})
    warehouse.close()


def test_every_system_table_that_is_read_is_granted_or_open_to_all() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "pipeline").rglob("*.py"))
    read = set(re.findall(r"FROM (system\.\w+)", text))
    assert read >= {"system.parts", "system.disks"}
    open_to_all = {"system.databases", "system.tables"}  # each user sees what it has a right in
    assert read - open_to_all == set(re.findall(r"GRANT SELECT ON (system\.\w+) TO shopstream_writes", GRANTS))
