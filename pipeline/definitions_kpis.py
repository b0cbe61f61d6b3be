"""The [[kpi]] tables of a definitions file: one reader per source, and formulas checked against the KPIs they name.

In: `Table`s. Out: `Kpi`s. Called by `pipeline.definitions_file`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Final, get_args

from pipeline.definitions import Kpi, Window
from pipeline.definitions_reader import DAY_MS, NO_DEFAULT, Problems, Table, suggestion
from schemas.events import MONEY_FIELDS

AGGREGATES: Final[dict[str, tuple[str, ...]]] = {
    "events": ("count", "sum", "users"),
    "sessions": ("count", "bounces", "pages", "dwell", "dwell_quantile"),
    "first": ("users",),
    "repeat": ("users",),
    "orders": ("created", "cancelled", "paid_of_created", "paid", "refunded_of_paid"),
}
SOURCES: Final = (*AGGREGATES, "formula")
DEFAULT_WINDOWS: Final = ("1m", "1h", "1d")
MOST_DIMENSIONS: Final = 16
_NAME: Final = re.compile(r"\w[\w.]{0,127}")
_FORMULA: Final = re.compile(r"\s*(\w[\w.]*)\s*([-+/])\s*(\w[\w.]*)\s*")


def read_kpi(table: Table) -> Kpi:
    """One KPI; a formula's dimensions and windows may still be open (see `link_formulas`)."""
    name = table.name()
    if name and not _NAME.fullmatch(name):
        table.problem("name", f'"{name}" can\'t be named in a formula; use letters, digits, "_" and "."')
    formula = table.has("formula")
    source = table.choice("source", SOURCES, "formula" if formula else "events")
    if formula and source != "formula":
        table.problem("formula", f'a KPI of source "{source}" has none; remove `source` or `formula`')
    kpi = _formula(table, name) if source == "formula" else _stored(table, name, source)
    table.close()
    return kpi


def _stored(table: Table, name: str, source: Any) -> Kpi:
    aggregates = AGGREGATES[source]
    aggregate = table.choice("aggregate", aggregates, aggregates[0] if len(aggregates) == 1 else None)
    matching = source in ("events", "first", "repeat")
    match = table.match() if matching else None
    summed = None
    if aggregate == "sum":
        summed = table.number_field("field")
        if not table.has("field"):
            table.problem("field", 'is missing; a sum needs one, like field = "value"')
    understood = (
        len(aggregates) == 1 or table.raw.get("aggregate") in aggregates
    )  # else `field` may be right and `aggregate` is what is wrong
    _refuse(table, "field", understood and aggregate != "sum", 'only aggregate = "sum" of source "events" has one')
    _refuse(table, "within", source != "repeat", 'only source "repeat" has one')
    _refuse(table, "quantile", understood and aggregate != "dwell_quantile", 'only aggregate = "dwell_quantile" has one')
    for key in ("event", "events", "where"):
        _refuse(table, key, not matching, f'source "{source}" has its own events')
    return Kpi(
        name=name,
        source=source,
        aggregate=aggregate,
        match=match,
        field=summed,
        within_ms=table.duration("within", NO_DEFAULT, 1, 366 * DAY_MS) if source == "repeat" else 0,
        quantile=table.share("quantile") if aggregate == "dwell_quantile" else 0.0,
        dimensions=_dimensions(table),
        windows=_windows(table, DEFAULT_WINDOWS),
        money=summed in MONEY_FIELDS,
    )


def _refuse(table: Table, key: str, refused: bool, why: str) -> None:
    if not table.has(key):
        return
    table.asked.add(key)
    if refused:
        table.problem(key, f"has no meaning here: {why}; remove it")


def _formula(table: Table, name: str) -> Kpi:
    for key in ("aggregate", "event", "events", "where", "field", "within", "quantile"):
        _refuse(table, key, True, "a formula only names two other KPIs")
    text = table.text("formula", what="two KPIs' names and one of + - / between them")
    parts = _FORMULA.fullmatch(text)
    if text and parts is None:
        table.problem("formula", f'"{text}" is no formula; write two KPIs and one of + - / like "gmv / buyers"')
    left, operator, right = parts.groups() if parts else ("", "/", "")
    windows = _windows(table, ()) if table.has("windows") else ()
    table.asked.add("windows")
    return Kpi(name, "formula", left=left, operator=operator, right=right, dimensions=_dimensions(table), windows=windows)  # type: ignore[arg-type]


def _dimensions(table: Table) -> tuple[str, ...]:
    dimensions = table.string_fields("dimensions")
    if len(dimensions) > MOST_DIMENSIONS:
        table.problem("dimensions", f"there are {len(dimensions)}; at most {MOST_DIMENSIONS} are possible")
    return dimensions


def _windows(table: Table, default: tuple[str, ...]) -> Any:
    known: tuple[str, ...] = get_args(Window)
    windows = table.texts("windows", default, f"a list of {', '.join(known)}")
    for window in windows:
        if window not in known:
            table.problem("windows", f'"{window}" is no window; {suggestion(window, known)}')
    if len(set(windows)) < len(windows):
        table.problem("windows", "a window comes twice; name each once")
    return tuple(w for w in known if w in windows)


def link_formulas(kpis: list[Kpi], problems: Problems) -> list[Kpi]:
    """Formulas with the dimensions, windows and money of the KPIs they name; notes those that can't be computed."""
    stored = {kpi.name: kpi for kpi in kpis if kpi.source != "formula"}
    formulas = {kpi.name for kpi in kpis if kpi.source == "formula"}
    return [_link(kpi, f"kpi[{i}]", stored, formulas, problems) if kpi.source == "formula" else kpi for i, kpi in enumerate(kpis, 1)]


def _link(kpi: Kpi, path: str, stored: dict[str, Kpi], formulas: set[str], problems: Problems) -> Kpi:
    sides = []
    for name in (kpi.left, kpi.right):
        if name in stored:
            sides.append(stored[name])
        elif name in formulas:
            problems.add(
                f"{path}.formula", f'"{name}" is a formula, too; a formula may name only KPIs that are counted: {", ".join(sorted(stored))}'
            )
        elif name:
            problems.add(f"{path}.formula", f'there is no KPI "{name}"; {suggestion(name, stored)}')
    if len(sides) < 2:
        return kpi
    left, right = sides
    if set(left.dimensions) != set(right.dimensions):
        problems.add(
            f"{path}.formula",
            f'"{left.name}" has the dimensions {_listed(left.dimensions)} and "{right.name}" {_listed(right.dimensions)}; give both the same',
        )
    if left.windows != right.windows:
        problems.add(
            f"{path}.formula",
            f'"{left.name}" has the windows {_listed(left.windows)} and "{right.name}" {_listed(right.windows)}; give both the same',
        )
    for key, own, theirs in (("dimensions", kpi.dimensions, left.dimensions), ("windows", kpi.windows, left.windows)):
        if own and set(own) != set(theirs):
            problems.add(f"{path}.{key}", f"a formula has those of its KPIs, {_listed(theirs)}; remove the key")
    if "quantile" in left.aggregate + right.aggregate:
        problems.add(f"{path}.formula", "a quantile can't be used in a formula; name counts or sums")
    if left.money != right.money and (kpi.operator != "/" or right.money):
        what = "divided by money" if kpi.operator == "/" else "added to or taken from what is no money"
        problems.add(
            f"{path}.formula",
            f'"{left.name}" {kpi.operator} "{right.name}": {_unit(left)} can\'t be {what}; name two of a kind, or money / count',
        )
    money = left.money and not (kpi.operator == "/" and right.money)
    return replace(kpi, dimensions=left.dimensions, windows=left.windows, money=money)


def _unit(kpi: Kpi) -> str:
    return "money" if kpi.money else "a count"


def _listed(names: tuple[str, ...]) -> str:
    return f"[{', '.join(names)}]"
