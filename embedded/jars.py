"""Kafka's jars: resolved from Maven Central into a cache of the user, each held against its SHA-256 in `jars.txt`."""

from __future__ import annotations

import fcntl
import hashlib
from importlib import resources
from pathlib import Path

from rich.console import Console

from pipeline.cache import cache_folder

KAFKA_VERSION = "4.3.1"
ENDPOINT = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"


class EmbeddedKafkaError(Exception):
    """The embedded broker can't be had or did not start; the message says what to do."""


def kafka_jars(quiet: bool = False) -> list[Path]:
    """The class path, fetched on first use (some 90 MB). Raises EmbeddedKafkaError when a jar is missing, unexpected or altered."""
    expected = dict(line.split() for line in resources.files("embedded").joinpath("jars.txt").read_text().splitlines())
    folder = cache_folder() / f"kafka-{KAFKA_VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = {path.name: path for path in folder.rglob("*.jar") if "envs" in path.parts}
        if set(found) != set(expected):
            found = _fetch(folder, quiet)
        wrong = sorted(name for name in set(expected) | set(found) if name not in found or expected.get(name) != _sha256(found[name]))
    if wrong:
        raise EmbeddedKafkaError(f"these jars are not the pinned ones: {', '.join(wrong)}. Remove {folder} and try again, or set --broker.")
    return list(found.values())


def _fetch(folder: Path, quiet: bool) -> dict[str, Path]:
    try:
        import jgo
    except ImportError as error:
        raise EmbeddedKafkaError("the embedded Kafka needs the extra: pip install 'shopstream[embedded]', or set --broker.") from error
    console = Console(stderr=True, quiet=quiet)
    try:
        with console.status(f"fetching Apache Kafka {KAFKA_VERSION} (46 jars, once)"):
            jars = jgo.build(ENDPOINT, cache_dir=folder).all_jars
    except Exception as error:  # jgo raises whatever its HTTP client raises
        raise EmbeddedKafkaError(f"Kafka's jars can't be fetched from Maven Central ({error}). Check the network, or set --broker.") from error
    return {path.name: path for path in jars}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
