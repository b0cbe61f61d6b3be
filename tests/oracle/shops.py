"""Event sets to count: the seeded shop, and real and rich data beside the repository turned into our events.

Out: `Sent` messages in the order of their times. Called by tests/integration.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import defaultdict
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

from generator import Faults, shop

DATA = Path(__file__).parents[3] / "shared" / "data"
ECOM_NAMES = {
    "product_view": "view_item",
    "home": "page_view",
    "catalog": "page_view",
    "promo_page": "page_view",
    "payment_error": "payment_failed",
}
REES46_NAMES = {"view": "view_item", "cart": "add_to_cart"}


class Sent(NamedTuple):
    topic: str
    key: bytes
    value: bytes
    ts: int


def sent(topic: str, event_id: str, event: str, ts: int, user_id: str, **fields: Any) -> Sent:
    """A message; fields that are None are left out."""
    body = {"event_id": event_id, "event": event, "ts": ts, "user_id": user_id, **{k: v for k, v in fields.items() if v is not None}}
    return Sent(topic, user_id.encode(), json.dumps(body).encode(), ts)


def generated() -> list[Sent]:
    """Three weeks around the night in which Berlin's clocks change."""
    start = int(datetime(2026, 3, 16, tzinfo=UTC).timestamp() * 1000)
    messages = shop(5, 260, 21, start, Faults(late=0, duplicated=0, bad=0))
    return sorted((Sent(m.topic, m.key, m.value, json.loads(m.value)["ts"]) for m in messages), key=lambda m: m.ts)


def file_of(*path: str) -> Path:
    """A file of the data sets; skips the test, with the reason, where they are not."""
    file = DATA.joinpath(*path)
    if not file.exists():
        pytest.skip(f"the data set {'/'.join(path)} is not there: it is looked for in ../shared/data beside the repository")
    return file


def _rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(gzip.decompress(file.read_bytes()).decode())))


def _ms(text: str) -> int:
    return int(datetime.strptime(text, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()) * 1000


def ecom() -> list[Sent]:
    out = []
    for i, row in enumerate(_rows(file_of("ecom", "events.csv.gz"))):
        name = ECOM_NAMES.get(row["event"], row["event"])
        topic = "orders" if name in ("purchase", "payment_failed") else "clickstream"
        order = f"o{row['session_id']}" if topic == "orders" else None
        value = {"value": i % 977 + 0.25} if name == "purchase" else {}
        out.append(
            sent(
                topic, f"ecom-{i}", name, _ms(row["timestamp"]), row["user_id"], session_id=row["session_id"], device=row["platform"],
                channel=row["acquisition_channel"], order_id=order, **value,
            )
        )  # fmt: skip
    return sorted(out, key=lambda m: m.ts)


def rees46() -> list[Sent]:
    """The cut last line has too few columns and is left out; exact duplicates of rows stay, as events of their own."""
    out = []
    for i, row in enumerate(_rows(file_of("rees46", "events.csv.gz"))):
        if None in row.values() or not row["user_session"]:
            continue
        ts, price = _ms(row["event_time"].removesuffix(" UTC")), float(row["price"])
        item = {"item_id": row["product_id"], "item_category": row["category_code"] or None, "session_id": row["user_session"]}
        if row["event_type"] == "purchase":
            out.append(sent("orders", f"rees-{i}", "purchase", ts, row["user_id"], order_id=f"o{i}", value=price, **item))
        else:
            out.append(sent("clickstream", f"rees-{i}", REES46_NAMES[row["event_type"]], ts, row["user_id"], price=price, **item))
    return sorted(out, key=lambda m: m.ts)


def helpdesk() -> list[Sent]:
    """A ticket is the user, who handles it the channel; its activities are the events."""
    out = [
        sent("clickstream", f"desk-{i}", row["concept:name"], _ms(row["time:timestamp"].removesuffix("+00:00")), row["case:concept:name"], channel=row["org:resource"])
        for i, row in enumerate(_rows(file_of("helpdesk", "tickets.csv.gz")))
    ]  # fmt: skip
    return sorted(out, key=lambda m: m.ts)


def facts(name: str) -> dict[str, Any]:
    """The figures that came with a set, computed by others."""
    return dict(json.loads(file_of(name, "facts.json").read_text()))


def online_retail() -> list[Sent]:
    """An invoice is a purchase, a C-invoice a refund; customers only. Lines of one invoice may differ by a minute: the first counts."""
    invoices: dict[tuple[str, str], list[tuple[int, Decimal]]] = defaultdict(list)
    table = pq.read_table(file_of("online_retail", "transactions.parquet"))
    names = {name.lower().replace(" ", "").replace("_", ""): name for name in table.column_names}
    columns = [table.column(names[n]).to_pylist() for n in ("invoiceno", "customerid", "invoicedate", "quantity", "unitprice")]
    for invoice, customer, when, quantity, price in zip(*columns, strict=True):
        if customer is None or customer != customer:
            continue
        at = when if isinstance(when, datetime) else datetime.fromisoformat(str(when))
        ms = int(at.replace(tzinfo=UTC).timestamp()) * 1000
        invoices[str(invoice), str(int(float(customer)))].append((ms, Decimal(str(price)) * abs(int(quantity))))
    out = []
    for (invoice, customer), lines in invoices.items():
        total = float(sum(amount for _, amount in lines).quantize(Decimal("0.0001")))
        cancelled = invoice.startswith("C")
        money = {"refund_value": total} if cancelled else {"value": total}
        name, order = ("refund", invoice[1:]) if cancelled else ("purchase", invoice)
        out.append(
            sent("orders", f"uci-{invoice}-{customer}", name, min(ts for ts, _ in lines), customer, order_id=order, currency="GBP", **money)
        )
    return sorted(out, key=lambda m: m.ts)
