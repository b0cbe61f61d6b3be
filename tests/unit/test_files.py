"""Files become records: good rows typed, broken ones raw, nothing lost."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline.files import FilesError, Keyed, read

LINE = b'{"event_id":"e1","event":"view_item","ts":1772323200000,"user_id":"u1","price":1.50}'
HEAD = "event_id,event,ts,user_id,price\n"


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def events(path: Path) -> list[Any]:
    return [json.loads(record.value) for record in read(path, "clickstream")]


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonl", "a.ndjson.gz"])
def test_ndjson_goes_out_byte_for_byte(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, LINE + b"\r\n\n" + LINE)
    assert list(read(path, "orders")) == [Keyed("orders", "u1", LINE)] * 2


@pytest.mark.parametrize("bad", [LINE[:40], b"\xff\xfe", b'{"user_id":5}', b"[" * 3000, b'{"user_id":"\\ud800"}', b"null"])
def test_a_broken_line_goes_out_without_a_key_and_costs_no_neighbour(tmp_path: Path, bad: bytes) -> None:
    path = written(tmp_path / "a.ndjson", LINE + b"\n" + bad + b"\n" + LINE)
    assert list(read(path, "clickstream")) == [
        Keyed("clickstream", "u1", LINE),
        Keyed("clickstream", None, bad),
        Keyed("clickstream", "u1", LINE),
    ]


def test_before_a_user_is_known_the_anonymous_id_is_the_key(tmp_path: Path) -> None:
    path = written(tmp_path / "a.ndjson", b'{"anonymous_id":"a1"}\n{"anonymous_id":"a1","user_id":"u1"}')
    assert [record.key for record in read(path, "clickstream")] == ["a1", "u1"]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv_cells_get_the_types_of_the_contract(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, f"\ufeff{HEAD}e1,view_item,1772323200000,007,1.50\ne2,view_item,2026-03-01T00:00:00Z,u2,\n".encode())
    assert events(path) == [
        {"event_id": "e1", "event": "view_item", "ts": 1772323200000, "user_id": "007", "price": 1.5},
        {"event_id": "e2", "event": "view_item", "ts": "2026-03-01T00:00:00Z", "user_id": "u2"},
    ]


@pytest.mark.parametrize("text", ["cheap", "nan", "inf", "1_000", "-"])
def test_a_csv_number_that_is_none_stays_text_for_the_worker_to_reject(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "a.csv", f"{HEAD}e1,view_item,1,u1,{text}\n".encode())
    assert events(path)[0]["price"] == text


def test_csv_items_are_json(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", b'event_id,event,ts,items\ne1,purchase,1,"[{""item_id"":""i""}]"\ne2,purchase,1,[cut\n')
    assert [event["items"] for event in events(path)] == [[{"item_id": "i"}], "[cut"]


@pytest.mark.parametrize(
    "bad",
    [b"e1,view_item,1", b"e1,view_item,1,u1,1,too many", b"e1,view_item,1,\xff\xfe,1", b'"open quote,view_item,1,u1,1', b'e1,"view"x,1'],
)
def test_a_broken_csv_row_goes_out_raw_and_costs_no_neighbour(tmp_path: Path, bad: bytes) -> None:
    path = written(tmp_path / "a.csv", HEAD.encode() + b"a,view_item,1,u1,1\n" + bad + b"\nb,view_item,2,u2,2\nc,view_item,3,u3,3\n")
    records = list(read(path, "clickstream"))
    assert [r.value for r in records if r.key is None] == [bad]
    assert [r.key for r in records if r.key] == ["u1", "u2", "u3"]


def test_a_cut_last_csv_row_goes_out_raw(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", HEAD.encode() + b"a,view_item,1,u1,1\nb,view_i")
    assert [r.value for r in read(path, "clickstream")][1:] == [b"b,view_i"]


def test_a_quoted_cell_may_hold_line_breaks(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", HEAD.encode() + b'a,view_item,1,"u\n1",1\n')
    assert events(path)[0]["user_id"] == "u\n1"


def test_a_quote_that_never_closes_swallows_nothing(tmp_path: Path) -> None:
    rows = b"".join(b"%d,view_item,1,u%d,1\n" % (i, i) for i in range(60_000))
    path = written(tmp_path / "a.csv", HEAD.encode() + b'"x,view_item,1,u,1\n' + rows)
    records = list(read(path, "clickstream"))
    assert len(records) == 60_001
    assert sum(r.key is None for r in records) == 1


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet_values_get_the_types_of_the_contract(tmp_path: Path, name: str) -> None:
    table = pa.table(
        {
            "event_id": ["e1", "e2"],
            "event": ["purchase", "purchase"],
            "ts": pa.array([datetime(2026, 3, 1), datetime(2026, 3, 2)], pa.timestamp("ns")),
            "user_id": pa.array([17850.0, float("nan")]),
            "value": pa.array(["1.50", "2.00"]).cast(pa.decimal128(10, 2)),
            "items": [[{"item_id": "i", "price": 1.5}], None],
        }
    )
    plain = tmp_path / "plain.parquet"
    pa.parquet.write_table(table, plain)
    path = written(tmp_path / name, plain.read_bytes())
    assert events(path) == [
        {
            "event_id": "e1",
            "event": "purchase",
            "ts": "2026-03-01T00:00:00+00:00",
            "user_id": "17850",
            "value": 1.5,
            "items": [{"item_id": "i", "price": 1.5}],
        },
        {"event_id": "e2", "event": "purchase", "ts": "2026-03-02T00:00:00+00:00", "value": 2.0},
    ]


def test_parquet_times_with_a_zone_keep_their_instant(tmp_path: Path) -> None:
    instant = datetime(2026, 3, 1, 12, tzinfo=UTC)
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(
        pa.table({"event_id": ["e"], "event": ["x"], "ts": pa.array([instant], pa.timestamp("ms", "Asia/Shanghai"))}), path
    )
    assert datetime.fromisoformat(events(path)[0]["ts"]) == instant


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"x", "the ending says no format"),
        ("a.csv", b"id,name\n1,2\n", "has no column event, event_id, ts"),
        ("a.csv", b"", "has no column"),
        ("a.csv", b"event_id,event,ts,ts\n", "two columns of one name"),
        ("a.parquet", b"no parquet", "can't be read"),
    ],
)
def test_a_file_that_is_not_what_it_says_ends_in_a_clear_error(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = written(tmp_path / name, content)
    with pytest.raises(FilesError, match=says):
        list(read(path, "clickstream"))


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_gzip_file_that_is_cut_or_none_is_named(tmp_path: Path, keep: float) -> None:
    whole = gzip.compress(b"\n".join(LINE.replace(b"e1", b"%d" % (i * 7919)) for i in range(5000)))
    path = tmp_path / "a.ndjson.gz"
    path.write_bytes(whole[: int(len(whole) * keep)] or LINE)
    with pytest.raises(FilesError, match=r"a\.ndjson\.gz can't be read"):
        list(read(path, "clickstream"))
