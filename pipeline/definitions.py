"""Funnels, retentions and KPIs as data: the frozen values that `shopstream.toml` is checked into.

In: a TOML file (`load`). Out: `Definitions`, which `pipeline.plan.compile_plan` turns into what the kernels read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Order = Literal["ordered", "strict", "any"]
Period = Literal["day", "week", "month"]
Window = Literal["1m", "1h", "1d", "1w", "1mo"]
Op = Literal["eq", "ne", "gt", "gte", "lt", "lte"]
ANY_EVENT = "*"
ORDER_HORIZON_MS = 180 * 86_400_000
"""A later event of an order decides nothing after so long."""
LONGEST_SESSION_MS = 86_400_000
"""Sessions have no bound; `final` in reports is right for those that are at most so long."""


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition on one field. Strings: `eq` (any of `values`) and `ne` (none of them). Numbers: all, in 1/MONEY_SCALE. An absent field fails every filter but `ne`."""

    field: str
    op: Op
    values: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """Which events: any of `events` (or ANY_EVENT for all), every filter holding. Equal matches share one predicate."""

    events: tuple[str, ...]
    where: tuple[Filter, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    match: Match
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Kills an attempt that has step `after` (1-based) at an earlier time and not yet step `before` at an earlier time."""

    match: Match
    after: int
    before: int


@dataclass(frozen=True, slots=True)
class Funnel:
    name: str
    steps: tuple[Step, ...]  # 2 to 16, the first and the last required
    conversion_ms: int
    entry_window: Window
    order: Order = "ordered"
    breakdown: str | None = None
    hold_constant: str | None = None
    exclusions: tuple[Exclusion, ...] = ()
    version: str = ""  # hash of everything above and of the time zone


@dataclass(frozen=True, slots=True)
class Retention:
    name: str
    cohort: Match
    returning: Match
    period: Period
    periods: int  # counted after period 0
    breakdown: str | None = None
    value: str | None = None  # number field summed over the return events of a period
    version: str = ""


@dataclass(frozen=True, slots=True)
class Kpi:
    """One number of the board.

    source     aggregate
    events     count | sum (of `field`) | users (distinct); window of the event; dimensions from the event
    sessions   count | bounces | pages | dwell (ms) | dwell_quantile (of `quantile`); window and dimensions of the session's first event
    first      users, in the window of their first matching event ever; dimensions from that event
    repeat     users whose second matching event came within `within_ms` of the first, in the window of the first
    orders     created | cancelled (distinct orders, window of that event); paid_of_created (window of creation);
               paid | refunded_of_paid (window of payment)
    formula    `left` (operator) `right`, two other KPIs with the same dimensions, computed when read: never stored
    """

    name: str
    source: Literal["events", "sessions", "first", "repeat", "orders", "formula"]
    aggregate: str = ""
    match: Match | None = None
    field: str | None = None
    within_ms: int = 0
    quantile: float = 0.0
    left: str = ""
    operator: Literal["", "+", "-", "/"] = ""
    right: str = ""
    dimensions: tuple[str, ...] = ()
    windows: tuple[Window, ...] = ("1m", "1h", "1d")
    money: bool = False  # its values are in 1/MONEY_SCALE of a currency and are kept a currency at a time
    version: str = ""

    @property
    def follows_ms(self) -> int:
        """So long after the end of its window an event may still count in it."""
        if self.source == "repeat":
            return self.within_ms
        if self.source == "sessions":
            return LONGEST_SESSION_MS
        return ORDER_HORIZON_MS if self.aggregate in ("paid_of_created", "refunded_of_paid") else 0


@dataclass(frozen=True, slots=True)
class Definitions:
    funnels: tuple[Funnel, ...] = ()
    retentions: tuple[Retention, ...] = ()
    kpis: tuple[Kpi, ...] = ()
    time_zone: str = "UTC"
    currency: str = "EUR"
    lateness_ms: int = 86_400_000
    future_ms: int = 300_000
    deduplication_ms: int = 600_000
    session_gap_ms: int = 1_800_000
    page: Match = Match(("page_view",))  # what counts as a page of a session
