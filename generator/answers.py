"""The exact answers to what `generator/demo.toml` asks, from the generator's own bookkeeping: plain dictionaries and sets, nothing of the pipeline's.

In: the facts that were sent, in any order of their times (`Answers.add`). Out: what the reports must show, keyed as they are. What can't change any
more is folded into totals (`settle`), so that memory stays flat however long it goes on. All days are UTC's. `shopstream demo` and tests call it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from pathlib import Path

from generator.incidents import DAY_MS, HOUR_MS
from generator.live import Fact
from generator.tally import Tally
from generator.visits import number_of

DEMO_FILE = Path(__file__).with_name("demo.toml")
SESSION_GAP_MS = 30 * 60_000
WINDOWS = {"1h": HOUR_MS, "1d": DAY_MS}
EIGHT_DIGITS = Decimal("1e-8")

FunnelKey = tuple[str, int, str, int]  # funnel, entry window's start ms, segment, step
RetentionKey = tuple[str, int, str, int]  # retention, cohort's start ms, segment, period
KpiKey = tuple[str, str, int, str, str, str]  # kpi, window, its start ms, dimension, its value, currency
KpiSeries = tuple[str, str, str, str, str]  # kpi, window, dimension, its value, currency


@dataclass(frozen=True)
class FunnelQuestion:
    """Users by the deepest attempt that starts in the entry window; `by`: the field whose value at the attempt's first step is the segment."""

    name: str
    steps: tuple[str, ...]
    conversion_ms: int
    window_ms: int
    by: str = ""


@dataclass(frozen=True)
class RetentionQuestion:
    """By day of the user's first `event` ('' is any): who has another on the n-th day after."""

    name: str
    event: str
    periods: int


FUNNELS = (
    FunnelQuestion("checkout", ("view_item", "add_to_cart", "begin_checkout", "purchase"), DAY_MS, DAY_MS, "channel"),
    FunnelQuestion("payment", ("order_created", "purchase"), HOUR_MS, HOUR_MS),
)
RETENTIONS = (RetentionQuestion("visitors", "", 14), RetentionQuestion("buyers", "purchase", 14))
COUNTED = {
    "orders": ("purchase",),  # the generator pays an order once
    "payment_failures": ("payment_failed",),
    "payment_attempts": ("payment_failed", "purchase"),
    "page_errors": ("page_error",),
    "pages": ("page_view",),
    "sign_ups": ("sign_up",),
}
BY_CHANNEL = ("gmv", "orders")
RATIOS = {
    "order_value": ("gmv", "orders"),
    "payment_failure_rate": ("payment_failures", "payment_attempts"),
    "page_error_rate": ("page_errors", "pages"),
    "bounce_rate": ("bounces", "sessions"),
    "conversion": ("buyers", "active_users"),
}


class FunnelBook:
    """Each user's events that are steps, for as long as an attempt of theirs can still change."""

    def __init__(self, question: FunnelQuestion, latest_ms: int) -> None:
        self.question = question
        self._latest_ms = latest_ms
        self._step = {event: i for i, event in enumerate(question.steps)}
        self._events: dict[str, list[tuple[int, int, str]]] = defaultdict(list)  # ts, step, segment
        self._entered: dict[int, set[str]] = defaultdict(set)  # window start: users with a first step in it
        self._totals: Tally[tuple[str, int]] = Tally()  # segment, step

    def add(self, fact: Fact) -> None:
        step = self._step.get(fact.body["event"])
        if step is not None:
            self._events[fact.body["user_id"]].append((fact.ts, step, fact.body.get(self.question.by, "")))
            if step == 0:
                self._entered[fact.ts - fact.ts % self.question.window_ms].add(fact.body["user_id"])

    def settle(self, now_ms: int) -> None:
        """`now_ms`: nothing can arrive any more that is older than `latest_ms` before it."""
        known_until = now_ms - self._latest_ms
        old = [w for w in self._entered if w + self.question.window_ms + self.question.conversion_ms < known_until]
        for window in sorted(old):
            self._totals.update(self._count(window, self._entered.pop(window)))
        keep_from = min([*self._entered, known_until])  # an attempt that is still to come begins after that
        for user in list(self._events):
            kept = [event for event in self._events[user] if event[0] >= keep_from]
            if kept:
                self._events[user] = kept
            else:
                del self._events[user]

    def answers(self) -> dict[FunnelKey, int]:
        """Users at each step or further, of every step of a segment that someone entered."""
        total = Counter({self._key(series, window): users for series, window, users in self._totals})
        for window, users in self._entered.items():
            total.update(self._key(*of) for of in self._count(window, users))
        steps = range(1, len(self.question.steps) + 1)
        return {(*of, step): total[*of, step] for of in {key[:3] for key in total} for step in steps}

    def _key(self, series: tuple[str, int], window: int) -> FunnelKey:
        segment, step = series
        return self.question.name, window * self.question.window_ms, segment, step

    def _count(self, window: int, users: set[str]) -> Iterator[tuple[tuple[str, int], int]]:
        for user in users:
            level, _, _, segment = max(self._attempts(window, self._events[user]))
            for step in range(1, level + 1):
                yield (segment, step), window // self.question.window_ms

    def _attempts(self, window: int, events: list[tuple[int, int, str]]) -> Iterator[tuple[int, int, int, str]]:
        """Deeper is better, then shorter, then later: (level, minus duration, start, segment)."""
        times = [sorted(ts for ts, step, _ in events if step == wanted) for wanted in range(len(self.question.steps))]
        for start, step, segment in events:
            if step == 0 and window <= start < window + self.question.window_ms:
                at, level = start, 1
                for later in times[1:]:
                    nearest = bisect_left(later, at)
                    if nearest == len(later) or later[nearest] > start + self.question.conversion_ms:
                        break
                    at, level = later[nearest], level + 1
                yield level, start - at, start, segment


class RetentionBook:
    """Each user's first day, and on which days after it they were there."""

    def __init__(self, question: RetentionQuestion) -> None:
        self.question = question
        self._days: dict[str, set[int] | int] = {}  # a plain number: the one day so far, which most users have
        self._old = bytearray()  # by the visitor's number
        self._totals: Tally[tuple[int, str]] = Tally()  # period, measure

    def add(self, fact: Fact) -> None:
        if self.question.event in ("", fact.body["event"]):
            user, day = fact.body["user_id"], fact.ts // DAY_MS
            days = self._days.get(user, day)
            if isinstance(days, set):
                days.add(day)
            elif days != day:
                self._days[user] = {days, day}
            elif not self._is_old(user):
                self._days[user] = day

    def settle(self, now_ms: int) -> None:
        """Users whose last period is over are counted for good; only that they were there stays, so that they are not taken for new."""
        over = now_ms // DAY_MS - self.question.periods - 2
        for user in [user for user, days in self._days.items() if _first(days) < over]:
            self._totals.update(self._of_user(self._days.pop(user)))
            number = number_of(user)
            self._old.extend(bytes(max(0, number + 1 - len(self._old))))
            self._old[number] = 1

    def answers(self) -> dict[RetentionKey, tuple[int, int]]:
        """(users in the period, users in it or a later one) where one of them is not 0."""
        total = Counter({(series, cohort): users for series, cohort, users in self._totals})
        for days in self._days.values():
            total.update(self._of_user(days))
        found: dict[RetentionKey, tuple[int, int]] = {}
        for cohort, n in {(cohort, n) for (n, _), cohort in total}:
            found[self.question.name, cohort * DAY_MS, "", n] = total[(n, "in"), cohort], total[(n, "on or after"), cohort]
        return found

    def _is_old(self, user: str) -> bool:
        number = number_of(user)
        return number < len(self._old) and bool(self._old[number])

    def _of_user(self, days: set[int] | int) -> Iterator[tuple[tuple[int, str], int]]:
        """((period, measure), cohort's day)."""
        first = _first(days)
        numbers = [0] if isinstance(days, int) else [day - first for day in days if day - first <= self.question.periods]
        for n in numbers:
            yield (n, "in"), first
        for n in range(max(numbers) + 1):
            yield (n, "on or after"), first


def _first(days: set[int] | int) -> int:
    return days if isinstance(days, int) else min(days)


class SessionBook:
    """Each user's events of late: gaps of at most half an hour belong to one session, which counts in the window of its first event."""

    def __init__(self, latest_ms: int) -> None:
        self._latest_ms = latest_ms
        self._events: dict[str, list[tuple[int, bool, str]]] = defaultdict(list)  # ts, whether a page, channel
        self._totals: Tally[KpiSeries] = Tally()

    def add(self, fact: Fact) -> None:
        self._events[fact.body["user_id"]].append((fact.ts, fact.body["event"] == "page_view", fact.body["channel"]))

    def settle(self, now_ms: int) -> None:
        over = now_ms - self._latest_ms - SESSION_GAP_MS
        for user, events in list(self._events.items()):
            open_ones = []
            for session in _sessions(events):
                if session[-1][0] < over:
                    self._totals.update(_session_cells(session))
                else:
                    open_ones += session
            if open_ones:
                self._events[user] = open_ones
            else:
                del self._events[user]

    def answers(self) -> Counter[KpiKey]:
        total = Counter({_kpi_key(series, window): sessions for series, window, sessions in self._totals})
        for events in self._events.values():
            for session in _sessions(events):
                total.update(_kpi_key(*of) for of in _session_cells(session))
        return total


def _sessions(events: list[tuple[int, bool, str]]) -> Iterator[list[tuple[int, bool, str]]]:
    ordered = sorted(events)
    begin = 0
    for i in range(1, len(ordered) + 1):
        if i == len(ordered) or ordered[i][0] - ordered[i - 1][0] > SESSION_GAP_MS:
            yield ordered[begin:i]
            begin = i


def _session_cells(session: list[tuple[int, bool, str]]) -> Iterator[tuple[KpiSeries, int]]:
    ts, _, channel = session[0]
    bounced = sum(page for _, page, _ in session) == 1
    for name in ("sessions", "bounces") if bounced else ("sessions",):
        yield from _cells(name, ts, channel)


def _cells(name: str, ts: int, channel: str, currency: str = "") -> Iterator[tuple[KpiSeries, int]]:
    """The total, and for some its channel, in both windows: (series, window's number)."""
    for window, size in WINDOWS.items():
        yield (name, window, "", "", currency), ts // size
        if name in BY_CHANNEL:
            yield (name, window, "channel", channel, currency), ts // size


def _kpi_key(series: KpiSeries, number: int) -> KpiKey:
    name, window, *of = series
    dimension, value, currency = of
    return name, window, number * WINDOWS[window], dimension, value, currency


class KpiBook:
    """Counts, sums of money (cents) and distinct users."""

    def __init__(self, latest_ms: int) -> None:
        self._latest_ms = latest_ms
        self._counts: Tally[KpiSeries] = Tally()
        self._cents: Tally[KpiSeries] = Tally()
        self._users: dict[tuple[KpiSeries, int], set[str]] = defaultdict(set)
        self._sessions = SessionBook(latest_ms)

    def add(self, fact: Fact) -> None:
        event, user, channel = fact.body["event"], fact.body["user_id"], fact.body["channel"]
        for name, events in COUNTED.items():
            if event in events:
                self._counts.update(_cells(name, fact.ts, channel))
        users = ["active_users"]
        if event == "purchase":
            users.append("buyers")
            for cell in _cells("gmv", fact.ts, channel, fact.body["currency"]):
                self._cents.add(*cell, round(fact.body["value"] * 100))
        for name in users:
            for cell in _cells(name, fact.ts, channel):
                self._users[cell].add(user)
        self._sessions.add(fact)

    def settle(self, now_ms: int) -> None:
        self._sessions.settle(now_ms)
        for series, number in [(s, n) for s, n in self._users if (n + 1) * WINDOWS[s[1]] < now_ms - self._latest_ms]:
            self._counts.add(series, number, len(self._users.pop((series, number))))

    def answers(self) -> dict[KpiKey, Decimal]:
        found = {_kpi_key(series, window): Decimal(n) for series, window, n in self._counts}
        found |= {_kpi_key(*of): Decimal(len(users)) for of, users in self._users.items()}
        found |= {cell: Decimal(n) for cell, n in self._sessions.answers().items()}
        found |= {_kpi_key(series, window): Decimal(cents) / 100 for series, window, cents in self._cents}
        by_name: dict[str, list[KpiKey]] = defaultdict(list)
        for cell in found:
            by_name[cell[0]].append(cell)
        for name, (upper, lower) in RATIOS.items():
            found.update(_ratios(name, upper, by_name[upper], lower, by_name[lower], found))
        return found


def _ratios(
    name: str, upper: str, above: list[KpiKey], lower: str, below: list[KpiKey], values: dict[KpiKey, Decimal]
) -> Iterator[tuple[KpiKey, Decimal]]:
    """A currency of the upper number at a time; where there is a lower number, but nothing above it, 0. Eight digits, cut off."""
    currencies: dict[tuple[str, int, str, str], list[str]] = defaultdict(list)
    for cell in above:
        currencies[cell[1:5]].append(cell[5])
    for cell in below:
        place = cell[1:5]
        for currency in currencies.get(place, [""]):
            a = values.get((upper, *place, currency), Decimal(0))
            yield (name, *place, currency), (a / values[lower, *place, ""]).quantize(EIGHT_DIGITS, ROUND_DOWN)


class Answers:
    """All of them. `latest_ms`: how long after its time a fact may still be added."""

    def __init__(self, latest_ms: int) -> None:
        self._funnels = [FunnelBook(question, latest_ms) for question in FUNNELS]
        self._retentions = [RetentionBook(question) for question in RETENTIONS]
        self._kpis = KpiBook(latest_ms)
        self._books: tuple[FunnelBook | RetentionBook | KpiBook, ...] = (*self._funnels, *self._retentions, self._kpis)
        self._settled_on = 0
        self.facts = 0

    def add(self, fact: Fact) -> None:
        self.facts += 1
        for book in self._books:
            book.add(fact)

    def settle(self, now_ms: int) -> None:
        """Fold what is over, once an event-time day; `now_ms`: the arrival time of the newest message."""
        if now_ms // DAY_MS > self._settled_on:
            self._settled_on = now_ms // DAY_MS
            for book in self._books:
                book.settle(now_ms)

    def funnels(self) -> dict[FunnelKey, int]:
        return {key: users for book in self._funnels for key, users in book.answers().items()}

    def retentions(self) -> dict[RetentionKey, tuple[int, int]]:
        return {key: users for book in self._retentions for key, users in book.answers().items()}

    def kpis(self) -> dict[KpiKey, Decimal]:
        return self._kpis.answers()
