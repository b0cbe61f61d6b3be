"""Changelog records: what was packed is read back; what is missing is an error, never a wrong state."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.msgpack import decode, encode
from zstandard import ZstdCompressor

from pipeline.changelog import DELTA, SNAPSHOT, ChangelogError, Entry, Reader, pack, unpack

Records = list[tuple[bytes, bytes]]


def flush(key: bytes, n: int, size: int = 10) -> Records:
    return pack(key, n, {"n": n}, {"noise": np.random.default_rng(n).integers(0, 2**62, size)})


def read(*flushes: Records) -> list[Entry]:
    reader = Reader()
    reader.read([record for records in flushes for record in records])
    reader.end()
    return reader.take()


def test_arrays_come_back_equal_aligned_and_writable() -> None:
    arrays = {"a": np.arange(7, dtype=np.uint8), "b": np.arange(12, dtype=np.int64).reshape(6, 2), "empty": np.zeros((0, 3), np.int32)}
    meta, back = unpack(read(pack(SNAPSHOT, 1, [1, "x"], arrays))[0].data, decode)
    assert meta == [1, "x"]
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name], array)
        assert back[name].flags.aligned
        assert back[name].flags.writeable


def test_a_large_flush_is_cut_into_parts_and_joined() -> None:
    records = flush(SNAPSHOT, 1, 400_000)
    assert len(records) > 3
    assert all(len(value) < 1_000_000 for _, value in records)
    _, arrays = unpack(read(records)[0].data, decode)
    assert np.array_equal(arrays["noise"], np.random.default_rng(1).integers(0, 2**62, 400_000))


def test_a_snapshot_replaces_what_came_before_it() -> None:
    entries = read(flush(SNAPSHOT, 1), flush(DELTA, 2), flush(SNAPSHOT, 3), flush(DELTA, 4), flush(DELTA, 5))
    assert [(entry.snapshot, entry.flush) for entry in entries] == [(True, 3), (False, 4), (False, 5)]


def test_a_snapshot_begins_anew_where_the_one_before_was_deleted_while_it_was_read() -> None:
    entries = read(flush(SNAPSHOT, 1, 400_000)[:-1], flush(SNAPSHOT, 2, 400_000), flush(DELTA, 3))
    assert [(entry.snapshot, entry.flush) for entry in entries] == [(True, 2), (False, 3)]


def test_what_is_read_in_pieces_is_taken_in_pieces() -> None:
    reader = Reader()
    taken = []
    for records in (flush(SNAPSHOT, 1, 400_000), flush(DELTA, 2), flush(SNAPSHOT, 3, 400_000), flush(DELTA, 4)):
        for record in records:
            reader.read([record])
            taken += reader.take()
    assert [(entry.snapshot, entry.flush) for entry in taken] == [(True, 1), (False, 2), (True, 3), (False, 4)]


def test_an_empty_changelog_restores_nothing() -> None:
    assert read() == []


@pytest.mark.parametrize(
    ("flushes", "says"),
    [
        ([flush(SNAPSHOT, 1), flush(DELTA, 3)], "follows 1"),
        ([flush(DELTA, 2)], "before any snapshot"),
        ([flush(SNAPSHOT, 1, 400_000)[:-1]], "not whole"),
        ([flush(SNAPSHOT, 1, 400_000)[1:]], "does not follow"),
        ([flush(SNAPSHOT, 1), [(b"other", b"x")]], "another program"),
        ([[(DELTA, b"\xff\xff")]], "damaged"),
        ([flush(SNAPSHOT, 1), [(DELTA, None)]], "another program"),
    ],
)
def test_a_hole_in_the_changelog_is_an_error(flushes: list[Records], says: str) -> None:
    with pytest.raises(ChangelogError, match=says):
        read(*flushes)


def test_a_changelog_of_another_format_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.changelog.FORMAT", 7)
    entry = read(flush(SNAPSHOT, 1))[0]
    assert unpack(entry.data, decode)[0] == {"n": 1}
    monkeypatch.undo()
    with pytest.raises(ChangelogError, match="format 7, this version reads format 1"):
        unpack(entry.data, decode)


def test_a_changelog_written_before_formats_had_numbers_is_the_first_format() -> None:
    head = ZstdCompressor().compress(encode([encode("meta"), []]))
    assert unpack(len(head).to_bytes(4, "little") + head, decode) == ("meta", {})
