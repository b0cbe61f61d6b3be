"""Kafka's security settings, as each client wants them. `pipeline.cli.clients` makes them of the settings."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any

import faust
from faust.types.auth import AuthProtocol


@dataclass(frozen=True, slots=True)
class Security:
    """Passed through to every client."""

    protocol: str = "PLAINTEXT"
    mechanism: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None

    def context(self) -> ssl.SSLContext | None:
        return ssl.create_default_context(cafile=self.ca_file) if "SSL" in self.protocol else None

    def aiokafka(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"security_protocol": self.protocol, "ssl_context": self.context()}
        if self.protocol.startswith("SASL"):
            arguments |= {"sasl_mechanism": self.mechanism, "sasl_plain_username": self.username, "sasl_plain_password": self.password}
        return arguments

    def faust(self) -> Any:
        if self.protocol == "PLAINTEXT":
            return None
        if self.protocol == "SSL":
            return faust.SSLCredentials(self.context())
        credentials = faust.SASLCredentials(
            username=self.username, password=self.password, mechanism=self.mechanism, ssl_context=self.context()
        )
        credentials.protocol = AuthProtocol(self.protocol)
        return credentials
