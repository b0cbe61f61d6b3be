"""docker-compose.yml as tests read it: its services, the `shopstream` commands and settings in it, and the files that it mounts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}


def settings_of(service: Mapping[str, Any]) -> dict[str, str]:
    return {name: value for name, value in service.get("environment", {}).items() if name.startswith("SHOPSTREAM_")}


def commands_of(service: Mapping[str, Any]) -> list[list[str]]:
    """The arguments of each `shopstream` that the service runs."""
    words: list[str] = service["command"]
    if words[:2] == ["sh", "-c"]:
        return [shlex.split(part)[1:] for part in words[2].split("&&")]
    assert words[0] == "shopstream"
    return [words[1:]]


def mounts() -> Iterator[tuple[str, Path, str]]:
    """Service, file or folder of the repository, place in the container."""
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source, target = volume.split(":")[:2]
            if source.startswith("."):
                yield name, ROOT / source, target


def checked_address(service: Mapping[str, Any]) -> str:
    """The URL that the service's health check asks for; '' when it asks otherwise."""
    found = re.search(r"http://[\w.:-]+[\w/.-]*", " ".join(service["healthcheck"].get("test", [])))
    return found[0] if found else ""
