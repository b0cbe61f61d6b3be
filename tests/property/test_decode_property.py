"""The scanner of plain events against the parser: whatever a record holds, both say the same of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.columns import Strings
from pipeline.decode import Decoded, Decoder
from pipeline.definitions import Definitions, Filter, Match
from pipeline.plan import Plan
from schemas.events import NUMBER_FIELDS, NUMBER_LIMIT, STRING_FIELDS

NOW = 1_767_225_600_000  # 2026-01-01
LIMIT = 1500
PARTITIONS = 2
PLAN = Plan(
    Definitions(future_ms=300_000),
    (
        Match(("purchase",)),
        Match(("*",), (Filter("value", "gte", (100_000,)),)),
        Match(("view",), (Filter("device", "ne", ("mobile", "ä")), Filter("page", "eq", ("/", "")))),
    ),
    ("channel", "item_id", "currency"),
    ("value", "price"),
)


@dataclass(frozen=True)
class Raw:
    value: bytes | None
    offset: int = 0
    key: bytes | None = b"k"
    timestamp: int = NOW
    headers: tuple[tuple[str, bytes], ...] = ()


words = st.sampled_from(
    ("", "a", "mobile", "ä", "𝕊", '"', "\\", "\n", "\x7f", "page", "/", "x" * 255, "é" * 130, "y" * 257, "z" * 1025, "null")
)
texts = st.one_of(words, st.text(max_size=20), st.none())
odd = st.sampled_from(
    ("true", "false", "[]", "{}", "nul", "-1", "01", "1.", ".5", "1e3", "1e400", "NaN", "0.1.2", "[1]", '{"a":[{}]}', '"', '"a', "")
)
numbers = st.one_of(
    st.integers(0, 10**18).map(str),
    st.floats(0, 1e13, allow_nan=False).map(repr),
    st.decimals(0, 10**9, places=4).map(str),
    st.sampled_from(("0", "0.0", "00", "-0", "-0.0", "999999999999999", "9999999999999999", str(NUMBER_LIMIT), "250000000000.01", "null", "0.30000000000000004")),
)  # fmt: skip
stamps = st.one_of(
    st.integers(NOW - 10**6, NOW + 400_000).map(str),
    st.sampled_from((f"{NOW}.0", f"{NOW}.5", '"2026-01-01T00:00:00Z"', "0", "-5", "946684799999", "946684800000", "4102444800000", "9" * 20, "null", '""')),
)  # fmt: skip
encoded = texts.flatmap(lambda text: st.sampled_from((json.dumps(text), json.dumps(text, ensure_ascii=False))))
space = st.sampled_from(("", "", "", " ", "\t", "\r\n  ", "\x0b"))


def fields(name: str) -> st.SearchStrategy[str]:
    value = stamps if name == "ts" else numbers if name in NUMBER_FIELDS else encoded
    return value if name != "items" else st.sampled_from(("null", "[]", '[{"item_id":"i"}]', "{}"))


NAMES = (
    "event_id",
    "event",
    "ts",
    "user_id",
    "anonymous_id",
    "items",
    *STRING_FIELDS[:9],
    *NUMBER_FIELDS[:4],
    "ours_not",
    "event_i",
    "q" * 17,
)


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """Mostly events: what is required in place, then any fields, some twice, here and there a value of another kind."""
    user = draw(st.sampled_from(("u1", "u2", "u3", "ü")))
    required = {
        "event_id": '"e"',
        "event": draw(st.sampled_from(('"purchase"', '"view"', '"other"'))),
        "ts": draw(stamps),
        "user_id": json.dumps(user),
    }
    pairs = list(required.items())[: draw(st.sampled_from((4, 4, 4, 4, 4, 3, 2)))]
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=8)):
        value = draw(odd) if draw(st.integers(0, 15)) == 0 else draw(fields(name))
        pairs.insert(draw(st.integers(0, len(pairs))), (name, value))
    gap = draw(space)
    body = f"{gap},{gap}".join(f'"{name}"{gap}:{gap}{value}' for name, value in pairs)
    value = f"{gap}{{{gap}{body}{gap}}}{gap}".encode()
    damage = draw(st.integers(0, 25))
    if damage == 0:
        at = draw(st.integers(0, len(value) - 1))
        value = value[:at] + bytes([draw(st.integers(0, 255))]) + value[at + 1 :]
    elif damage == 1:
        value = value[: draw(st.integers(0, len(value)))]
    return value


records = st.builds(Raw, st.one_of(objects(), objects(), objects(), st.none()), timestamp=st.sampled_from((NOW, NOW, -1)))


def said(decoded: Decoded, strings: Strings) -> Any:
    c = decoded.columns
    ids = np.array(strings.texts, object)
    return {
        "rows": decoded.rows.tolist(), "rejects": decoded.rejects, "rekey": decoded.rekey, "unknown": decoded.unknown_events,
        "texts": [ids[c.event].tolist(), ids[c.fields].tolist(), ids[c.currency].tolist()],
        "columns": [a.tolist() for a in (c.topic, c.user, c.event_id, c.ts, c.bits, c.numbers, c.order)],
    }  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.lists(records, min_size=1, max_size=12))
def test_the_scanner_and_the_parser_say_the_same(run: list[Raw]) -> None:
    strings, alone = Strings(), Strings()
    scanned = Decoder(PLAN, strings, 0, PARTITIONS, LIMIT).decode("orders", run)
    parser = Decoder(PLAN, alone, 0, PARTITIONS, LIMIT)
    parsed = parser._parse_piece(np.ones(len(run), np.uint8), run, [record.value for record in run], rekeyed=False)
    assert said(scanned, strings) == said(parsed, alone)


def test_what_producers_write_is_plain() -> None:
    event = {
        "event_id": "e",
        "event": "purchase",
        "ts": NOW,
        "user_id": "u1",
        "channel": "ä",
        "value": 35.79,
        "page": None,
        "ours_not": True,
    }
    decoder = Decoder(PLAN, Strings(), 0, 1, LIMIT)
    values = [json.dumps(event, ensure_ascii=False).encode(), json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()]
    plain = decoder._scanner.scan(values, np.full(2, NOW))
    assert (plain.rows.tolist(), plain.unknown_fields) == ([0, 1], 2)
