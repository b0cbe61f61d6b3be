"""An embedded warehouse's rows through a backup's folder and back; what is wrong with a folder is said. The whole of it: `tests/faults/test_backup.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.backup import FORMAT, Archive, BackupError, Manifest, read_catalog, read_manifest, read_rows, read_state, verify
from pipeline.definitions_file import load
from pipeline.sinks import catalog, copy
from pipeline.sinks.open import open_warehouse
from schemas.rows import COLUMNS
from tests.sample_warehouse import fill, sample_records

STATE = [(b"snapshot", b"\x00\xff" * 10), (None, b"")]


def archived(folder: Path) -> Manifest:
    archive = Archive(folder)
    archive.state(0, STATE)
    manifest = Manifest(FORMAT, "shop", "clickstream", "orders", 1, [{"clickstream": 3}], {}, archive.files, (0, 0, "", 0, False, 0))
    archive.finish(manifest)
    return manifest


def test_rows_and_catalog_are_the_same_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "CHUNK_ROWS", 1000)  # more than one chunk a table
    warehouse = open_warehouse(f"chdb://{tmp_path / 'warehouse'}")
    try:
        fill(warehouse, load(None), sample_records())
        counts, before = copy.count_rows(warehouse), copy.digest(warehouse)
        archive = Archive(tmp_path / "saved")
        archive.catalog(catalog.read(warehouse))
        for table in COLUMNS:
            for number, columns in enumerate(copy.chunks(warehouse, table, counts[table])):
                archive.rows(table, columns, number)
        stored = [file for file in archive.files if file.table]
        assert len(stored) > len(COLUMNS)
        for table in counts:
            warehouse.query(f"TRUNCATE TABLE {table}")
        assert copy.digest(warehouse) != before
        catalog.write(warehouse, read_catalog(tmp_path / "saved"))
        for file in stored:
            warehouse.insert({file.table: read_rows(tmp_path / "saved", file)})
        assert copy.digest(warehouse) == before
        assert before["kpi_report"].rows > 100
    finally:
        warehouse.close()


def test_state_comes_back_byte_for_byte(tmp_path: Path) -> None:
    manifest = archived(tmp_path / "saved")
    assert read_manifest(tmp_path / "saved") == manifest
    assert [file.name for file in verify(tmp_path / "saved", manifest)] == ["state-00000.msgpack"]
    assert read_state(tmp_path / "saved", manifest.files[0]) == STATE


@pytest.mark.parametrize("harm", ["changed", "shortened", "removed"])
def test_a_damaged_file_is_named(tmp_path: Path, harm: str) -> None:
    manifest = archived(tmp_path / "saved")
    file = tmp_path / "saved" / manifest.files[0].name
    content = file.read_bytes()
    if harm == "removed":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if harm == "shortened" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BackupError, match=r"state-00000.*(damaged|can't be read).*Nothing was written"):
        list(verify(tmp_path / "saved", manifest))


def test_an_unfinished_or_unknown_backup_is_refused(tmp_path: Path) -> None:
    Archive(tmp_path / "begun")
    with pytest.raises(BackupError, match=r"no manifest\.json"):
        read_manifest(tmp_path / "begun")
    archived(tmp_path / "saved")
    path = tmp_path / "saved" / "manifest.json"
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(BackupError, match="has format 99"):
        read_manifest(tmp_path / "saved")
    with pytest.raises(BackupError, match="overwrites nothing"):
        Archive(tmp_path / "saved")
