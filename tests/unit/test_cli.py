"""Wrong use ends with code 2 and one clear line, never a traceback; nothing is started and no folder emptied before that is known."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

LINE = b'{"event_id":"e","event":"view_item","ts":1772323200000,"user_id":"u"}\n'


def shopstream(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SHOPSTREAM_")}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli.main", *map(str, arguments)],
        env={**kept, "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def events(tmp_path: Path) -> Path:
    path = tmp_path / "events.ndjson"
    path.write_bytes(LINE)
    return path


def test_version_is_the_packages() -> None:
    assert shopstream("version") == (0, version("shopstream") + "\n")


def test_help_lists_the_commands() -> None:
    code, said = shopstream("--help")
    assert code == 0
    assert all(command in said for command in ("run", "worker", "topics", "migrate", "version"))


def test_a_run_without_files_says_what_to_give(tmp_path: Path) -> None:
    code, said = shopstream("run", "--warehouse", tmp_path / "w")
    assert code == 2
    assert "--clickstream" in said


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, said = shopstream("run", "--clickstream", tmp_path / "none.ndjson", "--warehouse", tmp_path / "w")
    assert code == 2
    assert "none.ndjson" in said


def test_a_file_of_no_known_format_is_refused_before_anything_starts(tmp_path: Path, events: Path) -> None:
    code, said = shopstream("run", "--clickstream", events.rename(tmp_path / "events.txt"), "--warehouse", tmp_path / "w")
    assert code == 2
    assert "the ending says no format" in said
    assert not (tmp_path / "w").exists()


def test_wrong_definitions_are_named(tmp_path: Path, events: Path) -> None:
    (tmp_path / "wrong.toml").write_text("[[funnel]]\nname = 'x'\n")
    code, said = shopstream("run", "--clickstream", events, "--definitions", tmp_path / "wrong.toml", "--warehouse", tmp_path / "w")
    assert code == 2
    assert "wrong.toml" in said


def test_a_wrong_map_is_named(tmp_path: Path, events: Path) -> None:
    (tmp_path / "map.toml").write_text("[nothing]\n")
    code, said = shopstream("run", "--clickstream", events, "--map", tmp_path / "map.toml", "--warehouse", tmp_path / "w")
    assert code == 2
    assert "map.toml" in said


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_folder_that_no_run_made_is_never_emptied(tmp_path: Path, events: Path, options: tuple[str, ...]) -> None:
    precious = tmp_path / "w" / "precious"
    precious.parent.mkdir()
    precious.touch()
    code, _ = shopstream("run", "--clickstream", events, "--warehouse", precious.parent, *options)
    assert code == 2
    assert precious.exists()


@pytest.mark.parametrize("command", ["worker", "topics", "migrate"])
def test_a_wrong_setting_ends_every_command_with_its_name(command: str) -> None:
    code, said = shopstream(command, SHOPSTREAM_PARTITIONS="many")
    assert code == 2
    assert "SHOPSTREAM_PARTITIONS" in said


def test_a_wrong_warehouse_url_is_wrong_use() -> None:
    code, said = shopstream("migrate", "--warehouse", "postgres://somewhere")
    assert code == 2
    assert "SHOPSTREAM_WAREHOUSE" in said


def test_a_warehouse_that_is_away_is_a_failure() -> None:
    code, said = shopstream("migrate", "--warehouse", "clickhouse://default@127.0.0.1:1/shop")
    assert code == 1
    assert "127.0.0.1" in said


def test_a_kafka_that_is_away_is_a_failure() -> None:
    code, said = shopstream("topics", "--broker", "127.0.0.1:1")
    assert code == 1
    assert "no Kafka answers at 127.0.0.1:1" in said
