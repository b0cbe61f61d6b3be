"""Reports recomputed by ClickHouse from the raw JSON of accepted events: other code, another language, another order of work.

In: definitions and (topic, raw JSON) of the events that count. Out: what funnel_report, retention_report and kpi_report must show, as dictionaries.
Plain ordered funnels, retention and all stored KPIs are SQL; funnels with a breakdown or other extras use `plain_funnel`; formulas are Decimal.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_DOWN, Decimal
from pathlib import Path
from typing import Any

from pipeline.definitions import ANY_EVENT, Definitions, Filter, Funnel, Kpi, Match, Retention
from pipeline.tables.kernel import HISTOGRAM_UPPER
from schemas.events import NUMBER_FIELDS, STRING_FIELDS, TOPIC_OF_EVENT, TOPICS
from tests.oracle.plain_funnel import PlainEvent, best_outcomes

Query = Callable[[str], list[tuple[Any, ...]]]
FunnelKey = tuple[str, int, str, int]  # funnel, window start ms, segment, step
RetentionKey = tuple[str, int, str, int]  # retention, cohort start ms, segment, period
KpiKey = tuple[str, str, int, str, str, str]  # kpi, window, window start ms, dimension, its value, currency
OPS = {"eq": "=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
NO_SECOND = 9_000_000_000_000_000
EIGHT_DIGITS = Decimal("1e-8")


class Oracle:
    """Loads the events into database `oracle` of a ClickHouse that `query` speaks to; each method reads only from there."""

    def __init__(self, query: Query, definitions: Definitions, events: Iterable[tuple[str, bytes]]) -> None:
        self.query = query
        self.definitions = definitions
        self.zone = definitions.time_zone
        self._followed: dict[str, dict[tuple[int, str, int], list[int]]] = {}
        self._load(events)

    def _load(self, events: Iterable[tuple[str, bytes]]) -> None:
        texts = [f"JSONExtractString(line, '{name}') AS f_{name}" for name in STRING_FIELDS]
        numbers = [
            f"if(JSONType(line, '{name}') IN ('Int64', 'UInt64', 'Double'), toDecimal128OrNull(JSONExtractRaw(line, '{name}'), 4), NULL) AS n_{name}"
            for name in NUMBER_FIELDS
        ]
        self.query("CREATE DATABASE IF NOT EXISTS oracle")
        self.query("DROP TABLE IF EXISTS oracle.events")
        with tempfile.TemporaryDirectory() as folder:
            for topic in TOPICS:
                (Path(folder) / topic).touch()
            files = {topic: (Path(folder) / topic).open("wb") for topic in TOPICS}
            for topic, raw in events:
                files[topic].write(raw + b"\n")
            for file in files.values():
                file.close()
            lines = " UNION ALL ".join(
                f"SELECT {i} AS topic, line FROM file('{folder}/{t}', 'LineAsString', 'line String')" for i, t in enumerate(TOPICS)
            )
            self.query(f"""
                CREATE TABLE oracle.events ENGINE = MergeTree ORDER BY (user, ts, h) AS
                SELECT topic, JSONExtractString(line, 'event_id') AS event_id, xxHash64(event_id) AS h, JSONExtractInt(line, 'ts') AS ts,
                    JSONExtractString(line, 'event') AS event,
                    if(JSONExtractString(line, 'user_id') = '', JSONExtractString(line, 'anonymous_id'), JSONExtractString(line, 'user_id')) AS user,
                    {", ".join(texts + numbers)}
                FROM ({lines}) LIMIT 1 BY event_id
            """)

    # --- pieces of SQL --------------------------------------------------------------------------------------------------

    def _window(self, window: str, ts: str = "ts") -> str:
        """Start (ms) of the window that holds the column `ts`."""
        if window in ("1m", "1h"):
            size = 60_000 if window == "1m" else 3_600_000
            return f"intDiv({ts}, {size}) * {size}"
        day = {"1d": "{}", "1w": "toMonday({})", "1mo": "toStartOfMonth({})"}[window].format(self._date(ts))
        return f"toInt64(toUnixTimestamp(toDateTime({day}, '{self.zone}'))) * 1000"

    def _date(self, ts: str) -> str:
        return f"toDate(toDateTime(intDiv({ts}, 1000), '{self.zone}'))"

    def _currency(self) -> str:
        return f"if(f_currency = '', '{self.definitions.currency}', f_currency)"

    # --- funnels --------------------------------------------------------------------------------------------------------

    def funnels(self) -> dict[FunnelKey, int]:
        """Users who got to each step or further, zero included."""
        out: dict[FunnelKey, int] = {}
        for funnel in self.definitions.funnels:
            deepest = self._levels_in_sql(funnel) if is_plain(funnel) else {k: len(v) for k, v in self._times_in_python(funnel).items()}
            reached: Counter[FunnelKey] = Counter()
            for (window, segment, level), n in deepest.items():
                for step in range(1, len(funnel.steps) + 1):
                    reached[funnel.name, window, segment, step] += n if level >= step else 0
            out |= reached
        return out

    def _levels_in_sql(self, funnel: Funnel) -> dict[tuple[int, str, int], int]:
        first, *rest = (condition(step.match) for step in funnel.steps)
        window = self._window(funnel.entry_window)
        later = ", ".join(rest)
        rows = self.query(f"""
            SELECT entry, level, count() FROM
            (
                SELECT user, entry, windowFunnel({funnel.conversion_ms}, 'strict_once')(toUInt64(ts), {first} AND {window} = entry, {later}) AS level
                FROM (SELECT DISTINCT user, {window} AS entry FROM oracle.events WHERE {first}) AS entries
                INNER JOIN oracle.events AS e USING (user)
                GROUP BY user, entry
            )
            GROUP BY entry, level
        """)
        return {(int(entry), "", int(level)): int(n) for entry, level, n in rows}

    def times(self) -> dict[FunnelKey, list[int]]:
        """ms from first step to deepest step, ascending, of the users who got exactly as far as each step; of no user, no row."""
        out: dict[FunnelKey, list[int]] = {}
        for funnel in self.definitions.funnels:
            found = self._times_in_sql(funnel) if is_plain(funnel) else self._times_in_python(funnel)
            out |= {(funnel.name, *key): sorted(times) for key, times in found.items()}
        return out

    def _times_in_sql(self, funnel: Funnel) -> dict[tuple[int, str, int], list[int]]:
        """Every attempt takes the earliest next step it can; of a user's attempts in a window the deepest counts, of those the shortest."""
        conditions = [condition(step.match) for step in funnel.steps]
        first, *rest = (f"arraySort(groupArrayIf(ts, {c}))" for c in conditions)
        rows = self.query(f"""
            SELECT entry, best.1 AS level, arraySort(groupArray(-best.2)) FROM
            (
                SELECT user, {self._window(funnel.entry_window, "start")} AS entry, max((length(reached), start - arrayMax(reached))) AS best FROM
                (
                    SELECT user, start, arrayFold(
                        (reached, later, i) -> if(
                            length(reached) = i AND arrayExists(t -> t BETWEEN reached[i] AND start + {funnel.conversion_ms}, later),
                            arrayPushBack(reached, arrayFirst(t -> t >= reached[i], later)), reached
                        ), later_steps, arrayEnumerate(later_steps), [start]
                    ) AS reached
                    FROM (SELECT user, {first} AS starts, [{", ".join(rest)}] AS later_steps FROM oracle.events GROUP BY user)
                    ARRAY JOIN starts AS start
                )
                GROUP BY user, entry
            )
            GROUP BY entry, level
        """)
        return {(int(entry), "", int(level)): [int(t) for t in times] for entry, level, times in rows}

    def _times_in_python(self, funnel: Funnel) -> dict[tuple[int, str, int], list[int]]:
        if funnel.name in self._followed:
            return self._followed[funnel.name]
        steps = [condition(step.match) for step in funnel.steps]
        exclusions = [condition(x.match) for x in funnel.exclusions]
        segment, hold = (f"f_{name}" if name else "''" for name in (funnel.breakdown, funnel.hold_constant))
        # an event that is neither step nor exclusion breaks a strict sequence, and is nothing to the others
        told = "1" if funnel.order == "strict" else " OR ".join(steps + exclusions)
        rows = self.query(
            f"SELECT user, ts, h, topic, {segment}, {hold}, [{', '.join(steps)}], {_array(exclusions)} FROM oracle.events WHERE {told}"
        )
        users: dict[str, list[PlainEvent]] = defaultdict(list)
        for user, ts, h, topic, value, held, matched, excluded in rows:
            events = frozenset(i for i, hit in enumerate(matched, 1) if hit), frozenset(i for i, hit in enumerate(excluded) if hit)
            users[user].append(PlainEvent(int(ts), int(h), *events, value, held, int(topic)))
        names = {name for step in funnel.steps for name in step.match.events}
        topics = frozenset(range(len(TOPICS))) if ANY_EVENT in names else frozenset(TOPIC_OF_EVENT.get(name, 0) for name in names)
        out: dict[tuple[int, str, int], list[int]] = defaultdict(list)
        for user_events in users.values():
            for window, outcome in best_outcomes(funnel, user_events, self.zone, topics).items():
                out[window, outcome.segment, outcome.level].append(outcome.duration)
        self._followed[funnel.name] = dict(out)
        return self._followed[funnel.name]

    # --- retention ------------------------------------------------------------------------------------------------------

    def retentions(self) -> dict[RetentionKey, tuple[int, int, Decimal]]:
        """(users, users on or after, value) where one of them is not 0."""
        out: dict[RetentionKey, tuple[int, int, Decimal]] = {}
        for retention in self.definitions.retentions:
            found: dict[tuple[int, str, int], list[Any]] = defaultdict(lambda: [0, 0, Decimal(0)])
            last: dict[tuple[int, str], Counter[int]] = defaultdict(Counter)
            for cohort, segment, n, users, value in self._active(retention):
                found[int(cohort), segment, int(n)][0] += int(users)
                found[int(cohort), segment, int(n)][2] += Decimal(value)
            for cohort, segment, n, users in self._last(retention):
                last[int(cohort), segment][int(n)] += int(users)
            for (cohort, segment), counts in last.items():
                for n in range(retention.periods + 1):
                    found[cohort, segment, n][1] = sum(users for period, users in counts.items() if period >= n)
            out |= {(retention.name, *key): (v[0], v[1], v[2]) for key, v in found.items() if any(v)}
        return out

    def _activity(self, retention: Retention) -> str:
        """One row a user and period 0 to `periods`: whether they were active in it, and the sum of their values."""
        segment = f"f_{retention.breakdown}" if retention.breakdown else "''"
        value = f"ifNull(n_{retention.value}, toDecimal128(0, 4))" if retention.value else "toDecimal128(0, 4)"
        start = {"day": "{}", "week": "toMonday({})", "month": "toStartOfMonth({})"}[retention.period]
        begins, happens = start.format(self._date("first.1")), start.format(self._date("ts"))
        window = {"day": "1d", "week": "1w", "month": "1mo"}[retention.period]
        return f"""
            SELECT user, {self._window(window, "first.1")} AS cohort, first.3 AS segment, n, active, total FROM
            (
                SELECT user, any(first) AS first, n, max(hit) AS active, sum(amount) AS total FROM
                (
                    SELECT user, first, 0 AS n, 1 AS hit, toDecimal128(0, 4) AS amount FROM cohorts
                    UNION ALL
                    SELECT user, first, dateDiff('{retention.period}', {begins}, {happens}) AS n, 1 AS hit, {value} AS amount
                    FROM cohorts INNER JOIN (SELECT * FROM oracle.events WHERE {condition(retention.returning)}) AS e USING (user)
                )
                WHERE n BETWEEN 0 AND {retention.periods}
                GROUP BY user, n
            )
        """.replace(
            "cohorts",
            f"(SELECT user, min((ts, h, {segment})) AS first FROM oracle.events WHERE {condition(retention.cohort)} GROUP BY user) AS c",
        )

    def _active(self, retention: Retention) -> list[tuple[Any, ...]]:
        return self.query(f"SELECT cohort, segment, n, count(), sum(total) FROM ({self._activity(retention)}) GROUP BY cohort, segment, n")

    def _last(self, retention: Retention) -> list[tuple[Any, ...]]:
        users = f"SELECT user, cohort, segment, max(n) AS last FROM ({self._activity(retention)}) GROUP BY user, cohort, segment"
        return self.query(f"SELECT cohort, segment, last, count() FROM ({users}) GROUP BY cohort, segment, last")

    # --- KPIs -----------------------------------------------------------------------------------------------------------

    def kpis(self) -> dict[KpiKey, Decimal]:
        """Every number; stored ones that are 0 have no row."""
        stored = {kpi.name: self._stored(kpi) for kpi in self.definitions.kpis if kpi.source != "formula"}
        out: dict[KpiKey, Decimal] = {}
        for kpi in self.definitions.kpis:
            cells = stored[kpi.name] if kpi.source != "formula" else formula(kpi, stored[kpi.left], stored[kpi.right])
            out |= {(kpi.name, *cell): value for cell, value in cells.items()}
        return out

    def _stored(self, kpi: Kpi) -> dict[tuple[str, int, str, str, str], Decimal]:
        rows_of = {"events": self._events, "sessions": self._sessions, "first": self._first, "repeat": self._first, "orders": self._orders}[
            kpi.source
        ]
        source, value = rows_of(kpi)
        currency = self._currency() if kpi.money else "''"
        out: dict[tuple[str, int, str, str, str], Decimal] = {}
        for window in kpi.windows:
            for dimension in ("", *kpi.dimensions):
                of = f"f_{dimension}" if dimension else "''"
                rows = self.query(
                    f"SELECT {self._window(window)} AS w, {of} AS d, {currency} AS c, {value} AS v FROM ({source}) GROUP BY w, d, c"
                )
                for start, of_value, in_currency, number in rows:
                    if number:
                        out[window, int(start), dimension, of_value, in_currency] = self._number(kpi, number)
        return out

    def _number(self, kpi: Kpi, number: Any) -> Decimal:
        if kpi.aggregate != "dwell_quantile":
            return Decimal(number)
        return Decimal(bucket_of_quantile(Decimal(str(kpi.quantile)), number))

    def _events(self, kpi: Kpi) -> tuple[str, str]:
        assert kpi.match is not None
        value = {"count": "count()", "users": "uniqExact(user)", "sum": f"sum(ifNull(n_{kpi.field}, toDecimal128(0, 4)))"}[kpi.aggregate]
        return f"SELECT * FROM oracle.events WHERE {condition(kpi.match)}", value

    def _sessions(self, kpi: Kpi) -> tuple[str, str]:
        dimensions = "".join(f", argMin(f_{d}, (ts, h)) AS f_{d}" for d in kpi.dimensions)
        flags = f"""
            SELECT *, ts - lagInFrame(ts, 1, -{NO_SECOND}) OVER (PARTITION BY user ORDER BY ts, h ROWS BETWEEN 1 PRECEDING AND CURRENT ROW)
                > {self.definitions.session_gap_ms} AS begins
            FROM oracle.events
        """
        numbered = f"SELECT *, sum(begins) OVER (PARTITION BY user ORDER BY ts, h ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS session FROM ({flags})"
        page = condition(self.definitions.page)
        sessions = f"""
            SELECT start AS ts, * EXCEPT start FROM
            (
                SELECT user, session, min(ts) AS start, max(ts) - min(ts) AS dwell, countIf({page}) AS pages{dimensions}
                FROM ({numbered}) AS n GROUP BY user, session
            )
        """
        value = {
            "count": "count()", "bounces": "countIf(pages = 1)", "pages": "sum(pages)", "dwell": "sum(dwell)",
            "dwell_quantile": "arraySort(groupArray(dwell))",
        }[kpi.aggregate]  # fmt: skip
        return sessions, value

    def _first(self, kpi: Kpi) -> tuple[str, str]:
        where = condition(kpi.match) if kpi.match else "1"
        dimensions = "".join(f", argMin(f_{d}, (ts, h)) AS f_{d}" for d in kpi.dimensions)
        users = f"""
            SELECT user, arraySort(groupArray(ts))[1] AS start, if(count() > 1, arraySort(groupArray(ts))[2], {NO_SECOND}) AS second{dimensions}
            FROM oracle.events WHERE {where} GROUP BY user
        """
        soon = f"second - start <= {kpi.within_ms}" if kpi.source == "repeat" else "1"
        return f"SELECT start AS ts, * EXCEPT start FROM ({users}) WHERE {soon}", "count()"

    def _orders(self, kpi: Kpi) -> tuple[str, str]:
        """One row an order at its first event of the kind that decides the window."""
        anchor = {"created": "order_created", "paid_of_created": "order_created", "cancelled": "order_cancelled"}.get(
            kpi.aggregate, "purchase"
        )
        other = {"paid_of_created": "purchase", "refunded_of_paid": "refund"}.get(kpi.aggregate)
        dimensions = "".join(f", argMinIf(f_{d}, (ts, h), event = '{anchor}') AS f_{d}" for d in kpi.dimensions)
        orders = f"""
            SELECT f_order_id AS o, minIf(ts, event = '{anchor}') AS start, countIf(event = '{anchor}') AS anchors{dimensions},
                countIf(event = '{other or anchor}') AS others
            FROM oracle.events WHERE f_order_id != '' GROUP BY o
        """
        return f"SELECT start AS ts, * EXCEPT start FROM ({orders}) WHERE anchors > 0 AND others > 0", "count()"


def bucket_of_quantile(quantile: Decimal, durations: Sequence[Any]) -> int:
    """Upper bound, ms, of the histogram's bucket that holds the nearest rank of ascending durations: the report's resolution, at most 9.1%."""
    exact = int(durations[math.ceil(quantile * len(durations)) - 1])
    upper = next(int(upper) for upper in HISTOGRAM_UPPER if exact <= upper)
    assert exact <= upper <= max(1, exact * 1.091 + 0.5), f"{exact} ms in a bucket up to {upper} ms"
    return upper


def is_plain(funnel: Funnel) -> bool:
    """Whether `windowFunnel(…, 'strict_once')` means the same: ordered, distinct steps, nothing else."""
    names = [name for step in funnel.steps for name in step.match.events]
    extras = funnel.breakdown or funnel.hold_constant or funnel.exclusions or any(step.optional for step in funnel.steps)
    return funnel.order == "ordered" and not extras and ANY_EVENT not in names and len(names) == len(set(names))


def condition(match: Match) -> str:
    """SQL that is 1 or 0 for an event."""
    event = "1" if ANY_EVENT in match.events else f"event IN ({_texts(match.events)})"
    return "(" + " AND ".join([event, *(_filter(f) for f in match.where)]) + ")"


def _filter(f: Filter) -> str:
    if f.field in STRING_FIELDS:
        return f"f_{f.field} {'IN' if f.op == 'eq' else 'NOT IN'} ({_texts(f.values)})"
    number = Decimal(f.values[0]) / 10_000
    if f.op == "ne":
        return f"ifNull(n_{f.field} != toDecimal128('{number}', 4), 1)"
    return f"ifNull(n_{f.field} {OPS[f.op]} toDecimal128('{number}', 4), 0)"


def _texts(values: Iterable[Any]) -> str:
    return ", ".join("'" + str(v).replace("\\", "\\\\").replace("'", "\\'") + "'" for v in values)


def _array(conditions: list[str]) -> str:
    return f"[{', '.join(conditions)}]" if conditions else "CAST([] AS Array(UInt8))"


Cells = dict[tuple[str, int, str, str, str], Decimal]


def formula(kpi: Kpi, left: Cells, right: Cells) -> Cells:
    """A count goes with each currency of the other side; without the right side there is no ratio; eight digits, cut off."""
    currencies: dict[tuple[str, int, str, str], set[str]] = defaultdict(set)
    for *cell, currency in (*left, *right):
        currencies[tuple(cell)].add(currency)  # type: ignore[arg-type]
    out: Cells = {}
    for cell, found in currencies.items():
        for currency in found - {""} or {""}:
            a, b = (sum((side.get((*cell, c), Decimal(0)) for c in {currency, ""}), Decimal(0)) for side in (left, right))
            if kpi.operator == "/":
                if b:
                    out[*cell, currency] = (a / b).quantize(EIGHT_DIGITS, ROUND_DOWN)
            else:
                out[*cell, currency] = a - b if kpi.operator == "-" else a + b
    return out
