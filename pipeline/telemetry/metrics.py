"""Every metric there is: name, kind, unit, labels with their bounds, help. `python -m pipeline.telemetry.metrics` prints the reference table.

Pure data. `streaming.readings` and `telemetry.watched` read values for them at every scrape, `telemetry.meter` keeps those that must be counted
as they happen, `telemetry.prometheus` exposes both. No label ever holds what an event brings along: no user, no currency, no segment.

Counters marked *durable* are totals since a partition's first event, as of its last committed transaction. They live in the changelog, so they go on
over restarts, hand-overs and failed transactions and never fall; the worker that owns the partition exposes them. A total over all workers is
`sum(max by (topic, partition) (x))`. All other counters and histograms are of one process and begin at 0 with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.definitions import Window
from pipeline.sinks.sql import SINK_ERROR_KINDS
from schemas.rejects import Reason

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Label:
    """A label; `bound` says why it has few values, `values` which, where they are known beforehand."""

    name: str
    bound: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. `buckets`: upper bounds of a histogram, without infinity."""

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    durable: bool = False


STATE_PARTS = ("users", "cells", "event_ids", "strings")
STATE_TABLES = ("funnel", "retention", "first", "kpi", "sessions", "orders")
WAREHOUSE_TABLES = ("funnel_cells", "retention_cells", "kpi_cells", "rejects", "progress")
KPI_WINDOWS: tuple[Window, ...] = ("1m", "1h", "1d")
AGES = ("newest", "week_before")

TOPIC = Label("topic", "3: the source topics")
STANDBY = Label("partition", "SHOPSTREAM_STANDBY_PARTITIONS, at most")
PARTITION = Label("partition", "partitions of a source topic; of them those that the worker owns")
REASON = Label("reason", f"{len(Reason)}: schemas.rejects.Reason", tuple(Reason))
OPERATION = Label("operation", "2", ("insert", "query"))
ERROR_KIND = Label("kind", f"{len(SINK_ERROR_KINDS)}: pipeline.sinks.sql.SINK_ERROR_KINDS", SINK_ERROR_KINDS)
PART = Label("part", f"{len(STATE_PARTS)}", STATE_PARTS)
STATE_TABLE = Label("part", f"{len(STATE_PARTS) + len(STATE_TABLES)}: what all tables share, and each family", STATE_PARTS + STATE_TABLES)
TABLE = Label("table", f"{len(WAREHOUSE_TABLES)}: the warehouse's base tables", WAREHOUSE_TABLES)
KPI = Label("kpi", "KPIs of the definitions file")
WINDOW = Label("window", f"{len(KPI_WINDOWS)}", KPI_WINDOWS)
FUNNEL = Label("funnel", "funnels of the definitions file")
STEP = Label("step", "16: number of the step, from 1", tuple(str(n) for n in range(1, 17)))
AGE = Label("age", "2: the newest complete window, and the same one a week before", AGES)

FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
LATENCY = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 86_400.0)
SIZES = tuple(float(4**n) for n in range(10))  # 1 to 262,144

# --- what became of the events ----------------------------------------------------------------------------------------

CONSUMED = Metric(
    "shopstream_consumed_records_total",
    "counter",
    "records",
    "Records read and decided on: applied, duplicate, rejected, too late or re-keyed.",
    (TOPIC, PARTITION),
    durable=True,
)
APPLIED = Metric(
    "shopstream_applied_events_total", "counter", "events", "Events that changed the tables.", (TOPIC, PARTITION), durable=True
)
REJECTED = Metric(
    "shopstream_rejected_records_total",
    "counter",
    "records",
    "Records in the dead letters, also those too late.",
    (TOPIC, PARTITION, REASON),
    durable=True,
)
DUPLICATES = Metric(
    "shopstream_duplicate_events_total",
    "counter",
    "events",
    "Events dropped because their id was seen shortly before.",
    (TOPIC, PARTITION),
    durable=True,
)
TOO_LATE = Metric(
    "shopstream_too_late_events_total",
    "counter",
    "events",
    "Events older than the watermark by more than the allowed lateness; also in rejected records.",
    (TOPIC, PARTITION),
    durable=True,
)
REKEYED = Metric(
    "shopstream_rekeyed_records_total",
    "counter",
    "records",
    "Records sent on to the partition where their user lives, where they are consumed again.",
    (TOPIC, PARTITION),
    durable=True,
)
UNKNOWN_EVENTS = Metric(
    "shopstream_unknown_events_total", "counter", "events", "Applied events whose name is in no schema.", (TOPIC, PARTITION), durable=True
)
UNKNOWN_FIELDS = Metric(
    "shopstream_unknown_fields_total",
    "counter",
    "fields",
    "Fields of events that are in no schema; they are ignored.",
    (TOPIC, PARTITION),
    durable=True,
)

# --- how far it is ----------------------------------------------------------------------------------------------------

LAG_EVENTS = Metric(
    "shopstream_consumer_lag_events",
    "gauge",
    "events",
    "Offsets between the committed position and the topic's last stable offset; transaction markers count too until they are passed.",
    (TOPIC, PARTITION),
)
LAG_SECONDS = Metric(
    "shopstream_consumer_lag_seconds",
    "gauge",
    "seconds",
    "At most so old is the oldest record that is not committed yet: since the last one applied, or since nothing was left to read. 0 without lag.",
    (TOPIC, PARTITION),
)
COMMITTED_OFFSET = Metric(
    "shopstream_committed_offset", "gauge", "offset", "Everything before it is in a committed transaction.", (TOPIC, PARTITION)
)
STALLED_SECONDS = Metric(
    "shopstream_stalled_seconds",
    "gauge",
    "seconds",
    "How long a partition has been behind at every probe without its committed offset moving; 0 while it moves, has nothing to do or has a reason to wait.",
    (TOPIC, PARTITION),
)
WATERMARK = Metric(
    "shopstream_watermark_timestamp_seconds",
    "gauge",
    "seconds",
    "Largest event time seen, Unix time; absent before the first event.",
    (TOPIC, PARTITION),
)
FRESHNESS = Metric(
    "shopstream_freshness_seconds",
    "gauge",
    "seconds",
    "Now minus the newest event time of the worker's partitions that the warehouse has acknowledged. The pipeline's is min().",
)
LATENCY_SECONDS = Metric(
    "shopstream_end_to_end_latency_seconds",
    "histogram",
    "seconds",
    "From a record's broker timestamp to its rows acknowledged by the warehouse; one observation a run of records, of its oldest.",
    buckets=LATENCY,
)

# --- work -------------------------------------------------------------------------------------------------------------

RUN_RECORDS = Metric(
    "shopstream_run_records", "histogram", "records", "Records of a run: what one message of the worker carries.", buckets=SIZES
)
APPLY_SECONDS = Metric("shopstream_apply_seconds", "histogram", "seconds", "Decoding a run and applying it to all tables.", buckets=FAST)
FLUSH_SECONDS = Metric(
    "shopstream_flush_seconds", "histogram", "seconds", "One partition's flush: its committed Kafka transaction.", buckets=FAST
)
FLUSH_ERRORS = Metric(
    "shopstream_flush_errors_total", "counter", "flushes", "Failed transactions; the partition is taken over again each time."
)
INSERT_SECONDS = Metric(
    "shopstream_insert_seconds", "histogram", "seconds", "One insert of all partitions' changed rows, acknowledged.", buckets=FAST
)
INSERTED_ROWS = Metric("shopstream_inserted_rows_total", "counter", "rows", "Rows that the warehouse has acknowledged.", (TABLE,))
SINK_ERRORS = Metric(
    "shopstream_sink_errors_total", "counter", "errors", "Calls that the warehouse did not answer well.", (OPERATION, ERROR_KIND)
)
SINK_RETRIES = Metric("shopstream_sink_retries_total", "counter", "retries", "Inserts tried again.")
SINK_WAITING = Metric(
    "shopstream_consumption_waits_for_warehouse",
    "gauge",
    "boolean",
    "1 while nothing is consumed because the warehouse has been away for too long.",
)
UNSUNK_FLUSHES = Metric(
    "shopstream_unacknowledged_flushes", "gauge", "flushes", "Committed flushes that the warehouse has not acknowledged.", (PARTITION,)
)

# --- partitions -------------------------------------------------------------------------------------------------------

OWNED = Metric("shopstream_partitions_owned", "gauge", "partitions", "Partitions taken over and held.")
RECOVERING = Metric("shopstream_partitions_recovering", "gauge", "partitions", "Partitions assigned and not taken over yet.")
RECOVERY_RATIO = Metric(
    "shopstream_recovery_progress_ratio",
    "gauge",
    "ratio",
    "Share of its restore that a partition is done with, read and applied, 0 to 1.",
    (PARTITION,),
)
RECOVERY_SECONDS = Metric(
    "shopstream_recovery_seconds", "gauge", "seconds", "Duration of the last take-over, so far while it goes on.", (PARTITION,)
)
RECOVERY_REMAINING = Metric(
    "shopstream_recovery_remaining_seconds",
    "gauge",
    "seconds",
    "Estimate for a take-over that is going on, from its progress; absent otherwise.",
    (PARTITION,),
)
STANDBYS = Metric(
    "shopstream_standby_partitions", "gauge", "partitions", "Partitions of other workers of which this one keeps a copy up to date."
)
STANDBY_LAG = Metric(
    "shopstream_standby_lag_records",
    "gauge",
    "records",
    "Changelog offsets between a standby and the last stable offset, transaction markers included: what a take-over has to read.",
    (STANDBY,),
)
STANDBYS_DISCARDED = Metric(
    "shopstream_standbys_discarded_total",
    "counter",
    "standbys",
    "Standbys thrown away because their changelog did not go on as expected; the partition is restored instead.",
)
REBALANCES = Metric("shopstream_rebalances_total", "counter", "rebalances", "Assignments that the group has given this worker.")
RETAKEN = Metric("shopstream_partitions_retaken_total", "counter", "partitions", "Take-overs again after a failed transaction.")
BRAKED = Metric(
    "shopstream_braked", "gauge", "boolean", "1 where consumption has stopped because too many records are rejected.", (TOPIC, PARTITION)
)
CHANGELOG_SNAPSHOT = Metric(
    "shopstream_changelog_snapshot_bytes",
    "gauge",
    "bytes",
    "Compressed size of a partition's last snapshot in its changelog.",
    (PARTITION,),
)
CHANGELOG_DELTAS = Metric("shopstream_changelog_deltas_bytes", "gauge", "bytes", "Compressed size of the deltas since then.", (PARTITION,))
STATE_ROWS = Metric("shopstream_state_rows", "gauge", "rows", "Entries of the state in memory.", (PARTITION, PART))
STATE_BYTES = Metric("shopstream_state_bytes", "gauge", "bytes", "Memory reserved for the state.", (PARTITION, STATE_TABLE))

# --- the warehouse, asked every ten seconds and when the inserts pause: each worker exposes the same, take max() -----------------------------------

WAREHOUSE_ROWS = Metric(
    "shopstream_warehouse_rows",
    "gauge",
    "rows",
    "Rows of a table's active parts, superseded versions included until they are merged; absent without the right to read system.parts.",
    (TABLE,),
)
WAREHOUSE_BYTES = Metric("shopstream_warehouse_bytes", "gauge", "bytes", "Bytes on disk of a table's active parts.", (TABLE,))
KPI_VALUE = Metric(
    "shopstream_kpi",
    "gauge",
    "the KPI's own",
    "A KPI's total over a complete window; money in the shop's currency. Absent for a ratio without denominator, and for a window in which no KPI has a number.",
    (KPI, WINDOW, AGE),
)
FUNNEL_USERS = Metric(
    "shopstream_funnel_users",
    "gauge",
    "users",
    "Users that got to a step or further, of the newest entry window that has had its whole conversion window, and of the same one a week before.",
    (FUNNEL, STEP, AGE),
)
FUNNEL_RATIO = Metric(
    "shopstream_funnel_conversion_ratio",
    "gauge",
    "ratio",
    "Of the users of step 1 in that window, the share that got to this step or further.",
    (FUNNEL, STEP, AGE),
)
WATCHED_AT = Metric(
    "shopstream_warehouse_read_timestamp_seconds",
    "gauge",
    "seconds",
    "When the values above were read, Unix time; a minute later they are left out.",
)
WATCHED_SECONDS = Metric("shopstream_warehouse_read_seconds", "gauge", "seconds", "How long reading them took.")

# --- process ----------------------------------------------------------------------------------------------------------

BUILD = Metric(
    "shopstream_build_info",
    "gauge",
    "info",
    "Always 1.",
    (Label("version", "1 a process: the installed version"), Label("definitions", "1 a process: hash of the definitions in force")),
)
READY = Metric(
    "shopstream_ready", "gauge", "boolean", "1 while /readyz says so: warm, member of the group, everything assigned taken over and read."
)
PROBE_ERRORS = Metric(
    "shopstream_probe_errors_total", "counter", "errors", "Probes for the ends of the topics that failed: Kafka was away."
)

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
FOREIGN = ("process_", "python_")
"""Prefixes of what the client library exposes of the process itself: CPU, memory, file descriptors, Python's version."""


def reference() -> str:
    """The table of all metrics as Markdown."""
    lines = ["| metric | kind | unit | labels | meaning |", "| --- | --- | --- | --- | --- |"]
    for m in METRICS:
        kind = f"{m.kind}, durable" if m.durable else m.kind
        labels = ", ".join(f"`{label.name}` ({label.bound})" for label in m.labels)
        lines.append(f"| `{m.name}` | {kind} | {m.unit} | {labels} | {m.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(reference())
