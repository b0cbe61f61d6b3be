"""Real workers on a real Kafka and ClickHouse server, scraped by a real Prometheus: every series says what the warehouse says."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from embedded.kafka import EmbeddedKafka
from pipeline.definitions_file import load
from pipeline.files import Keyed
from pipeline.telemetry import metrics as m
from pipeline.topic_names import Topics
from tests import clickhouse_server
from tests.clickhouse_server import ClickHouseServer, free_port
from tests.integration.scraping import PARTITIONS, Place, Prometheus, Worker, get, pipeline, prometheus_of, until
from tests.sample_warehouse import sample_records

MINUTE, WEEK = 60_000, 7 * 86_400_000
SHOPPERS = 5
ON_EVENT = {m.RECOVERY_REMAINING.name, m.STANDBY_LAG.name}
"""Exposed only while a take-over goes on (tests/unit/test_metrics.py shows it), and by who has standbys."""
STAND_STILL = """
from pipeline.streaming.owner import Owner
async def offer(self, run): pass
Owner.offer = offer
"""
KEPT = """
from pipeline.streaming.owner import Owner
close = Owner.close
async def told(self):
    print("acknowledged offsets kept:", sum(map(len, self.consumer._acked.values())), flush=True)
    await close(self)
Owner.close = told
"""
SLOW_RESTORE = """
import time
from pipeline.partition import Partition
restore = Partition.restore
def slowly(self, *arguments):
    time.sleep(8)
    restore(self, *arguments)
Partition.restore = slowly
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    clickhouse_server.require()
    folder = tmp_path_factory.mktemp("metrics")
    with EmbeddedKafka(quiet=True) as kafka, ClickHouseServer() as server, pipeline(folder, kafka, server) as made:
        yield made


# --- what is sent: the sample, and a minute of trouble at its end and a week before --------------------------------------------


def shopper(name: str, ts: int, number: int) -> list[Keyed]:
    """Somebody who looks, meets two errors, whose first payment fails."""
    clicks = ("page_view", "view_item", "page_error", "page_error", "add_to_cart", "begin_checkout")
    orders = ("order_created", "payment_failed", "purchase", "refund")
    order = {"order_id": f"{name}-{ts}", "value": 10 + number}
    events = [("clickstream", event, {"item_id": "sku-1"} if event in ("view_item", "add_to_cart") else {}) for event in clicks]
    events += [("orders", event, order | ({"refund_value": 1} if event == "refund" else {})) for event in orders]
    return [
        Keyed(topic, name, json.dumps({"event_id": f"{name}-{ts}-{i}", "event": event, "ts": ts + i, "user_id": name, **fields}).encode())
        for i, (topic, event, fields) in enumerate(events)
    ]


def event_time(record: Keyed) -> int:
    """ms; 0 for the sample's bad ones."""
    try:
        ts = json.loads(record.value)["ts"]
    except (ValueError, KeyError, TypeError):
        return 0
    return ts if isinstance(ts, int) and ts > 0 else 0


def with_minutes_of_trouble(sample: list[Keyed]) -> list[Keyed]:
    """The newest complete minute, hour and day and those a week before all have numbers."""
    newest = (max(map(event_time, sample)) // MINUTE + 1) * MINUTE
    sent = []
    for topic in ("clickstream", "orders"):
        lane = [record for record in sample if record.topic == topic]
        begins = next(i for i, record in enumerate(lane) if event_time(record) >= newest - WEEK)
        before = [e for n in range(SHOPPERS - 1) for e in shopper(f"oncall-{n}", newest - WEEK, n) if e.topic == topic]
        after = [e for n in range(SHOPPERS) for e in shopper(f"oncall-{n}", newest, n) if e.topic == topic]
        sent += [*lane[:begins], *before, *lane[begins:], *after]
    return sent + later(newest + MINUTE, 1)


def later(ts: int, count: int) -> list[Keyed]:
    """Page views of as many users in one minute."""
    return [
        Keyed("clickstream", f"later-{n}", json.dumps({"event_id": f"l-{ts}-{n}", "event": "page_view", "ts": ts, "user_id": f"later-{n}"}).encode())
        for n in range(count)
    ]  # fmt: skip


# --- the cases -----------------------------------------------------------------------------------------------------------------


def test_every_series_agrees_with_the_warehouse_also_over_two_workers_and_an_outage(place: Place) -> None:
    messages = with_minutes_of_trouble(sample_records())
    ports = [free_port(), free_port()]
    first = place.start(SHOPSTREAM_METRICS_PORT=str(ports[0]), SHOPSTREAM_STUCK_SECONDS="8")
    workers = [first]
    try:
        with prometheus_of(place.folder, ports) as prometheus:
            _starts_and_says_so(place, first)
            place.produce(messages)
            until(place.applied, 60, f"everything applied\n{place.log}")
            _read_again(first)
            until(lambda: prometheus.one("sum(shopstream_consumer_lag_events)") == 0, 20, "no lag")
            _everything_is_exposed(first)
            _counts_agree(place, prometheus)
            _kpis_agree(place, prometheus)
            _funnels_agree(place, prometheus)
            _sizes_agree(place, prometheus)
            _checked_by_promtool(f"{first.url}/metrics")
            workers.append(_two_share(place, prometheus, first, ports[1]))
            assert workers.pop().stop() == 0, place.log
            _one_has_all_again(place, prometheus, first, ports[1])
            _warehouse_away(place, first)
    finally:
        for worker in workers:
            worker.process.terminate()
        assert [worker.process.wait(60) for worker in workers] == [0] * len(workers), place.log


def _starts_and_says_so(place: Place, worker: Worker) -> None:
    """Alive from the beginning, ready once everything is read, with the reasons in between."""
    code, told = until(lambda: (a := get(f"{worker.url}/readyz"))[0] and a, 20, f"the port answers\n{place.log}")
    assert code == 503
    assert "warming up" in told
    assert get(f"{worker.url}/healthz")[0] == 200
    assert worker.value("shopstream_ready") == 0
    until(worker.ready, 90, f"ready\n{place.log}")


def _read_again(worker: Worker) -> None:
    """The gauges are those of a warehouse that has everything."""
    settled = time.time()
    until(lambda: worker.value("shopstream_warehouse_read_timestamp_seconds") > settled + 0.5, 15, "the warehouse was read")
    time.sleep(1.1)  # a scrape


def _everything_is_exposed(worker: Worker) -> None:
    found = {name for name, _, _ in worker.series()}
    names = {metric.name + ("_count" if metric.kind == "histogram" else "") for metric in m.METRICS}
    assert names - found == ON_EVENT
    assert {name for name in found if not name.startswith(m.FOREIGN) and name.removesuffix("_count") in names} <= names
    errors = [(has["operation"], has["kind"]) for name, has, _ in worker.series() if name == m.SINK_ERRORS.name]
    assert sorted(errors) == sorted((o, k) for o in m.OPERATION.values for k in m.ERROR_KIND.values), "a first error must be an increase"


def _counts_agree(place: Place, prometheus: Prometheus) -> None:
    _totals_agree(place, prometheus)
    reasons = place.warehouse.query("SELECT reason, uniqExact(topic, partition, offset) FROM rejects GROUP BY reason")
    assert reasons
    assert prometheus.all("sum by (reason) (shopstream_rejected_records_total)") == {(str(r),): float(n) for r, n in reasons}
    assert prometheus.one("sum(shopstream_run_records_sum)") == prometheus.one("sum(shopstream_consumed_records_total)")
    assert prometheus.one("shopstream_end_to_end_latency_seconds_count") == prometheus.one("shopstream_run_records_count") > 0
    assert prometheus.one("shopstream_partitions_owned") == PARTITIONS
    assert prometheus.one("sum(shopstream_unacknowledged_flushes)") == 0


def _totals_agree(place: Place, prometheus: Prometheus) -> None:
    """By partition, whoever exposes it; all that was sent is counted."""
    names = {"applied": "applied_events", "duplicates": "duplicate_events", "too_late": "too_late_events", "rekeyed": "rekeyed_records"}
    newest = ", ".join(f"argMax({column}, version)" for column in (*names, "next_offset"))
    rows = place.warehouse.query(f'SELECT topic, "partition", {newest} FROM progress GROUP BY topic, "partition"')
    for i, metric in enumerate((*names.values(), "committed_offset")):
        series = "shopstream_committed_offset" if metric == "committed_offset" else f"shopstream_{metric}_total"
        wanted = {(str(p), str(topic)): float(counts[i]) for topic, p, *counts in rows if counts[i]}
        until(lambda s=series, w=wanted: {k: v for k, v in prometheus.all(f"max by (topic, partition) ({s})").items() if v} == w, 5, series)
    total = sum(end for (topic, _), end in place.ends().items() if topic != Topics().rekeyed)
    assert prometheus.one('sum(max by (topic, partition) (shopstream_consumed_records_total{topic!~".*rekeyed"}))') == total


def window_starts(size: str, until_ms: int) -> dict[str, int]:
    """Unix time of the newest window that has ended by then, and of the one a week before; UTC, weeks from Monday."""
    seconds, first = {"1m": (60, 0), "1h": (3600, 0), "1d": (86_400, 0), "1w": (604_800, 4 * 86_400)}[size]
    newest = ((until_ms // 1000 - first) // seconds - 1) * seconds + first
    return {"newest": newest, "week_before": newest - WEEK // 1000}


def _kpis_agree(place: Place, prometheus: Prometheus) -> None:
    definitions = load(None)
    rows = place.warehouse.query(
        "SELECT window, kpi, toUnixTimestamp(window_start), value FROM kpi_report WHERE dimension = '' AND currency IN ('', %(currency)s)",
        {"currency": definitions.currency},
    )
    report = {(str(window), str(kpi), int(start)): float(value) for window, kpi, start, value in rows}
    wanted: dict[tuple[str, ...], float] = {}
    for window in m.KPI_WINDOWS:
        for age, start in window_starts(window, place.largest()).items():
            for kpi in definitions.kpis:
                value = report.get((window, kpi.name, start))
                if value is None and kpi.operator != "/" and kpi.aggregate != "dwell_quantile":
                    value = 0.0  # nothing happened
                if window in kpi.windows and value is not None:
                    wanted[age, kpi.name, window] = value
    found = prometheus.all("shopstream_kpi")
    assert found == pytest.approx(wanted, rel=1e-12)
    trouble = {
        (age, kpi): found[age, kpi, "1m"] for age in m.AGES for kpi in ("payment_failures", "page_errors", "paid_orders", "buyers", "gmv")
    }
    assert trouble == {
        ("newest", "payment_failures"): 5, ("newest", "page_errors"): 10, ("newest", "paid_orders"): 5, ("newest", "buyers"): 5,
        ("newest", "gmv"): 60, ("week_before", "payment_failures"): 4, ("week_before", "page_errors"): 8, ("week_before", "paid_orders"): 4,
        ("week_before", "buyers"): 4, ("week_before", "gmv"): 46,
    }  # fmt: skip


def _funnels_agree(place: Place, prometheus: Prometheus) -> None:
    users: dict[tuple[str, ...], float] = {}
    ratios: dict[tuple[str, ...], float] = {}
    for funnel in load(None).funnels:
        rows = place.warehouse.query(
            "SELECT toUnixTimestamp(window_start), step, sum(users) FROM funnel_report WHERE funnel = %(name)s GROUP BY window_start, step",
            {"name": funnel.name},
        )
        report = {(int(start), int(step)): float(n) for start, step, n in rows}
        for age, start in window_starts(funnel.entry_window, place.largest() - funnel.conversion_ms).items():
            for step in range(1, len(funnel.steps) + 1):
                if entered := report.get((start, 1)):
                    users[age, funnel.name, str(step)] = report[start, step]
                    ratios[age, funnel.name, str(step)] = report[start, step] / entered
    assert {key[:2] for key in users} >= {(age, "checkout") for age in m.AGES}
    assert 0 < ratios["newest", "checkout", "4"] < ratios["newest", "checkout", "2"] < 1
    assert prometheus.all("shopstream_funnel_users") == users
    assert prometheus.all("shopstream_funnel_conversion_ratio") == pytest.approx(ratios, rel=1e-12)


def _sizes_agree(place: Place, prometheus: Prometheus) -> None:
    inserted = prometheus.all("shopstream_inserted_rows_total")
    found = prometheus.all("shopstream_warehouse_rows")
    assert found.keys() == inserted.keys() == {(table,) for table in m.WAREHOUSE_TABLES}
    for (table,), rows in found.items():
        stored = place.warehouse.query(f"SELECT count() FROM {table}")[0][0]
        assert inserted[table,] >= rows >= stored > 0, table  # merges drop superseded versions meanwhile
    largest = place.largest()
    assert prometheus.one("max(shopstream_watermark_timestamp_seconds)") * 1000 == largest
    assert prometheus.one("shopstream_freshness_seconds") == pytest.approx(time.time() - largest / 1000, abs=5)


def _checked_by_promtool(url: str) -> None:
    checked = subprocess.run(["promtool", "check", "metrics"], input=get(url)[1], capture_output=True, text=True, check=False)
    ours = [line for line in (checked.stdout + checked.stderr).splitlines() if "shopstream_" in line]
    assert not ours, ours


def partitions_exposed(worker: Worker) -> set[str]:
    return {has["partition"] for name, has, _ in worker.series() if "partition" in has and name != m.STANDBY_LAG.name}


def _two_share(place: Place, prometheus: Prometheus, first: Worker, port: int) -> Worker:
    """Each exposes the series of its partition and none of the other's; together they are the warehouse's."""
    second = place.start(SHOPSTREAM_METRICS_PORT=str(port), SHOPSTREAM_STANDBY_PARTITIONS="2")
    until(
        lambda: second.ready() and len(second.partitions()) == 1 and first.ready() and len(first.partitions()) == 1,
        60,
        f"shared\n{place.log}",
    )
    place.produce(later(place.largest(), 300))
    until(place.applied, 30, f"everything applied\n{place.log}")
    exposed = [partitions_exposed(worker) for worker in (first, second)]
    assert sorted(map(sorted, exposed)) == [["0"], ["1"]]
    (of_the_first,) = first.partitions()
    until(lambda: second.value(m.STANDBYS.name) == 1, 20, "the second follows the first one's")
    until(lambda: [lag for name, _, lag in second.series() if name == m.STANDBY_LAG.name] == [0], 20, "and has read its changelog")
    assert json.loads(get(f"{second.url}/readyz")[1])["standby_lag"] == {str(of_the_first): 0}
    until(lambda: prometheus.one("sum(shopstream_partitions_owned)") == PARTITIONS, 5, "Prometheus has seen it")
    until(lambda: prometheus.one("count(count by (topic, partition) (shopstream_applied_events_total))") == 3 * PARTITIONS, 5, "all there")
    _totals_agree(place, prometheus)
    return second


def _one_has_all_again(place: Place, prometheus: Prometheus, first: Worker, gone: int) -> None:
    until(lambda: first.ready() and len(first.partitions()) == PARTITIONS, 60, f"one has all\n{place.log}")
    assert partitions_exposed(first) == {"0", "1"}
    until(lambda: not prometheus.all(f'count({{__name__=~"shopstream_.+", instance="127.0.0.1:{gone}"}})'), 5, "no series of who left")
    _totals_agree(place, prometheus)


def _warehouse_away(place: Place, worker: Worker) -> None:
    """Errors and retries are counted; waiting is not being stuck; afterwards nothing is missing."""
    assert worker.value("shopstream_sink_retries_total") == 0
    largest = place.largest() + MINUTE
    place.server.kill()
    place.produce(later(largest, 20))
    until(lambda: worker.value("shopstream_sink_retries_total") > 0, 20, f"a retry\n{place.log}")
    assert worker.value("shopstream_sink_errors_total", operation="insert", kind="no_answer") > 0
    until(lambda: worker.value("shopstream_unacknowledged_flushes") > 0, 10, "flushes wait")
    assert get(f"{worker.url}/healthz")[0] == 200
    place.server.start()
    until(place.applied, 30, f"it goes on\n{place.log}")
    until(lambda: worker.value("shopstream_unacknowledged_flushes") == 0, 10, "none waits any more")
    assert place.largest() == largest


def test_a_port_in_use_stops_the_start_and_names_the_setting(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        worker = place.start(SHOPSTREAM_METRICS_PORT=str(taken.getsockname()[1]))
        assert worker.process.wait(60) == 1
    assert "SHOPSTREAM_METRICS_PORT=0 serves none" in " ".join(place.log.split())


def test_a_worker_that_stands_still_is_not_healthy_and_ends_itself(place: Place) -> None:
    place.produce(sample_records()[:50])
    worker = place.start(STAND_STILL, SHOPSTREAM_STUCK_SECONDS="4")
    try:
        until(worker.ready, 90, f"ready\n{place.log}")
        assert get(f"{worker.url}/healthz")[0] == 200
        told: dict[str, Any] = json.loads(
            until(lambda: (a := get(f"{worker.url}/healthz"))[0] == 503 and a[1], 30, f"not healthy\n{place.log}")
        )
        assert "has been at offset" in told["why"]
        assert max(told["stalled"].values()) >= 4
        assert worker.value("shopstream_stalled_seconds") >= 4
        assert worker.process.wait(30) == 1, place.log
        assert "stuck: " in place.log
        assert "the worker ends so that it is started again" in place.log
    finally:
        worker.process.kill()


def test_a_worker_keeps_no_list_of_what_it_has_applied(place: Place) -> None:
    """Faust's compiled streams do, of topics that are acknowledged: its own commit empties it, and nobody calls that here."""
    worker = place.start(KEPT)
    try:
        for part in range(3):
            place.produce(sample_records()[100 * part : 100 * (part + 1)])
            until(place.applied, 60, f"everything applied\n{place.log}")
        assert worker.stop() == 0, place.log
        assert "acknowledged offsets kept: 0" in place.log
    finally:
        worker.process.kill()


def test_a_restore_that_outlasts_the_session_keeps_the_worker_in_the_group(place: Place) -> None:
    """aiokafka sends no heartbeat before its listener has returned."""
    place.produce(sample_records()[300:350])
    workers = [place.start()]
    try:
        until(place.applied, 60, f"everything applied\n{place.log}")
        assert workers[0].stop() == 0, place.log
        workers.append(worker := place.start(SLOW_RESTORE))
        until(worker.ready, 60, f"ready\n{place.log}")
        time.sleep(2)
        assert worker.value("shopstream_recovery_seconds", partition="0") > 8
        assert worker.value("shopstream_rebalances_total") == 1
        assert worker.stop() == 0, place.log
    finally:
        for one in workers:
            one.process.kill()
