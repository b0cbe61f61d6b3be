"""Reading one TOML table key by key, noting everything that is wrong instead of stopping at the first.

In: the dictionaries that `tomllib` makes. Out: checked values; `Problems` gathers what is wrong. Called by `pipeline.definitions_file`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, Final
from zoneinfo import ZoneInfo, available_timezones

from pipeline.columns import MONEY_SCALE
from pipeline.definitions import ANY_EVENT, Filter, Match, Op
from schemas.events import NUMBER_FIELDS, NUMBER_LIMIT, STRING_FIELDS

DAY_MS: Final = 86_400_000
UNITS_MS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": DAY_MS, "w": 7 * DAY_MS}
NO_DEFAULT: Final = -1
LONGEST_NAME: Final = 128
REQUIRED: Final = "required"
_DURATION: Final = re.compile(r"([0-9]{1,12})(ms|s|m|h|d|w)")
_NUMBERS: Final = re.compile(r"\[\d+\]")
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_STRING_OPS: Final = ("eq", "ne")
_NUMBER_OPS: Final[tuple[Op, ...]] = ("eq", "ne", "gt", "gte", "lt", "lte")


class DefinitionsError(ValueError):
    """A definitions file that can't be used; `errors` are all of them, each with its key, what is wrong and the remedy."""

    def __init__(self, name: str, errors: list[str]) -> None:
        self.name = name
        self.errors = errors
        super().__init__("\n".join(f"{name}: {error}" for error in errors))


@dataclass
class Problems:
    """What is wrong with one file."""

    name: str
    errors: list[str] = field(default_factory=list)
    known: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Every key that was asked for, without numbers: (what it takes, default as the file would write it; '' where there is none)."""

    def add(self, key: str, text: str) -> None:
        self.errors.append(f"{key}: {text}" if key else text)

    def raise_if_any(self) -> None:
        if self.errors:
            raise DefinitionsError(self.name, self.errors)


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean "x"?`, or all that is known when nothing is near."""
    known = sorted(known)
    near = get_close_matches(word, known, 1, 0.6)
    return f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}"


def shown_ms(ms: int) -> str:
    """A duration as the file writes it."""
    unit = next(u for u in ("d", "h", "m", "s", "ms") if ms % UNITS_MS[u] == 0)
    return f"{ms // UNITS_MS[unit]}{unit}"


class Table:
    """One TOML table at `path`. Reading a key that is missing or wrong notes a problem and gives a stand-in; `close` notes unknown keys."""

    def __init__(self, raw: dict[str, Any], path: str, problems: Problems) -> None:
        self.raw = raw
        self.path = path
        self.problems = problems
        self.asked: set[str] = set()

    def problem(self, key: str, text: str) -> None:
        self.problems.add(f"{self.path}.{key}".strip("."), text)

    def has(self, key: str) -> bool:
        return key in self.raw

    def close(self) -> None:
        for key in self.raw.keys() - self.asked:
            self.problem(key, f"unknown key; {suggestion(key, self.asked)}")

    def _get(self, key: str, what: str, default: str = "") -> Any:
        self.asked.add(key)
        self.problems.known.setdefault(_NUMBERS.sub("", f"{self.path}.{key}").strip("."), (what, default))
        return self.raw.get(key)

    def _wrong(self, key: str, wanted: str, value: Any) -> None:
        self.problem(key, f"{_shown(value)} is not {wanted}")

    # --- tables ---------------------------------------------------------------------------------------------------------

    def table(self, key: str) -> Table:
        """The table under `key`; an empty one when it is absent."""
        value = self._get(key, "a table")
        if value is not None and not isinstance(value, dict):
            self._wrong(key, "a table; write [section] or { key = value }", value)
        return Table(value if isinstance(value, dict) else {}, f"{self.path}.{key}".strip("."), self.problems)

    def tables(self, key: str) -> list[Table]:
        """The array of tables under `key`; paths count from 1."""
        value = self._get(key, "an array of tables")
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            self.problem(key, f"must be an array of tables; write [[{self.path.split('[')[0]}.{key}]]".replace("[[.", "[["))
            return []
        return [Table(v, f"{self.path}.{key}[{i}]".strip("."), self.problems) for i, v in enumerate(value, 1)]

    # --- values ---------------------------------------------------------------------------------------------------------

    def text(self, key: str, default: str | None = None, what: str = "a text") -> str:
        value = self._get(key, what, REQUIRED if default is None else _quoted(default))
        if value is None:
            if default is None:
                self.problem(key, f'is missing; add {key} = "…"')
            return default or ""
        if not isinstance(value, str) or not value:
            self._wrong(key, "a text; put it in quotes", value)
            return default or ""
        return value

    def texts(self, key: str, default: Sequence[str], what: str = "a list of texts") -> tuple[str, ...]:
        value = self._get(key, what, f"[{', '.join(map(_quoted, default))}]" if default else "")
        if value is None:
            return tuple(default)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not values or not all(isinstance(v, str) and v for v in values):
            self._wrong(key, 'a list of texts; write ["a", "b"]', value)
            return tuple(default)
        return tuple(values)

    def name(self) -> str:
        name = self.text("name", what=f"at most {LONGEST_NAME} printable characters, each name once")
        if len(name) > LONGEST_NAME or not name.isprintable():
            self._wrong("name", f"a name; use at most {LONGEST_NAME} printable characters", name)
        return name

    def choice(self, key: str, known: Sequence[str], default: str | None = None) -> Any:
        value = self.text(key, default, f"one of {', '.join(known)}")
        if value and value not in known:
            self.problem(key, f'"{value}" is unknown; {suggestion(value, known)}')
        return value if value in known else default or known[0]

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, "true or false", str(default).lower())
        if value is not None and not isinstance(value, bool):
            self._wrong(key, "true or false", value)
            return default
        return default if value is None else value

    def integer(self, key: str, default: int, least: int, most: int, what: str = "") -> int:
        value = self._get(key, what or f"a whole number from {least} to {most}", str(default))
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self._wrong(key, f"a whole number from {least} to {most}", value)
            return default
        return value

    def share(self, key: str) -> float:
        """A number above 0 and below 1."""
        value = self._get(key, "a number between 0 and 1", REQUIRED)
        if value is None:
            self.problem(key, f"is missing; add {key} = 0.5 for the median")
        elif isinstance(value, bool) or not isinstance(value, int | Decimal) or not 0 < value < 1:
            self._wrong(key, "a number between 0 and 1; write 0.9 for the 90th percentile", value)
        else:
            return float(value)
        return 0.5

    def duration(self, key: str, default: int, least: int, most: int) -> int:
        """Milliseconds of "90s", "24h"…; without a default (NO_DEFAULT) the key is required."""
        value = self._get(
            key, f"a duration, {shown_ms(least)} to {shown_ms(most)}", REQUIRED if default == NO_DEFAULT else _quoted(shown_ms(default))
        )
        if value is None:
            if default == NO_DEFAULT:
                self.problem(key, f'is missing; add {key} = "1d"')
            return default
        parsed = _DURATION.fullmatch(value) if isinstance(value, str) else None
        if parsed is None:
            self._wrong(key, f'a duration; write a number and a unit ({", ".join(UNITS_MS)}) like "30m"', value)
            return default
        ms = int(parsed[1]) * UNITS_MS[parsed[2]]
        if not least <= ms <= most:
            self.problem(key, f'"{value}" is out of range; allowed is {shown_ms(least)} to {shown_ms(most)}')
            return default
        return ms

    def time_zone(self, key: str, default: str) -> str:
        value = self.text(key, default, "an IANA time zone")
        try:
            ZoneInfo(value)
        except (KeyError, OSError, ValueError):  # not known; a folder of the database; no such path
            pass
        else:
            return value
        near = get_close_matches(value, available_timezones(), 1, 0.6)
        self.problem(
            key, f'"{value}" is no IANA time zone; ' + (f'did you mean "{near[0]}"?' if near else 'write one like "Asia/Shanghai"')
        )
        return default

    def currency(self, key: str, default: str) -> str:
        value = self.text(key, default, "an ISO 4217 code")
        if not _CURRENCY.fullmatch(value):
            self.problem(key, f'"{value}" is no currency code; write three capital letters (ISO 4217) like "EUR"')
            return default
        return value

    # --- fields and conditions ------------------------------------------------------------------------------------------

    def string_field(self, key: str) -> str | None:
        return self._field(key, "a text field of the event", STRING_FIELDS, NUMBER_FIELDS, "a number, a text field is needed here")

    def number_field(self, key: str) -> str | None:
        return self._field(key, "a number field of the event", NUMBER_FIELDS, STRING_FIELDS, "a text, a number field is needed here")

    def _field(self, key: str, what: str, fields: Iterable[str], others: Iterable[str], why_not: str) -> str | None:
        value = self._get(key, what)
        if value is None:
            return None
        if not isinstance(value, str):
            self._wrong(key, "the name of an event's field; put it in quotes", value)
        elif value in others:
            self.problem(key, f'"{value}" is {why_not}; use one of {", ".join(sorted(fields))}')
        elif value not in fields:
            self.problem(key, f'"{value}" is no field of an event; {suggestion(value, fields)}')
        else:
            return value
        return None

    def string_fields(self, key: str) -> tuple[str, ...]:
        """Names of distinct text fields."""
        names = self.texts(key, (), "a list of text fields of the event")
        for name in names:
            if name not in STRING_FIELDS:
                what = (
                    "a number, a text field is needed here"
                    if name in NUMBER_FIELDS
                    else f"no field of an event; {suggestion(name, STRING_FIELDS)}"
                )
                self.problem(key, f'"{name}" is {what}')
        if len(set(names)) < len(names):
            self.problem(key, "a field comes twice; name each once")
        return tuple(dict.fromkeys(n for n in names if n in STRING_FIELDS))

    def match(self) -> Match:
        """`event` or `events`, and `where`, in one canonical order, so that equal conditions are equal values."""
        if self.has("event") and self.has("events"):
            self.problem("events", "`event` is there, too; keep one of them")
        if not self.has("event") and not self.has("events"):
            self.asked |= {"event", "events"}
            self.problem("event", 'is missing; add event = "page_view", or events = ["…", "…"]')
            events: tuple[str, ...] = (ANY_EVENT,)
        elif self.has("events"):
            self.asked.add("event")
            events = self.texts("events", (), "a list of events' names, instead of `event`") or (ANY_EVENT,)
        else:
            self.asked.add("events")
            events = (self.text("event", what='an event\'s name, or "*" for every event; or `events`, a list of names'),)
        if ANY_EVENT in events and len(events) > 1:
            self.problem("events", '"*" already means every event; leave the others out')
        return Match(tuple(sorted(set(events))), self._where())

    def _where(self) -> tuple[Filter, ...]:
        self._get("where", "conditions on fields of the event")
        where = self.table("where")
        filters: list[Filter] = []
        for name, condition in where.raw.items():
            if name in STRING_FIELDS:
                filters += _string_filters(where, name, condition)
            elif name in NUMBER_FIELDS:
                filters += _number_filters(where, name, condition)
            else:
                where.problem(name, f"is no field of an event; {suggestion(name, {*STRING_FIELDS, *NUMBER_FIELDS})}")
        return tuple(sorted(filters, key=lambda f: (f.field, f.op)))


def _string_filters(where: Table, name: str, condition: Any) -> list[Filter]:
    filters = []
    for op, value in (condition if isinstance(condition, dict) else {"eq": condition}).items():
        values = value if isinstance(value, list) else [value]
        if op not in _STRING_OPS:
            hint = f'{name} is a text, which has only "eq" and "ne"' if op in _NUMBER_OPS else suggestion(op, _STRING_OPS)
            where.problem(f"{name}.{op}", f"can't be used; {hint}")
        elif not values or not all(isinstance(v, str) and v for v in values):
            where.problem(
                name, f'{_shown(value)} is not a text or a list of texts, and {name} is a text field; write {name} = "…" or ["…", "…"]'
            )
        else:
            filters.append(Filter(name, "eq" if op == "eq" else "ne", tuple(sorted(set(values)))))
    if isinstance(condition, dict) and not condition:
        where.problem(name, 'has no condition; write { ne = "…" }')
    return filters


def _number_filters(where: Table, name: str, condition: Any) -> list[Filter]:
    filters: list[Filter] = []
    for op, value in (condition if isinstance(condition, dict) else {"eq": condition}).items():
        if op not in _NUMBER_OPS:
            where.problem(f"{name}.{op}", f"can't be used; {suggestion(op, _NUMBER_OPS)}")
        elif isinstance(value, bool) or not isinstance(value, int | Decimal):
            where.problem(name, f"{_shown(value)} is not a number, and {name} is a number field; write {name} = 10 or {{ gte = 10 }}")
        elif not Decimal(value).is_finite() or not 0 <= value <= NUMBER_LIMIT or Decimal(value) * MONEY_SCALE % 1:
            where.problem(name, f"{_shown(value)} is out of range; write a number from 0 to {NUMBER_LIMIT} with at most four decimals")
        else:
            filters.append(Filter(name, op, (int(Decimal(value) * MONEY_SCALE),)))
    if isinstance(condition, dict) and not condition:
        where.problem(name, "has no condition; write { gte = 10 }")
    return filters


def _quoted(text: str) -> str:
    return f'"{text}"'


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
