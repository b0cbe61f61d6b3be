"""Readings as Prometheus' text format. The only module that imports prometheus_client.

Everything is read when it is scraped: a registry of our own with one collector, and the client's collector of process figures beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry

from pipeline.telemetry.meter import Histogram, Reading
from pipeline.telemetry.metrics import METRICS

CONTENT_TYPE = CONTENT_TYPE_LATEST
FAMILIES: dict[str, Any] = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}

Read = Callable[[], tuple[Iterable[Reading], Iterable[Histogram]]]


class Exposition:
    """`text()` is what a scrape gets; `read` is called each time. Raises ValueError for a reading that is not as its metric is defined."""

    def __init__(self, read: Read) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Ours(read))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Ours(Collector):
    def __init__(self, read: Read) -> None:
        self._read = read

    def describe(self) -> Iterable[Family]:
        return ()

    def collect(self) -> Iterator[Family]:
        readings, histograms = self._read()
        families = {m.name: FAMILIES[m.kind](m.name, m.help, labels=[label.name for label in m.labels]) for m in METRICS}
        for reading in readings:
            _check(reading)
            families[reading.metric.name].add_metric(reading.labels, reading.value)
        for histogram in histograms:
            families[histogram.metric.name].add_metric((), _cumulative(histogram), histogram.sum)
        return (family for family in families.values() if family.samples)


def _check(reading: Reading) -> None:
    metric = reading.metric
    if len(reading.labels) != len(metric.labels):
        raise ValueError(f"{metric.name} has the labels {[label.name for label in metric.labels]}, a reading has {reading.labels}")
    for label, value in zip(metric.labels, reading.labels, strict=True):
        if label.values and value not in label.values:
            raise ValueError(f"{metric.name}: {label.name}={value!r} is none of {label.values}")


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    buckets, total = [], 0
    for bound, count in zip((*histogram.metric.buckets, float("inf")), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return buckets
