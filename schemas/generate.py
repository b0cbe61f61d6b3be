"""Writes `schemas/json/*.json`, the JSON Schema of the contracts, from their types. `python -m schemas.generate`; a test compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from schemas.events import EVENTS_OF_TOPIC, ClickstreamEvent, OrderEvent
from schemas.rejects import RejectedRecord

FOLDER = Path(__file__).parent / "json"
TYPES: dict[str, type[msgspec.Struct]] = {"clickstream": ClickstreamEvent, "orders": OrderEvent, "rejected": RejectedRecord}


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of one contract, with the rule on users that the types can't say."""
    schema: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(TYPES[name])}
    if name in EVENTS_OF_TOPIC:
        body = schema["$defs"][TYPES[name].__name__]
        body["properties"]["event"]["examples"] = list(EVENTS_OF_TOPIC[name])
        body["anyOf"] = [
            {"required": ["user_id"], "properties": {"user_id": {"type": "string"}}},
            {"required": ["anonymous_id"], "properties": {"anonymous_id": {"type": "string", "minLength": 1}}},
        ]
    return schema


def rendered(name: str) -> str:
    """The file's text. An absent number's default, which JSON can't write, is null, which is accepted too."""
    return json.dumps(json.loads(msgspec.json.encode(schema_of(name))), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in TYPES:
        (FOLDER / f"{name}.json").write_text(rendered(name), encoding="utf-8")


if __name__ == "__main__":
    main()
