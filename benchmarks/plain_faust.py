"""The peer: a plain per-event Faust agent with one windowed table and its changelog, as the documentation shows it."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Any

import faust

bootstrap, total = sys.argv[1], int(sys.argv[2])
app = faust.App(
    f"plain-{os.getpid()}", broker=f"kafka://{bootstrap}", store="memory://", datadir=tempfile.mkdtemp(), web_enabled=False, topic_partitions=4,
    consumer_auto_offset_reset="earliest",
)  # fmt: skip
clickstream = app.topic("clickstream", value_serializer="json")
counts = app.Table("counts", default=int, partitions=4).tumbling(60.0, expires=3600.0)
seen = 0
started: tuple[float, float] = (0.0, 0.0)


@app.agent(clickstream)
async def count(stream: Any) -> None:
    global seen, started
    async for event in stream:
        if seen == 0:
            started = (time.process_time(), time.monotonic())
        counts[event["event"]] += 1
        seen += 1
        if seen == total:
            cpu, wall = time.process_time() - started[0], time.monotonic() - started[1]
            print("result", cpu / total * 1e6, total / wall, flush=True, file=sys.__stdout__)  # Faust redirects sys.stdout into its log
            os._exit(0)


if __name__ == "__main__":
    app.finalize()
    sys.argv = [sys.argv[0], "worker", "-l", "warn"]
    app.main()
