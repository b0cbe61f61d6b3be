"""The definitions file: TOML text checked into frozen `Definitions`, or refused with every error it has.

In: a path or text, and the bundled `default.toml` when there is none. Out: `Definitions`, read by the commands and compiled by `pipeline.plan`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Hashable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, get_args

from pipeline.definitions import ANY_EVENT, Definitions, Exclusion, Funnel, Match, Order, Period, Retention, Step, Window
from pipeline.definitions_kpis import link_formulas, read_kpi
from pipeline.definitions_reader import DAY_MS, NO_DEFAULT, DefinitionsError, Problems, Table
from pipeline.definitions_version import funnel_version, kpi_version, retention_version

DEFAULT_FILE: Final = Path(__file__).with_name("default.toml")
MOST_STEPS: Final = 16
MOST_EXCLUSIONS: Final = 32
MOST_PREDICATES: Final = 512
MOST_PERIODS: Final[dict[str, int]] = {"day": 366, "week": 104, "month": 60}
LONGEST_MS: Final = 366 * DAY_MS

__all__ = ["DEFAULT_FILE", "DefinitionsError", "known_keys", "load", "loads"]


def load(path: Path | None = None) -> Definitions:
    """The definitions in `path`, or the bundled ones. Raises DefinitionsError; a file that can't be read is one, too."""
    path = path or DEFAULT_FILE
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise DefinitionsError(
            str(path), [f"can't be read: {error.strerror}; give the path of a definitions file, or none for the default"]
        ) from error
    except UnicodeDecodeError as error:
        raise DefinitionsError(str(path), [f"is not UTF-8 at byte {error.start}; save it as UTF-8"]) from error
    return loads(text, path.name)


def loads(text: str, name: str = "shopstream.toml") -> Definitions:
    """The definitions in `text`; `name` is the file's name in errors. Raises DefinitionsError with all that is wrong."""
    try:
        raw = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise DefinitionsError(name, [f"is not TOML: {error}; strings need quotes, tables look like [[funnel]]"]) from error
    return _definitions(raw, Problems(name))


def known_keys(text: str) -> dict[str, tuple[str, str]]:
    """Keys that can be written beside those in `text`, in the order they are read: what each takes, and its default. Raises DefinitionsError."""
    problems = Problems("text")
    _definitions(tomllib.loads(text, parse_float=Decimal), problems)
    return problems.known


def _definitions(raw: dict[str, Any], problems: Problems) -> Definitions:
    root = Table(raw, "", problems)
    settings = _settings(root)
    funnels = [_funnel(table) for table in root.tables("funnel")]
    retentions = [_retention(table) for table in root.tables("retention")]
    kpis = [read_kpi(table) for table in root.tables("kpi")]
    root.close()
    _unique("funnel", [f.name for f in funnels], problems)
    _unique("retention", [r.name for r in retentions], problems)
    _unique("kpi", [k.name for k in kpis], problems)
    kpis = link_formulas(kpis, problems)
    _count_predicates(settings, funnels, retentions, kpis, problems)
    problems.raise_if_any()
    return replace(
        settings,
        funnels=tuple(replace(f, version=funnel_version(f, settings)) for f in funnels),
        retentions=tuple(replace(r, version=retention_version(r, settings)) for r in retentions),
        kpis=tuple(replace(k, version=kpi_version(k, settings)) for k in kpis),
    )


def _settings(root: Table) -> Definitions:
    default = Definitions()
    shop, time, sessions = root.table("shop"), root.table("time"), root.table("sessions")
    pages = sessions.texts("page_events", default.page.events)
    settings = Definitions(
        time_zone=shop.time_zone("time_zone", default.time_zone),
        currency=shop.currency("currency", default.currency),
        lateness_ms=time.duration("allowed_lateness", default.lateness_ms, 0, LONGEST_MS),
        future_ms=time.duration("max_future", default.future_ms, 0, LONGEST_MS),
        deduplication_ms=time.duration("deduplication_window", default.deduplication_ms, 0, LONGEST_MS),
        session_gap_ms=time.duration("session_gap", default.session_gap_ms, 1000, DAY_MS),
        page=Match(tuple(sorted(set(pages)))),
    )
    for table in (shop, time, sessions):
        table.close()
    return settings


def _funnel(table: Table) -> Funnel:
    order: Order = table.choice("order", get_args(Order), "ordered")
    steps = tuple(_step(step) for step in table.tables("step"))
    if not 2 <= len(steps) <= MOST_STEPS:
        table.problem("step", f"there are {len(steps)} steps; write 2 to {MOST_STEPS} [[funnel.step]] tables")
    for number, step in enumerate(steps, 1):
        if step.optional and order == "any":
            table.problem(f"step[{number}].optional", 'with order = "any" no step can be optional; leave it out, or choose another order')
        elif step.optional and number in (1, len(steps)):
            table.problem(f"step[{number}].optional", "the first and the last step are always required; leave it out")
    exclusions = tuple(_exclusion(x, len(steps)) for x in table.tables("exclusion"))
    if len(exclusions) > MOST_EXCLUSIONS:
        table.problem("exclusion", f"there are {len(exclusions)}; at most {MOST_EXCLUSIONS} are possible: list several events in one")
    funnel = Funnel(
        name=table.name(),
        steps=steps,
        conversion_ms=table.duration("conversion_window", NO_DEFAULT, 1, LONGEST_MS),
        entry_window=table.choice("entry_window", get_args(Window), "1d"),
        order=order,
        breakdown=table.string_field("breakdown"),
        hold_constant=table.string_field("hold_constant"),
        exclusions=exclusions,
    )
    table.close()
    return funnel


def _step(table: Table) -> Step:
    match = table.match()
    name = table.text("name", " or ".join(match.events), "a text; else the event's name")
    step = Step(name, match, table.flag("optional", False))
    table.close()
    return step


def _exclusion(table: Table, steps: int) -> Exclusion:
    after = table.integer("after", 1, 1, max(steps - 1, 1), "the number of a step")
    before = table.integer("before", max(steps, 2), 2, max(steps, 2), "the number of a later step; else the last one")
    if before <= after:
        table.problem("before", f"step {before} does not come after step {after}; `before` must be larger than `after`")
    exclusion = Exclusion(table.match(), after, before)
    table.close()
    return exclusion


def _retention(table: Table) -> Retention:
    period: Period = table.choice("period", get_args(Period), "day")
    retention = Retention(
        name=table.name(),
        cohort=_match_in(table, "cohort", required=True),
        returning=_match_in(table, "return", required=False),
        period=period,
        periods=table.integer("periods", 30, 1, MOST_PERIODS[period], f"a whole number, at most {_listed(MOST_PERIODS)}"),
        breakdown=table.string_field("breakdown"),
        value=table.number_field("value"),
    )
    table.close()
    return retention


def _match_in(table: Table, key: str, required: bool) -> Match:
    if not required and not table.has(key):
        return Match((ANY_EVENT,))
    inner = table.table(key)
    match = inner.match()
    inner.close()
    return match


def _listed(most: dict[str, int]) -> str:
    return ", ".join(f"{n} {unit}s" for unit, n in most.items())


def _unique(kind: str, names: list[str], problems: Problems) -> None:
    first: dict[Hashable, int] = {}
    for number, name in enumerate(names, 1):
        if name and name in first:
            problems.add(f"{kind}[{number}].name", f'"{name}" is already the name of {kind}[{first[name]}]; choose another')
        first.setdefault(name, number)


def _count_predicates(
    settings: Definitions, funnels: list[Funnel], retentions: list[Retention], kpis: list[Any], problems: Problems
) -> None:
    matches = {settings.page}
    for funnel in funnels:
        matches |= {s.match for s in funnel.steps} | {x.match for x in funnel.exclusions}
    for retention in retentions:
        matches |= {retention.cohort, retention.returning}
    matches |= {kpi.match for kpi in kpis if kpi.match}
    if len(matches) > MOST_PREDICATES:
        problems.add("", f"has {len(matches)} different conditions on events; at most {MOST_PREDICATES} are possible: share or remove some")
