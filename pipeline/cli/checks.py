"""What `shopstream doctor` looks at: each check asks one part of the outside world, changes nothing, and gives findings with remedies."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError
from kafka.structs import TopicPartition

from pipeline.cache import cache_folder
from pipeline.cli.clients import Wrong, admin_arguments, open_configured, topic_names, topics_in_force
from pipeline.cli.reading import check_folder, embedded_folder, masked
from pipeline.reports.text import duration
from pipeline.settings import Settings
from pipeline.sinks import migrations
from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable, Warehouse
from pipeline.topic_names import LARGEST_MESSAGE, Topics
from pipeline.topics import KEEPS_ALL, TopicsError, connect, partition_counts, wanted_topics

State = Literal["ok", "warn", "fail"]
DAY_MS = 86_400_000
CLOCK_WARN_MS = 2_000
CLOCK_FAIL_MS = 60_000
"""Event times ahead of the broker's by more than max_future (5 minutes by default) are rejected: a minute of drift is a fifth of that."""
DISK_WARN_BYTES = 2 << 30
DISK_FAIL_BYTES = 200 << 20
LATEST, NEWEST_RECORD = -1, -3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. remedy: what to do, '' when there is nothing to do."""

    check: str
    state: State
    found: str
    remedy: str = ""


def check_broker(settings: Settings, seconds: float) -> list[Finding]:
    admin = connect(_client(settings, seconds))
    try:
        cluster = admin.describe_cluster()
    finally:
        admin.close()
    brokers = len(cluster.get("brokers") or [])
    found = [Finding("broker", "ok", f"{settings.broker} answers, {brokers} broker{'s' if brokers != 1 else ''}")]
    if brokers > 1 and settings.replication_factor == 1:
        remedy = "set SHOPSTREAM_REPLICATION_FACTOR=3 and SHOPSTREAM_MIN_INSYNC_REPLICAS=2 before `shopstream topics`"
        found.append(Finding("broker", "warn", "topics would be made with one replica on a cluster of several", remedy))
    return found


def check_topics(settings: Settings, seconds: float) -> list[Finding]:
    topics = topics_in_force(settings)
    admin = connect(_client(settings, seconds))
    try:
        counts = partition_counts(admin, list(wanted_topics(topics)))
        there = [name for name, count in counts.items() if count]
        configs = _configs(admin, there)
    finally:
        admin.close()
    return [*_partitions(counts, settings), *(finding for name in there for finding in _config(name, configs.get(name, {}), topics))]


def _partitions(counts: dict[str, int], settings: Settings) -> list[Finding]:
    if missing := [name for name, count in counts.items() if not count]:
        return [Finding("topics", "fail", f"missing: {', '.join(missing)}", "run `shopstream topics`")]
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        remedy = "add partitions where they are missing, then `shopstream rebuild --from earliest`: state belongs to a partition number"
        return [Finding("topics", "fail", f"not co-partitioned: {listed}", remedy)]
    number = next(iter(counts.values()))
    found = [Finding("topics", "ok", f"{len(counts)} topics of {number} partitions")]
    if number != settings.partitions:
        remedy = f"say SHOPSTREAM_PARTITIONS={number}: workers follow the topics, only `shopstream topics` reads the setting"
        found.append(Finding("topics", "warn", f"SHOPSTREAM_PARTITIONS is {settings.partitions}, the topics have {number}", remedy))
    return found


def _configs(admin: Any, names: list[str]) -> dict[str, dict[str, str]]:
    if not names:
        return {}
    found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in names], config_filter="all")
    return {
        name: {key: str(data["value"]) for key, data in of.items()} for by_name in found.values() for name, of in by_name.items()
    }  # by kind of resource, then by name


def _config(name: str, config: dict[str, str], topics: Topics) -> list[Finding]:
    found = []
    if name == topics.changelog:
        for key, needed in KEEPS_ALL.items():
            if config.get(key, needed) != needed:
                remedy = f"set {key}={needed} on {name} now: what is deleted of it is lost at the next restart"
                found.append(Finding("topics", "fail", f"{name} holds the state, but has {key}={config[key]}", remedy))
    elif "compact" in config.get("cleanup.policy", ""):
        found.append(
            Finding(
                "topics", "fail", f"{name} is compacted: events of one user overwrite each other", f"set cleanup.policy=delete on {name}"
            )
        )
    retention = int(config.get("retention.ms", "-1"))
    if name in topics.sources and 0 <= retention < DAY_MS:
        remedy = f"raise retention.ms of {name}: a worker that is away for longer loses events"
        found.append(Finding("topics", "warn", f"{name} keeps records for {duration(retention)} only", remedy))
    largest = int(config.get("max.message.bytes", LARGEST_MESSAGE))
    if name not in topics.sources and largest < LARGEST_MESSAGE:
        remedy = f"set max.message.bytes={LARGEST_MESSAGE} on {name}"
        found.append(
            Finding("topics", "warn", f"{name} refuses records above {largest:,} bytes: a large reject would stop the worker", remedy)
        )
    return found


def check_group(settings: Settings, seconds: float) -> list[Finding]:
    topics = topics_in_force(settings)
    admin = connect(_client(settings, seconds))
    try:
        group = admin.describe_groups([topics.app_id]).get(topics.app_id, {})
        counts = partition_counts(admin, list(topics.sources))
        ends = _offsets(admin, counts, LATEST)
        committed = admin.list_group_offsets({topics.app_id: None}).get(topics.app_id, {})
    finally:
        admin.close()
    state, members = str(group.get("group_state") or "Dead"), len(group.get("members") or [])
    lag = sum(max(0, end - _committed(committed, place)) for place, (end, _) in ends.items())
    waiting = f"{lag:,} records to read"
    partitions = max(counts.values(), default=0)
    if not members:
        return [Finding("workers", "warn", f"no worker in group {topics.app_id}; {waiting}", "start `shopstream worker`")]
    who = f"{members} worker{'s' if members != 1 else ''} in group {topics.app_id}, {state.lower()}"
    if state != "Stable":
        return [
            Finding("workers", "warn", f"{who}; {waiting}", "a rebalance takes seconds: look again; if it stays, look at the workers' logs")
        ]
    found = [Finding("workers", "ok", f"{who}; {waiting} (as of the last commit, 5 s at most)")]
    if members > partitions:
        found.append(
            Finding("workers", "warn", f"{members} workers for {partitions} partitions", "the extra ones only stand by: stop them")
        )
    return found


def _committed(committed: dict[Any, Any], place: TopicPartition) -> int:
    found = committed.get(place)
    return max(0, int(found.offset)) if found is not None else 0


def _offsets(admin: Any, counts: dict[str, int], which: int) -> dict[TopicPartition, tuple[int, int]]:
    """(offset, timestamp in ms) of each partition."""
    places = {TopicPartition(topic, p): which for topic, count in counts.items() for p in range(count)}
    if not places:
        return {}
    return {place: (int(found.offset), int(found.timestamp)) for place, found in admin.list_partition_offsets(places).items()}


def check_record_times(settings: Settings, seconds: float) -> list[Finding]:
    """Kafka tells nobody its clock; the newest record's timestamp says whether producers are ahead of this machine."""
    topics = topic_names(settings)
    admin = connect(_client(settings, seconds))
    try:
        newest = max((at for _, at in _offsets(admin, partition_counts(admin, list(topics.sources)), NEWEST_RECORD).values()), default=-1)
    except KafkaError:
        return []  # brokers before 3.0 can't tell
    finally:
        admin.close()
    if newest < 0:
        return [Finding("clock", "ok", "no record in the source topics yet")]
    ahead = newest - int(time.time() * 1000)
    if ahead <= CLOCK_WARN_MS:
        return [Finding("clock", "ok", f"newest record sent {duration(max(0, -ahead))} ago")]
    state: State = "fail" if ahead > CLOCK_FAIL_MS else "warn"
    return [
        Finding(
            "clock",
            state,
            f"newest record is stamped {duration(ahead)} ahead of this machine",
            "set the clocks of producers and workers by NTP",
        )
    ]


def check_warehouse(settings: Settings, seconds: float) -> list[Finding]:
    """Reachable, its migrations, its clock. Raises nothing of the warehouse's."""
    try:
        check_folder(settings.warehouse)
        opened = open_configured(settings)
    except Wrong as error:
        return [
            Finding("warehouse", "fail", str(error), "`shopstream migrate` makes an embedded one; SHOPSTREAM_WAREHOUSE says which it is")
        ]
    except SinkRefused as error:
        held = "one process at a time" in str(error)
        remedy = "a worker, a demo or a report has it open: look at it from there" if held else "correct SHOPSTREAM_WAREHOUSE"
        return [Finding("warehouse", "warn" if held else "fail", str(error), remedy)]
    try:
        version = str(opened.query("SELECT version()")[0][0])
        found = [Finding("warehouse", "ok", f"{masked(settings.warehouse)} answers, ClickHouse {version}")]
        elsewhere = _warehouse_disks(opened) if embedded_folder(settings.warehouse) is None else []
        return [*found, *_migrations(opened), *_warehouse_clock(opened), *elsewhere]
    except SinkUnavailable as error:
        return [Finding("warehouse", "fail", str(error), "start it, or correct SHOPSTREAM_WAREHOUSE")]
    except SinkRefused as error:
        remedy = (
            "run `shopstream migrate`"
            if "migrations" in str(error)
            else "correct SHOPSTREAM_WAREHOUSE, its user or SHOPSTREAM_WAREHOUSE_PASSWORD"
        )
        return [Finding("warehouse", "fail", str(error), remedy)]
    finally:
        opened.close()


def _migrations(warehouse: Warehouse) -> list[Finding]:
    try:
        applied = {str(name): str(checksum) for name, checksum in warehouse.query("SELECT name, checksum FROM schema_migrations")}
    except SinkRefused:
        applied = {}
    known = {migration.name: migration.checksum for migration in migrations.load()}
    if missing := [name for name in known if name not in applied]:
        return [Finding("migrations", "fail", f"missing: {', '.join(missing)}", "run `shopstream migrate`")]
    if changed := [name for name, checksum in known.items() if applied[name] != checksum]:
        return [
            Finding("migrations", "fail", f"changed after they were applied: {', '.join(changed)}", "install the version that applied them")
        ]
    if newer := sorted(applied.keys() - known.keys()):
        return [Finding("migrations", "warn", f"the warehouse is newer than this program: {', '.join(newer)}", "update this program")]
    return [Finding("migrations", "ok", f"all {len(known)} applied")]


def _warehouse_clock(warehouse: Warehouse) -> list[Finding]:
    before = time.time()
    there = int(warehouse.query("SELECT toUnixTimestamp(now())")[0][0])
    after = time.time()
    apart = 1000 * (there + 0.5 - (before + after) / 2)  # it tells whole seconds
    if abs(apart) < CLOCK_WARN_MS:
        return [Finding("clock", "ok", "warehouse and this machine agree within 2 s")]
    state: State = "fail" if abs(apart) > CLOCK_FAIL_MS else "warn"
    return [
        Finding(
            "clock",
            state,
            f"the warehouse's clock is {duration(abs(apart))} {'ahead' if apart > 0 else 'behind'}",
            "set both clocks by NTP",
        )
    ]


def _warehouse_disks(warehouse: Warehouse) -> list[Finding]:
    try:
        rows = warehouse.query("SELECT name, path, free_space FROM system.disks")
    except (SinkRefused, SinkUnavailable):
        return []  # before 19.15, or not allowed to look
    return [_space(f"the warehouse's disk {name}", int(free)) for name, _, free in rows if 0 < int(free) < 1 << 62]


def check_disk(settings: Settings, _: float) -> list[Finding]:
    places = {"temporary files": Path(tempfile.gettempdir()), "compiled kernels": cache_folder()}
    if folder := embedded_folder(settings.warehouse):
        places["the embedded warehouse"] = Path(folder)
    by_device: dict[int, tuple[list[str], int]] = {}
    for what, place in places.items():
        there = next((p for p in (place.absolute(), *place.absolute().parents) if p.exists()), Path("/"))
        by_device.setdefault(there.stat().st_dev, ([], shutil.disk_usage(there).free))[0].append(what)
    return [_space(", ".join(whats), free) for whats, free in by_device.values()]


def _space(what: str, free: int) -> Finding:
    state: State = "fail" if free < DISK_FAIL_BYTES else "warn" if free < DISK_WARN_BYTES else "ok"
    return Finding(
        "disk", state, f"{free / 1e9:,.1f} GB free for {what}", "" if state == "ok" else "make room: a full disk stops the worker"
    )


def _client(settings: Settings, seconds: float) -> dict[str, Any]:
    limit = int(seconds * 800)  # its own error, which says more, comes before the time limit
    return {**admin_arguments(settings), "bootstrap_timeout_ms": limit, "request_timeout_ms": limit}


KAFKA_ERRORS = (KafkaError, OSError, TopicsError, ValueError)
