"""CPU time of decode alone: 255-byte events of both topics, 8 predicates, 3 string fields, 2 numbers. `python -m benchmarks.decode`."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import msgspec

from pipeline.columns import MONEY_SCALE, Strings
from pipeline.decode import Decoder
from pipeline.definitions import Definitions, Filter, Match
from pipeline.plan import Plan
from schemas.events import EVENTS_OF_TOPIC

BATCH = 20_000
ROUNDS = 9
BYTES = 255


@dataclass(frozen=True, slots=True)
class RawRecord:
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp: int
    headers: tuple[tuple[str, bytes], ...] = ()


def example_plan() -> Plan:
    events = ("page_view", "view_item", "add_to_cart", "purchase", "refund", "session_start")
    predicates = [Match((name,)) for name in events]
    predicates += [
        Match(("view_item",), (Filter("device", "eq", ("mobile",)),)),
        Match(("purchase",), (Filter("value", "gte", (100 * MONEY_SCALE,)),)),
    ]
    return Plan(Definitions(), tuple(predicates), ("channel", "device", "item_category"), ("value", "price"))


def example_records(topic: str, n: int) -> list[RawRecord]:
    """Events of 100,000 users, a skewed share each."""
    rng = random.Random(7)
    users = rng.choices(range(100_000), [1 / (i + 1) ** 0.8 for i in range(100_000)], k=n)
    records = []
    for i in range(n):
        event = {
            "event_id": f"{rng.getrandbits(128):032x}",
            "event": rng.choice(EVENTS_OF_TOPIC[topic][:12]),
            "ts": 1_760_000_000_000 + i * 7,
        }
        event |= {"user_id": f"user-{users[i]}", "session_id": f"s{users[i]}", "channel": rng.choice(("seo", "cpc", "mail", "direct"))}
        event |= {"device": rng.choice(("mobile", "desktop"))}
        if topic == "orders":
            event |= {"currency": "EUR", "order_id": f"o-{rng.getrandbits(40)}", "value": rng.randrange(100, 50_000) / 100}
        else:
            event |= {
                "item_id": f"i{rng.randrange(5000)}",
                "item_category": f"c{rng.randrange(40)}",
                "price": rng.randrange(100, 50_000) / 100,
            }
        event |= {"page": "/p"}
        event["page"] += "x" * max(0, BYTES - len(msgspec.json.encode(event)))
        records.append(RawRecord(i, event["user_id"].encode(), msgspec.json.encode(event), 1_760_000_000_000 + i * 7))
    return records


def main() -> None:
    runs = [("clickstream", example_records("clickstream", BATCH * 9 // 10)), ("orders", example_records("orders", BATCH // 10))]
    for chunk in (BATCH, 2000):
        decoder = Decoder(example_plan(), Strings(), 0, 1)
        best = float("inf")
        for _ in range(ROUNDS):
            start = time.process_time()
            for topic, records in runs:
                for at in range(0, len(records), chunk):
                    decoder.decode(topic, records[at : at + chunk])
            best = min(best, time.process_time() - start)
        print(f"runs of up to {chunk}: {best / BATCH * 1e6:.2f} CPU µs an event")


if __name__ == "__main__":
    main()
