"""Kafka's jars: resolved from Maven Central into a cache of the user, each held against its SHA-256 in `jars.txt`. `embedded.kafka` asks for them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.cache import cache_folder

KAFKA_VERSION = "4.3.1"
ENDPOINT = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"
INSTALLED_VARIABLE = "KAFKA_HOME"
REMEDY = "Or use a Kafka that is there: --broker host:port, or KAFKA_HOME for an unpacked one."


class EmbeddedKafkaError(Exception):
    """The embedded broker can't be had or did not start; the message says what to do."""


def kafka_jars(quiet: bool = False) -> list[Path]:
    """The class path: `$KAFKA_HOME/libs`, or the pinned jars, fetched on first use (some 90 MB). Raises EmbeddedKafkaError when they can't be had."""
    if home := os.environ.get(INSTALLED_VARIABLE):
        jars = sorted((Path(home) / "libs").glob("*.jar"))
        if not jars:
            raise EmbeddedKafkaError(f"{INSTALLED_VARIABLE} is {home}, but there are no jars in {home}/libs. Correct it, or unset it.")
        return jars
    pinned = pinned_jars()
    try:
        with kafka_cache() as folder:
            found = _cached(folder)
            if wrong_jars(pinned, found):
                for name in wrong_jars(pinned, found):  # a download that was cut, or an older pin
                    if name in found:
                        found[name].unlink()
                found = _fetch(folder, len(pinned), quiet)
            if wrong := wrong_jars(pinned, found):
                raise EmbeddedKafkaError(f"these jars are not the pinned ones: {', '.join(wrong)}. Remove {folder} and try again. {REMEDY}")
    except OSError as error:
        raise EmbeddedKafkaError(
            f"the cache {cache_folder()} can't be used: {error}. Set SHOPSTREAM_CACHE to a folder of yours. {REMEDY}"
        ) from error
    return [found[name] for name in sorted(found)]


def pinned_jars() -> dict[str, str]:
    """Jar name → SHA-256, as checked in."""
    return dict(line.split() for line in resources.files("embedded").joinpath("jars.txt").read_text(encoding="utf-8").splitlines())


def wrong_jars(pinned: dict[str, str], found: dict[str, Path]) -> list[str]:
    """Names that are missing, unexpected, or of other content than pinned."""
    return sorted(name for name in set(pinned) | set(found) if name not in found or pinned.get(name) != _sha256(found[name]))


@contextmanager
def kafka_cache() -> Iterator[Path]:
    """The cache folder of this Kafka, held alone: first starts at the same time wait for each other."""
    folder = cache_folder() / f"kafka-{KAFKA_VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _cached(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.rglob("*.jar") if "envs" in path.parts}


def _fetch(folder: Path, count: int, quiet: bool) -> dict[str, Path]:
    try:
        import jgo
    except ImportError as error:
        raise EmbeddedKafkaError(f"the embedded Kafka needs the extra: pip install 'shopstream[embedded]'. {REMEDY}") from error
    with Progress(
        TextColumn(f"fetching Apache Kafka {KAFKA_VERSION} (once)"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True, quiet=quiet),
        transient=True,
    ) as progress:
        task = progress.add_task("jars", total=count)
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                progress.update(task, completed=len(_cached(folder)))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            return {path.name: path for path in jgo.build(ENDPOINT, cache_dir=folder).all_jars}
        except Exception as error:  # jgo raises whatever its HTTP client raises
            raise EmbeddedKafkaError(f"Kafka's jars can't be fetched from Maven Central ({error}). Check the network. {REMEDY}") from error
        finally:
            done.set()
            watcher.join()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
