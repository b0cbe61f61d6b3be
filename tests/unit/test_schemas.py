"""The contracts: generated JSON Schema is what the types say, the examples are what they claim."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from pipeline.columns import Strings
from pipeline.decode import Decoded, Decoder
from pipeline.definitions import Definitions
from pipeline.plan import Plan
from schemas.events import EVENTS_OF_TOPIC, MONEY_FIELDS, NUMBER_FIELDS, STRING_FIELDS, TOPIC_OF_EVENT, TOPICS, Event
from schemas.generate import FOLDER, TYPES, rendered
from schemas.rejects import Reason, RejectedRecord

EXAMPLES = FOLDER.parent / "examples"


@dataclass(frozen=True)
class Raw:
    value: bytes | None
    key: bytes | None = b"k"
    offset: int = 0
    timestamp: int = 1_800_000_000_000
    headers: tuple[tuple[str, bytes], ...] = ()


def decoded(topic: str, *values: bytes) -> Decoded:
    return Decoder(Plan(Definitions(), (), (), ()), Strings(), 0, 1).decode(topic, [Raw(value) for value in values])


def lines(kind: str, topic: str) -> list[bytes]:
    return (EXAMPLES / kind / f"{topic}.ndjson").read_bytes().splitlines()


@pytest.mark.parametrize("name", TYPES)
def test_json_schema_has_not_drifted_from_the_types(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == rendered(name), "run `python -m schemas.generate`"


@pytest.mark.parametrize("name", TYPES)
def test_json_schema_is_json_without_nan(name: str) -> None:
    def refuse(text: str) -> Any:
        raise ValueError(text)

    json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("topic", TOPICS)
def test_good_examples_are_accepted(topic: str) -> None:
    values = lines("good", topic)
    result = decoded(topic, *values)
    assert result.rejects == []
    assert len(result.columns) == len(values) > 3


@pytest.mark.parametrize(("topic", "line"), [(topic, line) for topic in TOPICS for line in lines("bad", topic)])
def test_bad_examples_are_rejected_for_the_reason_they_state(topic: str, line: bytes) -> None:
    example = json.loads(line)
    result = decoded(topic, json.dumps(example["event"]).encode())
    assert [reject.reason.value for reject in result.rejects] == [example["reason"]]


def test_every_known_event_belongs_to_one_topic() -> None:
    names = [name for names in EVENTS_OF_TOPIC.values() for name in names]
    assert len(names) == len(set(names)) == len(TOPIC_OF_EVENT)
    assert tuple(EVENTS_OF_TOPIC) == TOPICS


def test_every_field_is_text_or_number_or_of_the_envelope() -> None:
    envelope = {"event_id", "event", "ts", "user_id", "anonymous_id", "items"}
    assert envelope | set(STRING_FIELDS) | set(NUMBER_FIELDS) == set(Event.__struct_fields__)
    assert not set(STRING_FIELDS) & set(NUMBER_FIELDS)
    assert set(MONEY_FIELDS) < set(NUMBER_FIELDS)


def test_rejected_record_keeps_the_raw_bytes_through_json() -> None:
    record = RejectedRecord(
        reason=Reason.INVALID_UTF8, cause="c", topic="orders", partition=3, offset=17, key=None, raw=b"\xff\x00{", record_ts=5
    )
    assert msgspec.json.decode(msgspec.json.encode(record), type=RejectedRecord) == record
    assert json.loads(msgspec.json.encode(record))["raw"] == "/wB7"
