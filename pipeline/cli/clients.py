"""Settings turned into what the parts take: clients' arguments, topic names, options of a worker. The commands call it."""

from __future__ import annotations

from typing import Any

from pipeline.partition import Topics
from pipeline.settings import Settings


class Wrong(Exception):
    """Wrong use or settings: exit code 2."""


def open_configured(settings: Settings) -> Any:
    from pipeline.sinks.open import open_warehouse

    try:
        return open_warehouse(settings.warehouse, settings.warehouse_password.get_secret_value() if settings.warehouse_password else None)
    except ValueError as error:
        raise Wrong(f"SHOPSTREAM_WAREHOUSE: {error}") from error


def topic_names(settings: Settings) -> Topics:
    return Topics(settings.clickstream_topic, settings.orders_topic, settings.app_id)


def admin_arguments(settings: Settings) -> dict[str, Any]:
    """kafka-python's arguments."""
    arguments: dict[str, Any] = {"bootstrap_servers": settings.broker.split(","), "security_protocol": settings.security_protocol}
    if settings.ssl_ca_file:
        arguments["ssl_cafile"] = str(settings.ssl_ca_file)
    if settings.sasl_mechanism and settings.sasl_password:
        arguments |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_username,
            "sasl_plain_password": settings.sasl_password.get_secret_value(),
        }
    return arguments


def worker_options(settings: Settings) -> Any:
    from pipeline.partition import Options
    from pipeline.streaming.app import Security, WorkerOptions
    from pipeline.streaming.owner import FlushOptions

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
    )


def aiokafka_arguments(settings: Settings) -> dict[str, Any]:
    """aiokafka's arguments."""
    return {"bootstrap_servers": settings.broker, **worker_options(settings).security.aiokafka()}
