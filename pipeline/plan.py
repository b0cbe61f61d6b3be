"""Definitions compiled for the kernels: predicates numbered, fields and numbers given columns.

In: `Definitions`. Out: `Plan`, read by `decode` (which columns, which bits) and by every table.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.definitions import Definitions, Match

ORDER_EVENTS: tuple[Match, ...] = tuple(Match((name,)) for name in ("order_created", "purchase", "order_cancelled", "refund"))
"""The predicates that KPIs over orders need: created, paid, cancelled, refunded."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one set of definitions needs of an event, and where it is found in `Columns`."""

    definitions: Definitions
    predicates: tuple[Match, ...]
    fields: tuple[str, ...]
    numbers: tuple[str, ...]

    @property
    def words(self) -> int:
        """Columns of `Columns.bits`."""
        return (len(self.predicates) + 63) // 64 or 1

    def predicate(self, match: Match) -> int:
        return self.predicates.index(match)

    def field(self, name: str) -> int:
        return self.fields.index(name)

    def number(self, name: str) -> int:
        return self.numbers.index(name)


def compile_plan(definitions: Definitions) -> Plan:
    """Number every distinct `Match`, string field (breakdown, hold constant, dimensions) and number (sums) the definitions use."""
    matches: dict[Match, None] = {definitions.page: None}
    fields: dict[str, None] = {}
    numbers: dict[str, None] = {}
    for funnel in definitions.funnels:
        matches |= dict.fromkeys([s.match for s in funnel.steps] + [e.match for e in funnel.exclusions])
        fields |= dict.fromkeys(f for f in (funnel.breakdown, funnel.hold_constant) if f)
    for retention in definitions.retentions:
        matches |= dict.fromkeys((retention.cohort, retention.returning))
        fields |= dict.fromkeys(f for f in (retention.breakdown,) if f)
        numbers |= dict.fromkeys(f for f in (retention.value,) if f)
    for kpi in definitions.kpis:
        matches |= dict.fromkeys(m for m in (kpi.match,) if m)
        if kpi.source == "orders":
            matches |= dict.fromkeys(ORDER_EVENTS)
        fields |= dict.fromkeys(kpi.dimensions)
        numbers |= dict.fromkeys(f for f in (kpi.field,) if f)
    return Plan(definitions, tuple(matches), tuple(fields), tuple(numbers))
