"""Numbers, times and foreign text as short readable text. Pure; the renderers and the commands call it."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

from pipeline.reports.model import Unit

NOTHING = "–"
SO_FAR = "~"
"""Marks a number that an event may still change."""

_DAY_WINDOWS = ("1d", "1w", "day", "week")
_UNITS = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000))


def safe(text: str | bytes) -> str:
    """Text that a terminal only shows: control, bidirectional and other invisible characters, and bytes that are no UTF-8, are escaped."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def safe_lines(text: str) -> str:
    """The same of a text with lines."""
    return "\n".join(safe(line) for line in text.split("\n"))


def share(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None else f"{value:.{digits}%}"


def change(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:+.1%}" if abs(value) < 10 else f"×{value + 1:,.0f}"


def duration(ms: float | None) -> str:
    """The two largest units: '3m 40s', '850ms'."""
    if ms is None:
        return NOTHING
    if abs(ms) < 1000:
        return f"{ms:.0f}ms"
    left, parts = round(ms / 1000) * 1000, []
    for name, size in _UNITS:
        if n := left // size:
            parts.append(f"{n}{name}")
            left -= n * size
        elif parts:
            break
        if len(parts) == 2:
            break
    return " ".join(parts)


def value(number: Decimal | None, unit: Unit, currency: str = "", percent: bool = False) -> str:
    """A KPI's value. `percent`: a ratio is shown as one. Money of 100,000 and more has no decimals."""
    if number is None:
        return f"{NOTHING} {safe(currency)}".rstrip()
    if unit == "duration":
        return duration(float(number))
    if unit == "money" or currency:
        return f"{number:,.{0 if abs(number) >= 100_000 else 2}f} {safe(currency)}".rstrip()
    if unit == "ratio":
        return f"{number:.1%}" if percent else f"{number:,.2f}"
    return f"{number:,.0f}" if number == number.to_integral_value() else f"{number:,.2f}"


def moment(when: datetime | None, window: str = "1m") -> str:
    """The start of a window (or a time, with the window '1s'), as much of it as the window's size tells."""
    if when is None:
        return NOTHING
    if window in _DAY_WINDOWS:
        return f"{when:%Y-%m-%d}"
    if window in ("1mo", "month"):
        return f"{when:%Y-%m}"
    return f"{when:%Y-%m-%d %H:%M:%S}" if window == "1s" else f"{when:%Y-%m-%d %H:%M}"
