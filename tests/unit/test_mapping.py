"""A map file turns foreign rows into our events; the ready maps turn the public data sets into events that add up to their known figures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.files import FilesError, Keyed, read
from pipeline.mapping import MappingError, load_mapping

ROOT = Path(__file__).parents[2]
MAPS = ROOT / "deploy" / "maps"
DATA = ROOT.parent / "shared" / "data"

PLAIN = """
[columns]
user_id = "who"
price = "cost"
[event]
column = "what"
names = { view = "view_item", buy = "purchase" }
[time]
column = "when"
format = "s"
"""


def mapped(tmp_path: Path, toml: str, csv: str) -> list[tuple[str, str | None, Any]]:
    (tmp_path / "map.toml").write_text(toml)
    (tmp_path / "rows.csv").write_text(csv)
    return [
        (r.topic, r.key, json.loads(r.value) if r.value.startswith(b"{") else r.value)
        for r in read(tmp_path / "rows.csv", "clickstream", load_mapping(tmp_path / "map.toml"))
    ]


def test_columns_and_event_names_are_renamed(tmp_path: Path) -> None:
    found = mapped(tmp_path, PLAIN, "who,what,when,cost,colour\nu1,view,1772323200.5,2.50,red\n")
    assert found == [
        ("clickstream", "u1", {"event_id": "rows.csv-0", "event": "view_item", "ts": 1772323200500, "user_id": "u1", "price": 2.5}),
    ]


def test_a_row_that_can_not_be_mapped_goes_out_for_the_worker_to_reject(tmp_path: Path) -> None:
    found = mapped(tmp_path, PLAIN, "who,what,when,cost\nu1,view,soon,cheap\nu2,vi\nu3,view,5,1\n")
    assert found[0][2] | {"event_id": ""} == {"event_id": "", "event": "view_item", "ts": "soon", "user_id": "u1", "price": "cheap"}
    assert found[1] == ("clickstream", None, b"u2,vi")
    assert found[2][2]["ts"] == 5000


@pytest.mark.parametrize(
    ("form", "written", "ms"),
    [
        ("ms", "1772323200123", 1772323200123),
        ("s", "1772323200.123", 1772323200123),
        ("rfc3339", "2026-03-01T08:00:00+08:00", 1772323200000),
        ("rfc3339", "2026-03-01 00:00:00Z", 1772323200000),
        ("%d.%m.%Y %H:%M", "01.03.2026 08:00", 1772323200000),
        ("%Y-%m-%d %H:%M:%S%z", "2026-03-01 00:00:00+0000", 1772323200000),
    ],
)
def test_times_become_milliseconds_in_the_zone_they_name_or_the_maps(tmp_path: Path, form: str, written: str, ms: int) -> None:
    toml = PLAIN.replace('format = "s"', f'format = "{form}"\nzone = "Asia/Shanghai"')
    assert mapped(tmp_path, toml, f"who,what,when,cost\nu,view,{written},1\n")[0][2]["ts"] == ms


def test_an_event_id_of_columns_is_the_same_for_the_same_row(tmp_path: Path) -> None:
    toml = PLAIN + '[event_id]\ncolumns = ["who", "when"]\n'
    ids = [event["event_id"] for _, _, event in mapped(tmp_path, toml, "who,what,when,cost\nu,view,1,1\nu,view,1,1\nu,view,2,1\n")]
    assert ids[0] == ids[1] != ids[2]


ORDERS = (
    PLAIN
    + """
[topics]
purchase = "orders"
refund = "orders"
[order]
items = { item_id = "sku", price = "cost", quantity = "n" }
group = "bill"
refund_prefix = "C"
"""
)


def test_rows_of_one_order_become_one_purchase_with_their_exact_sum(tmp_path: Path) -> None:
    csv = "who,what,when,cost,sku,n,bill\nu,buy,1,0.10,a,3,B1\nu,buy,1,0.70,b,1,B1\nv,buy,2,5,c,1,B2\nu,buy,1,0.2,d,1,B1\n"
    first, second = mapped(tmp_path, ORDERS, csv)
    assert (first[0], first[1], first[2]["value"], len(first[2]["items"])) == ("orders", "u", 1.2, 3)
    assert (second[1], second[2]["value"]) == ("v", 5.0)


def test_a_cancelled_order_is_a_refund_of_positive_amounts(tmp_path: Path) -> None:
    ((topic, _, event),) = mapped(tmp_path, ORDERS, "who,what,when,cost,sku,n,bill\nu,buy,1,2.50,a,-2,C7\n")
    assert (topic, event["event"], event["refund_value"]) == ("orders", "refund", 5.0)
    assert event["items"] == [{"item_id": "a", "price": 2.5, "quantity": 2.0}]
    assert "value" not in event


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[event]", "[evnt]"), "evnt"),
        (('column = "what"', ""), "event needs either"),
        (('user_id = "who"', 'user = "who"'), "no field of ours: user"),
        (('format = "s"', 'zone = "Mars"'), "time.zone 'Mars' is no time zone"),
        (("[columns]", "[columns"), "is not TOML"),
    ],
)
def test_a_wrong_map_is_refused_with_file_and_key(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(PLAIN.replace(*change))
    with pytest.raises(MappingError, match=says) as error:
        load_mapping(path)
    assert "wrong.toml" in str(error.value)


def test_a_file_without_the_maps_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FilesError, match="has no column cost, when"):
        mapped(tmp_path, PLAIN, "who,what\nu,view\n")


# --- the public data sets beside the repository ------------------------------------------------------------------------


def data_set(name: str, file: str) -> tuple[list[Keyed], dict[str, Any]]:
    path = DATA / name / file
    if not path.exists():
        pytest.skip(f"the data set {name} is not beside the repository (../shared/data/{name}): its map is NOT tested here")
    facts: dict[str, Any] = json.loads((DATA / name / "facts.json").read_text())
    return list(read(path, "clickstream", load_mapping(MAPS / f"{name}.toml"))), facts


def of(records: list[Keyed]) -> list[Any]:
    return [json.loads(r.value) for r in records if r.key]


def test_every_ready_map_loads() -> None:
    assert {path.stem for path in MAPS.glob("*.toml") if load_mapping(path)} == {"rees46", "ecom", "online_retail", "helpdesk"}


def test_rees46_adds_up() -> None:
    records, facts = data_set("rees46", "events.csv.gz")
    events = of(records)
    counts = Counter(event["event"] for event in events)
    assert (counts["view_item"], counts["add_to_cart"], counts["purchase"]) == tuple(
        facts["events_per_type"][k] for k in ("view", "cart", "purchase")
    )
    assert len({event["user_id"] for event in events}) == facts["users"]
    assert round(sum(event.get("value", 0) for event in events), 2) == facts["purchase_revenue"]
    assert {r.topic for r in records if b'"purchase"' in r.value} == {"orders"}
    (cut,) = (r for r in records if r.key is None)
    assert cut.value.endswith(b"52040330")


def test_ecom_adds_up() -> None:
    records, facts = data_set("ecom", "events.csv.gz")
    events = of(records)
    counts = Counter(event["event"] for event in events)
    assert len(records) == facts["rows"]
    assert len({event["user_id"] for event in events}) == facts["users"]
    assert len({event["session_id"] for event in events}) == facts["sessions_declared"]
    assert (counts["view_item"], counts["add_to_cart"], counts["purchase"]) == tuple(
        facts["events_per_type"][k] for k in ("product_view", "add_to_cart", "purchase")
    )


def test_online_retail_adds_up() -> None:
    records, facts = data_set("online_retail", "transactions.parquet")
    every = [json.loads(r.value) for r in records]
    assert len({event["order_id"] for event in every}) == len(records) == facts["invoices"]
    assert sum(event["event"] == "refund" for event in every) == facts["cancel_invoices"]
    assert sum(len(event["items"]) for event in every) == facts["rows"]
    assert len({r.key for r in records if r.key}) == facts["customers"]
    assert round(sum(event.get("value", 0) - event.get("refund_value", 0) for event in every), 2) == facts["revenue_sum_all"]


def test_helpdesk_adds_up() -> None:
    records, facts = data_set("helpdesk", "tickets.csv.gz")
    assert len({r.key for r in records}) == facts["cases"]
    assert Counter(event["event"] for event in of(records)) == facts["activities"]
