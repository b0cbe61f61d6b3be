"""`python -m tests.integration.demo_memory -- --minutes 10`: a demo of those options, the memory of each of its processes all along, and what its workers warned of.

Not part of the test run. Ends with 1 when a warning has no explanation. `--samples FILE` keeps the samples as CSV (seconds, process, MiB), `--log FILE` the workers' log.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import IO

import numpy as np
import psutil

SAMPLE_SECONDS = 10.0
LOUD = ("WARN", "ERROR", "CRITICAL", "Traceback", "Warning")
EXPLAINED = {"GroupCoordinatorNotAvailableError": "a new broker makes its offsets topic when it is first asked; the worker asks again"}

Samples = dict[str, list[tuple[float, float]]]
"""By process: seconds since the start, resident MiB."""


def role(process: psutil.Process, root: int) -> str:
    """demo, worker, kafka or other."""
    if process.pid == root:
        return "demo"
    command = " ".join(process.cmdline())
    if "kafka.Kafka" in command and "watchdog" not in command:
        return "kafka"
    return f"worker {process.pid}" if command.endswith("worker") else "other"


def shows(said: IO[bytes]) -> bool:
    """Until the demo finishes: then it reads every number at once."""
    return b"finishing what was sent" not in Path(said.name).read_bytes()


def sampled(demo: subprocess.Popen[bytes], samples: Samples, seconds: float) -> None:
    for process in (root := psutil.Process(demo.pid), *root.children(recursive=True)):
        try:
            samples[role(process, demo.pid)].append((seconds, process.memory_info().rss / 2**20))
        except psutil.NoSuchProcess:
            continue


def watched(arguments: list[str], folder: Path) -> tuple[int, str, Samples, str]:
    """Exit code, what the demo said, the samples, the workers' log."""
    samples: Samples = defaultdict(list)
    log: IO[str] | None = None
    with (folder / "said").open("wb+") as said:
        command = [sys.executable, "-m", "pipeline.cli.main", "demo", *arguments]
        demo = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(folder)}, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        began = time.monotonic()
        try:
            while demo.poll() is None:
                if log is None and (found := next(folder.glob("*/workers.log"), None)):
                    log = found.open(errors="replace")  # open, it outlives its folder
                if shows(said):
                    sampled(demo, samples, time.monotonic() - began)
                try:
                    demo.wait(SAMPLE_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            demo.terminate()
            demo.wait()
        said.seek(0)
        return demo.returncode, said.read().decode(errors="replace"), samples, log.read() if log else ""


def trend(samples: list[tuple[float, float]]) -> str:
    """Of the second half, by least squares."""
    half = samples[len(samples) // 2 :]
    seconds, memory = np.array(half, np.float64).T
    slope = np.polyfit(seconds / 60, memory, 1)[0] if len(half) > 1 else 0.0
    middle, last, most = memory[0], memory[-1], max(m for _, m in samples)
    return f"{samples[0][1]:.0f} → {middle:.0f} → {last:.0f} MiB, most {most:.0f}; second half {slope:+.2f} MiB a minute"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--log", type=Path)
    parser.add_argument("demo", nargs="+", help="options of `shopstream demo`, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shopstream-memory-") as name:
        code, said, samples, log = watched(options.demo, Path(name))
    if options.samples:
        with options.samples.open("w", newline="") as file:
            csv.writer(file).writerows((f"{s:.0f}", process, f"{m:.1f}") for process, rows in samples.items() for s, m in rows)
    if options.log:
        options.log.write_text(log)
    print(said[-3000:])
    for process, rows in samples.items():
        print(f"{process}: {trend(rows)}")
    loud = [line for line in log.splitlines() if any(word in line for word in LOUD)]
    unexplained = [line for line in loud if not any(word in line for word in EXPLAINED)]
    print(
        f"workers' log: {len(log.splitlines())} lines, {len(loud)} warnings, {len(unexplained)} without an explanation",
        *loud[:50],
        sep="\n",
    )
    sys.exit(code or bool(unexplained) or not log)


if __name__ == "__main__":
    main()
