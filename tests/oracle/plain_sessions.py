"""Sessions by the definition, one user at a time, in plain Python: what `pipeline.tables.sessions` is compared with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from pipeline.definitions import Kpi
from tests.oracle.kpi_case import ShopEvent
from tests.oracle.plain_first import plain_window_start

BOUNDS = sorted({int(2 ** (i / 8)) for i in range(41 * 8)})


def plain_sessions(events: Iterable[ShopEvent], gap_ms: int) -> list[list[ShopEvent]]:
    by_user: defaultdict[int, list[ShopEvent]] = defaultdict(list)
    for event in events:
        by_user[event.user].append(event)
    sessions = []
    for own in by_user.values():
        own.sort(key=lambda e: (e.ts, e.event_id))
        sessions.append([own[0]])
        for before, event in pairwise(own):
            if event.ts - before.ts > gap_ms:
                sessions.append([])
            sessions[-1].append(event)
    return sessions


def plain_session_kpi(sessions: Iterable[Sequence[ShopEvent]], kpi: Kpi, pages: Sequence[str], zone: str) -> dict[Any, int]:
    out: Counter[Any] = Counter()
    for session in sessions:
        seen = sum(e.is_one_of(pages) for e in session)
        dwell = session[-1].ts - session[0].ts
        value = {"count": 1, "bounces": int(seen == 1), "pages": seen, "dwell": dwell, "dwell_quantile": 1}[kpi.aggregate]
        bucket = next(i for i, bound in enumerate(BOUNDS) if dwell <= bound) if kpi.aggregate == "dwell_quantile" else -1
        for window in kpi.windows:
            start = plain_window_start(session[0].ts, window, zone)
            for dimension in ("", *kpi.dimensions):
                segment = session[0].fields.get(dimension, "") if dimension else ""
                out[kpi.name, window, start, dimension, segment, "", bucket] += value
    return {key: value for key, value in out.items() if value}
