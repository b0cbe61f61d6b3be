"""Writes the bundled sample: `python -m generator.sample [folder]` makes clickstream.ndjson.gz and orders.ndjson.gz, one message a line.

The same bytes each time. An empty record can't be a line of NDJSON and is left out.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

from generator.shop import shop

SEED, USERS, DAYS = 11, 900, 21


def write(folder: Path) -> dict[str, int]:
    """Lines written by topic."""
    lines: dict[str, list[bytes]] = {"clickstream": [], "orders": []}
    for message in shop(SEED, USERS, DAYS):
        if message.value:
            lines[message.topic].append(message.value)
    folder.mkdir(parents=True, exist_ok=True)
    for topic, values in lines.items():
        data = b"".join(value + b"\n" for value in values)
        (folder / f"{topic}.ndjson.gz").write_bytes(gzip.compress(data, 9, mtime=0))
    return {topic: len(values) for topic, values in lines.items()}


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "sample")
    for topic, count in write(target).items():
        print(f"{target / topic}.ndjson.gz: {count} lines, {(target / f'{topic}.ndjson.gz').stat().st_size} bytes")  # noqa: T201
