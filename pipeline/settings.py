"""Settings from the environment (`SHOPSTREAM_*`), from files beside secrets (`…_FILE`) and an optional TOML file; frozen, checked once at the start.

Only the commands import this. What the numbers mean is not here but in the definitions file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, FilePath, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

PREFIX = "SHOPSTREAM_"
FILE_VARIABLE = "SHOPSTREAM_SETTINGS"


class SettingsError(Exception):
    """A setting is wrong or missing; the message names where it was set, which one, and what to do."""


class Settings(BaseSettings):
    """Every setting. Environment wins over the file that SHOPSTREAM_SETTINGS names."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    broker: str = Field("127.0.0.1:9092", description="Kafka's bootstrap servers, host:port separated by commas")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field("PLAINTEXT", description="how Kafka is spoken to")
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        None, description="PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512; with a SASL protocol"
    )
    sasl_username: str | None = Field(None, description="with a SASL protocol")
    sasl_password: SecretStr | None = Field(None, repr=False, description="with a SASL protocol")
    ssl_ca_file: FilePath | None = Field(None, description="certificates to trust instead of the system's")
    app_id: str = Field(
        "shopstream", pattern=r"^[A-Za-z0-9._-]{1,100}$", description="consumer group, transactional ids, names of internal topics"
    )
    clickstream_topic: str = Field("clickstream", description="topic of the clickstream events")
    orders_topic: str = Field("orders", description="topic of the order events")
    partitions: int = Field(4, ge=1, le=10_000, description="of every topic, when `topics` creates them")
    replication_factor: int = Field(1, ge=1, le=10, description="of every topic, when `topics` creates them; 3 on a cluster")
    min_insync_replicas: int = Field(1, ge=1, le=10, description="2 with 3 replicas: what is acknowledged survives the loss of a broker")
    warehouse: str = Field(
        "clickhouse://default@127.0.0.1:9000/shopstream", description="chdb:///folder or clickhouse://user@host:port/database"
    )
    warehouse_password: SecretStr | None = Field(None, repr=False, description="never part of the URL")
    pseudonym_secret: SecretStr | None = Field(
        None,
        min_length=16,
        repr=False,
        description="with it no user id leaves Kafka: the warehouse gets a pseudonym for the key of a rejected record and not its bytes; "
        "at least 16 characters",
    )
    definitions: FilePath | None = Field(None, description="a shopstream.toml; the bundled default when not set")
    flush_seconds: float = Field(0.5, gt=0, le=60, description="between two transactions of a partition; rows follow at once")
    sink_lag_seconds: float = Field(60, gt=0, description="how long the warehouse may be away before consumption waits for it")
    idle_seconds: float = Field(60, ge=0, description="after which a topic that is read to its end holds no watermark back; 0: never")
    session_seconds: float = Field(
        10,
        ge=1,
        le=300,
        description="Kafka's session timeout: how long a killed worker's partitions stay unowned; below 6 the broker must allow it",
    )
    standby_partitions: int = Field(
        0,
        ge=0,
        le=10_000,
        description="of other workers, of how many a worker keeps a copy up to date: their take-over needs no restore; each costs the memory of one",
    )
    transaction_seconds: float = Field(
        60,
        ge=1,
        le=3600,
        description="how long a transaction of a partition may take, Kafka aborts it then: more for a large state and a slow network, at most the broker's "
        "transaction.max.timeout.ms (15 minutes by default)",
    )
    accept_deleted_events: bool = Field(
        False, description="go on where retention has deleted events that were not read yet, instead of stopping"
    )
    metrics_host: str = Field("127.0.0.1", min_length=1, description="where /metrics, /healthz and /readyz are served")
    metrics_port: int = Field(9464, ge=0, le=65_535, description="their port, one of its own for each worker on a machine; 0: not served")
    stuck_seconds: float = Field(
        120,
        ge=0,
        description="a worker whose committed offsets have not moved for so long, without a reason to wait, ends itself; 0: never",
    )
    max_message_bytes: int = Field(1 << 20, ge=1024, description="a larger record is rejected as too_large")
    brake_ratio: float = Field(
        0.5, gt=0, le=1, description="consumption of a topic stops when more of its records than this would be rejected"
    )
    brake_records: int = Field(1000, ge=1, description="the records in a row of a topic partition by which the ratio is judged")

    @model_validator(mode="after")
    def _belongs_together(self) -> Settings:
        sasl = (self.sasl_mechanism, self.sasl_username, self.sasl_password)
        if self.security_protocol.startswith("SASL") and None in sasl:
            raise ValueError(f"security_protocol {self.security_protocol} needs sasl_mechanism, sasl_username and sasl_password")
        if not self.security_protocol.startswith("SASL") and any(sasl):
            raise ValueError(
                f"sasl_… is set, but security_protocol {self.security_protocol} uses none of it: set SASL_SSL, or leave sasl_… out"
            )
        if self.min_insync_replicas > self.replication_factor:
            raise ValueError(f"min_insync_replicas {self.min_insync_replicas} can't be met by replication_factor {self.replication_factor}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        named = os.environ.get(FILE_VARIABLE)
        return (init_settings, env_settings, *((TomlConfigSettingsSource(settings_cls, Path(named)),) if named else ()))


def load_settings(**given: object) -> Settings:
    """The settings in force; `given` (from the command line, None for what was not given) wins. Raises SettingsError."""
    named = os.environ.get(FILE_VARIABLE)
    if named and not Path(named).is_file():
        raise SettingsError(f"{FILE_VARIABLE} names {named}, which is not a file: create it or unset the variable")
    known = set(Settings.model_fields)
    for variable in os.environ:
        name = variable.removeprefix(PREFIX).lower()
        if variable.startswith(PREFIX) and name not in known | {
            "settings",
            "cache",
            "warehouse_key",
            "kafka_heap",
            "test_seed",
            "fault",
            *(f"{k}_file" for k in _secrets()),
        }:
            raise SettingsError(f"environment variable {variable} is no setting of Shopstream: remove it or correct its name")
    values = {key: value for key, value in given.items() if value is not None}
    for name in _secrets():
        path = os.environ.get(f"{PREFIX}{name.upper()}_FILE")
        if path:
            try:
                values.setdefault(name, Path(path).read_text().strip())
            except OSError as error:
                raise SettingsError(f"{PREFIX}{name.upper()}_FILE: {path} can't be read: {error.strerror}") from error
    try:
        return Settings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        where = f"the environment or {named}" if named else "the environment or an option"
        lines = [_line(list(e["loc"]), e["msg"]) for e in error.errors(include_input=False, include_url=False)]
        raise SettingsError(f"wrong settings (from {where}):\n  " + "\n  ".join(lines)) from None
    except ValueError as error:
        raise SettingsError(f"{named}: {error}") from error


def _line(place: list[object], message: str) -> str:
    message = message.removeprefix("Value error, ")
    if message.startswith("Extra inputs"):
        message = "is no setting of Shopstream: remove it or correct its name"
    return f"{PREFIX}{'.'.join(map(str, place)).upper()}: {message}" if place else message


def _secrets() -> tuple[str, ...]:
    return ("sasl_password", "warehouse_password", "pseudonym_secret")
