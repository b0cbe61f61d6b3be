"""What has to be counted as it happens: durations, sizes, errors. In: calls from the streaming layer, on its event loop. Out: readings for a scrape.

A call costs about a microsecond and is made once a run, flush or insert, never once an event.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from pipeline.telemetry.metrics import METRICS, REBALANCES, Metric


class Reading(NamedTuple):
    """A value of a metric; label values in the order of the metric's labels."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()


@dataclass(slots=True)
class Histogram:
    """Observations of one metric: `counts` by bucket, the last one is above all bounds."""

    metric: Metric
    counts: list[int]
    sum: float = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.metric.buckets, value)] += 1
        self.sum += value


class Meter:
    """Counters and histograms of one process, each beginning at 0 so that its first increase is seen."""

    def __init__(self) -> None:
        self.histograms = {m.name: Histogram(m, [0] * (len(m.buckets) + 1)) for m in METRICS if m.kind == "histogram"}
        counted = (m for m in METRICS if m.kind == "counter" and not m.durable and m is not REBALANCES)
        self._counts: dict[tuple[Metric, tuple[str, ...]], float] = {
            (m, labels): 0 for m in counted for labels in product(*(label.values for label in m.labels))
        }

    def observe(self, metric: Metric, value: float) -> None:
        self.histograms[metric.name].observe(value)

    def count(self, metric: Metric, *labels: str, by: float = 1) -> None:
        key = (metric, labels)
        self._counts[key] = self._counts.get(key, 0) + by

    def readings(self) -> Iterator[Reading]:
        """The counters."""
        for (metric, labels), value in list(self._counts.items()):
            yield Reading(metric, value, labels)
