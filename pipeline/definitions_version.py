"""A definition's version: a hash of all that its numbers depend on. Equal versions can share state; a new one starts empty.

Called by `pipeline.definitions_file`; kept apart so that a change here is seen as what it is: every shop counts from the start again.
A rebuild writes beside the rows in force, so each revision but the first has versions of its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from pipeline.definitions import Definitions, Funnel, Kpi, Retention


def funnel_version(funnel: Funnel, settings: Definitions) -> str:
    return _hash(funnel, time_zone=settings.time_zone)


def retention_version(retention: Retention, settings: Definitions) -> str:
    return _hash(retention, time_zone=settings.time_zone)


def kpi_version(kpi: Kpi, settings: Definitions) -> str:
    """The session rules count for KPIs of sessions, the shop's currency (that of events without one) for money."""
    more: dict[str, Any] = {"time_zone": settings.time_zone}
    if kpi.source == "sessions":
        more |= {"session_gap_ms": settings.session_gap_ms, "page": asdict(settings.page)}
    if kpi.money:
        more["currency"] = settings.currency
    return _hash(kpi, **more)


def at_revision(definitions: Definitions, revision: int) -> Definitions:
    """The same definitions with the versions of a revision; those of revision 0 are the hashes above."""
    if revision == 0:
        return definitions
    return replace(
        definitions,
        funnels=tuple(replace(funnel, version=version_at(funnel.version, revision)) for funnel in definitions.funnels),
        retentions=tuple(replace(retention, version=version_at(retention.version, revision)) for retention in definitions.retentions),
        kpis=tuple(replace(kpi, version=version_at(kpi.version, revision)) for kpi in definitions.kpis),
    )


def version_at(version: str, revision: int) -> str:
    """A version of revision 0 as it is called in another one."""
    return hashlib.sha256(f"{version} {revision}".encode()).hexdigest()[:12] if revision else version


def _hash(definition: Any, **more: Any) -> str:
    content = {k: v for k, v in asdict(definition).items() if k != "version"} | {"kind": type(definition).__name__} | more
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()[:12]
