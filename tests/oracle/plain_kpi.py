"""Event KPIs by the definition, in plain Python: what `pipeline.tables.kpi` is compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from pipeline.definitions import Kpi
from tests.oracle.kpi_case import ShopEvent
from tests.oracle.plain_first import plain_window_start


def plain_kpi(events: Iterable[ShopEvent], kpi: Kpi, zone: str) -> dict[Any, int]:
    matching: defaultdict[Any, list[ShopEvent]] = defaultdict(list)
    for event in events:
        if kpi.match is not None and not event.is_one_of(kpi.match.events):
            continue
        for window in kpi.windows:
            start = plain_window_start(event.ts, window, zone)
            for dimension in ("", *kpi.dimensions):
                value = event.fields.get(dimension, "") if dimension else ""
                matching[kpi.name, window, start, dimension, value, event.currency if kpi.money else "", -1].append(event)
    out = {}
    for key, own in matching.items():
        if kpi.aggregate == "users":
            out[key] = len({e.user for e in own})
        elif kpi.aggregate == "sum":
            out[key] = sum(e.numbers.get(kpi.field or "", 0) for e in own)
        else:
            out[key] = len(own)
    return {key: value for key, value in out.items() if value}
