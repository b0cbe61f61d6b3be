"""Order KPIs by the definition, one order at a time, in plain Python: what `pipeline.tables.orders` is compared with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from pipeline.definitions import Kpi
from tests.oracle.kpi_case import ShopEvent
from tests.oracle.plain_first import plain_window_start

COUNTED_BY = {
    "created": "order_created",
    "cancelled": "order_cancelled",
    "paid_of_created": "order_created",
    "paid": "purchase",
    "refunded_of_paid": "purchase",
}
ALSO = {"paid_of_created": "purchase", "refunded_of_paid": "refund"}


def plain_orders(events: Iterable[ShopEvent], kpi: Kpi, zone: str) -> dict[Any, int]:
    orders: defaultdict[int, list[ShopEvent]] = defaultdict(list)
    for event in events:
        if event.order:
            orders[event.order].append(event)
    out: Counter[Any] = Counter()
    for own in orders.values():
        deciding = sorted((e for e in own if e.name == COUNTED_BY[kpi.aggregate]), key=lambda e: (e.ts, e.event_id))
        also = ALSO.get(kpi.aggregate)
        if not deciding or (also and all(e.name != also for e in own)):
            continue
        for window in kpi.windows:
            start = plain_window_start(deciding[0].ts, window, zone)
            for dimension in ("", *kpi.dimensions):
                out[kpi.name, window, start, dimension, deciding[0].fields.get(dimension, "") if dimension else "", "", -1] += 1
    return dict(out)
