"""Settings turned into what the parts take: clients' arguments, topic names, options of a worker. The commands call it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from tenacity import Retrying, retry_if_exception, wait_exponential_jitter

from pipeline.settings import Settings
from pipeline.topic_names import Topics

if TYPE_CHECKING:
    from pipeline.sinks.revisions import Revision
    from pipeline.sinks.warehouse import Warehouse
    from pipeline.streaming.options import WorkerOptions

log = logging.getLogger("shopstream")
T = TypeVar("T")

MEMBERS_KNOWN_MS = 10_000
"""So long a command believes what it knows of the brokers. kafka-python's five minutes are longer than one that was away stays away."""


class Wrong(Exception):
    """Wrong use or settings: exit code 2."""


class Failed(Exception):
    """A command could not do what it was asked for; the message says how far it came and what to do: exit code 1."""


def open_configured(settings: Settings) -> Any:
    from pipeline.sinks.open import open_warehouse

    try:
        return open_warehouse(settings.warehouse, settings.warehouse_password.get_secret_value() if settings.warehouse_password else None)
    except ValueError as error:
        raise Wrong(f"SHOPSTREAM_WAREHOUSE: {error}") from error


def is_outage(error: BaseException) -> bool:
    """Whether the warehouse or Kafka is away: the same question can be answered later."""
    from kafka.errors import KafkaError, UnknownBrokerIdError

    from pipeline.sinks.warehouse import SinkUnavailable

    if isinstance(error, KafkaError):
        return bool(error.retriable) or isinstance(error, UnknownBrokerIdError)  # the broker left and came back since the client has looked
    return isinstance(error, SinkUnavailable)


def said_of(outage: BaseException | None) -> str:
    """For a log or a terminal."""
    from kafka.errors import KafkaError

    return f"{'Kafka' if isinstance(outage, KafkaError) else 'the warehouse'} can't be reached, trying again: {outage}"


def patiently(action: Callable[[], T]) -> T:
    """Do it once the warehouse and Kafka are there."""
    return Retrying(
        retry=retry_if_exception(is_outage),
        wait=wait_exponential_jitter(0.5, 10),
        before_sleep=lambda state: log.warning(said_of(state.outcome.exception() if state.outcome else None)),
    )(action)


def revision_in_force(warehouse: Warehouse) -> int:
    """The one that reports show. Raises SinkUnavailable, and SinkRefused with what to do when the tables are an older version's."""
    from pipeline.sinks.revisions import in_force
    from pipeline.sinks.warehouse import SinkRefused

    try:
        return in_force(warehouse)
    except SinkRefused as error:
        if "current_revision" in str(error):
            raise SinkRefused(f"the warehouse lacks tables of this version: run `shopstream migrate`. ({error})") from None
        raise


def topics_in_force(settings: Settings) -> Topics:
    """For commands that need Kafka alone: those of the revision in force, of revision 0 where no server can tell."""
    from pipeline.sinks.warehouse import SinkRefused, SinkUnavailable

    names = topic_names(settings)
    if not settings.warehouse.startswith("clickhouse://"):
        return names
    opened = open_configured(settings)
    try:
        return names.at(revision_in_force(opened))
    except (SinkRefused, SinkUnavailable):
        return names
    finally:
        opened.close()


def topic_names(settings: Settings) -> Topics:
    """Those of revision 0; `at` gives those of another one."""
    return Topics(settings.clickstream_topic, settings.orders_topic, settings.app_id)


def admin_arguments(settings: Settings) -> dict[str, Any]:
    """kafka-python's arguments."""
    arguments: dict[str, Any] = {"bootstrap_servers": settings.broker.split(","), "security_protocol": settings.security_protocol}
    arguments["metadata_max_age_ms"] = MEMBERS_KNOWN_MS
    if settings.ssl_ca_file:
        arguments["ssl_cafile"] = str(settings.ssl_ca_file)
    if settings.sasl_mechanism and settings.sasl_password:
        arguments |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_username,
            "sasl_plain_password": settings.sasl_password.get_secret_value(),
        }
    return arguments


def options_at(settings: Settings, ancestry: list[Revision]) -> WorkerOptions:
    """A worker's options at a revision: the first of its ancestry."""
    options, names, one = worker_options(settings), topic_names(settings), ancestry[0]
    return replace(
        options,
        topics=names.at(one.revision),
        partition=replace(options.partition, rows_since_ms=one.since),
        follows=tuple(names.at(each.revision) for each in ancestry[1:]),
        moved=one.moved,
    )


def worker_options(settings: Settings) -> WorkerOptions:
    from pipeline.partition import Options
    from pipeline.pseudonyms import Pseudonyms
    from pipeline.streaming.options import FlushOptions, WorkerOptions
    from pipeline.streaming.security import Security

    return WorkerOptions(
        settings.broker,
        topic_names(settings),
        Security(
            settings.security_protocol,
            settings.sasl_mechanism,
            settings.sasl_username,
            settings.sasl_password.get_secret_value() if settings.sasl_password else None,
            str(settings.ssl_ca_file) if settings.ssl_ca_file else None,
        ),
        Options(settings.max_message_bytes, settings.brake_ratio, settings.brake_records),
        FlushOptions(settings.flush_seconds, settings.sink_lag_seconds, settings.idle_seconds),
        settings.session_seconds,
        settings.accept_deleted_events,
        settings.transaction_seconds,
        metrics_host=settings.metrics_host,
        metrics_port=settings.metrics_port,
        stuck_seconds=settings.stuck_seconds,
        standby_partitions=settings.standby_partitions,
        pseudonyms=Pseudonyms(settings.pseudonym_secret.get_secret_value().encode()) if settings.pseudonym_secret else None,
    )


def aiokafka_arguments(settings: Settings) -> dict[str, Any]:
    """aiokafka's arguments."""
    return worker_options(settings).client()
