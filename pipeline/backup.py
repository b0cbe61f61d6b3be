"""The folder of a backup: what is in it, and proof that it is what was written.

`pipeline.cli.backup` fills and reads it; no I/O here but that of the folder. `manifest.json` is written last: a folder without it is no backup.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

MANIFEST = "manifest.json"
DEFINITIONS = "definitions.toml"
CATALOG = "catalog.json"
FORMAT = 2
_READ_BYTES = 1 << 20

Records = list[tuple[bytes | None, bytes | None]]


class BackupError(Exception):
    """A backup can't be made or restored; the message says why and what to do."""


class Digest(msgspec.Struct, frozen=True):
    """Rows of a query and the sum of their hashes, in whatever order they come."""

    rows: int
    digest: str


class Stored(msgspec.Struct, frozen=True):
    """One file. table: the base table whose rows it holds, '' for another kind; partition: whose state it holds, -1 for another kind."""

    name: str
    sha256: str
    size: int
    rows: int
    table: str = ""
    partition: int = -1


class Manifest(msgspec.Struct, frozen=True):
    """positions: next offset of each source topic, one mapping a partition. reports: what the restored warehouse must say.

    revision: the fields of the `pipeline.sinks.revisions.Revision` in force.
    """

    format: int
    app_id: str
    clickstream: str
    orders: str
    partitions: int
    positions: list[dict[str, int]]
    reports: dict[str, Digest]
    files: list[Stored]
    revision: tuple[int, int, str, int, bool, int]


class Archive:
    """A backup's folder while it is written."""

    def __init__(self, folder: Path) -> None:
        """Raises BackupError when the folder holds something."""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BackupError(f"{folder} is there and not an empty folder: name a new one. A backup overwrites nothing.")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.files: list[Stored] = []

    def definitions(self, content: bytes) -> None:
        self._write(DEFINITIONS, content, 1)

    def catalog(self, tables: dict[str, list[tuple[Any, ...]]]) -> None:
        """All rows of the catalog's tables."""
        self._write(CATALOG, msgspec.json.encode(tables), sum(map(len, tables.values())))

    def state(self, partition: int, records: Records) -> None:
        """The changelog's records of one partition, in their order."""
        self._write(f"state-{partition:05d}.msgpack", pack_records(records), len(records), partition=partition)

    def rows(self, table: str, columns: dict[str, Any], number: int) -> None:
        """Some rows of a base table: arrow columns of one length."""
        sink = pa.BufferOutputStream()
        filled = pa.table(columns)
        pq.write_table(filled, sink, compression="zstd")
        self._write(f"{table}-{number:05d}.parquet", sink.getvalue().to_pybytes(), filled.num_rows, table=table)

    def finish(self, manifest: Manifest) -> None:
        """From now on it is a backup."""
        unfinished = self.folder / f"{MANIFEST}.part"
        _write_through(unfinished, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        unfinished.rename(self.folder / MANIFEST)

    def _write(self, name: str, content: bytes, rows: int, table: str = "", partition: int = -1) -> None:
        _write_through(self.folder / name, content)
        self.files.append(Stored(name, hashlib.sha256(content).hexdigest(), len(content), rows, table, partition))


def read_manifest(folder: Path) -> Manifest:
    """Raises BackupError for a folder that is no backup, or one of a format we do not know."""
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise BackupError(f"{folder} is no finished backup: it has no {MANIFEST}. Take another one.") from None
    except (OSError, msgspec.DecodeError) as error:
        raise BackupError(f"{path} can't be read: {error}. Take another backup.") from None
    if manifest.format != FORMAT:
        raise BackupError(
            f"{path} has format {manifest.format}, this version of Shopstream reads {FORMAT}: restore it with the one that made it."
        )
    return manifest


def verify(folder: Path, manifest: Manifest) -> Iterator[Stored]:
    """Each file once its bytes have been found to be those that were written. Raises BackupError at the first that differs."""
    for stored in manifest.files:
        path = folder / stored.name
        try:
            with path.open("rb") as file:
                found = hashlib.sha256()
                while piece := file.read(_READ_BYTES):
                    found.update(piece)
        except OSError as error:
            raise BackupError(f"{path} can't be read: {error.strerror}. Nothing was written; take another backup.") from None
        if found.hexdigest() != stored.sha256:
            raise BackupError(f"{path} is damaged: its SHA-256 is not the manifest's. Nothing was written; take another backup.")
        yield stored


def read_catalog(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    return msgspec.json.decode((folder / CATALOG).read_bytes(), type=dict[str, list[tuple[Any, ...]]])


def read_rows(folder: Path, stored: Stored) -> dict[str, Any]:
    """Column name → numpy array of integers, or list of bytes."""
    table = pq.read_table(folder / stored.name, use_threads=False)
    return {
        name: column.to_numpy() if pa.types.is_integer(column.type) else column.to_pylist()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def read_state(folder: Path, stored: Stored) -> Records:
    return msgspec.msgpack.decode((folder / stored.name).read_bytes(), type=list[tuple[bytes | None, bytes | None]])


def pack_records(records: Records) -> bytes:
    return msgspec.msgpack.encode(records)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
