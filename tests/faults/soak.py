"""`python -m tests.faults.soak --minutes 30`: random faults for as long as asked, then every number compared; memory and open files of a worker that lives all along.

Not part of the test run. SHOPSTREAM_TEST_SEED repeats the events and the order of faults; moments depend on the machine.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console

from embedded.kafka import EmbeddedKafka
from tests.clickhouse_server import ClickHouseServer, free_port
from tests.faults.rig import SESSION_SECONDS, Rig, make_day
from tests.seed import SEED

EVENTS_A_USER = 27
SAMPLE_SECONDS = 5.0
SETTLE_SECONDS = 600.0


@dataclass
class Soak:
    """Two workers: `steady` is never ended, only made to wait; `victim` suffers everything."""

    rig: Rig
    kafka: EmbeddedKafka
    server: ClickHouseServer
    console: Console
    random: random.Random = field(default_factory=lambda: random.Random(SEED))
    faults: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, int, int, float]] = field(default_factory=list)
    """Seconds, resident bytes, open files, bytes reserved for the state: of the steady worker."""

    def run(self, seconds: float) -> None:
        port = free_port()
        self.steady = psutil.Process(self.rig.start(SHOPSTREAM_METRICS_PORT=str(port)).pid)
        self.victim = self.rig.start()
        began = sampled = time.monotonic()
        due = began + 20
        while (now := time.monotonic()) - began < seconds:
            self.rig.produce(min(0.98, (now - began) / seconds))
            if now >= due:
                fault = self.random.choice(self.FAULTS)
                self.faults[fault.__name__] += 1
                self.console.log(f"{fault.__name__}, {self.rig.produced:,} events sent, {self.rig.applied():,} applied")
                fault(self)
                due = time.monotonic() + self.random.uniform(5, 30)
            if now - sampled >= SAMPLE_SECONDS:
                sampled = now
                self.look_after_the_steady_one()
                self.samples.append((now - began, self.steady.memory_info().rss, self.steady.num_fds(), state_bytes(port)))
            time.sleep(0.5)
        self.rig.produce(1)

    def look_after_the_steady_one(self) -> None:
        code = self.rig.workers[0].poll()
        assert code is None, f"the steady worker ended with {code}\n{(self.rig.folder / 'worker-00.log').read_text()[-6000:]}"

    def kill_worker(self) -> None:
        self.victim.kill()
        self.victim.wait()
        self.victim = self.rig.start()

    def restart_worker(self) -> None:
        self.victim.terminate()
        assert self.victim.wait(90) == 0, self.rig.log[-6000:]
        self.victim = self.rig.start()

    def freeze_worker(self) -> None:
        self.victim.send_signal(signal.SIGSTOP)
        time.sleep(SESSION_SECONDS + 2)
        self.victim.send_signal(signal.SIGCONT)

    def kill_warehouse(self) -> None:
        self.server.kill()
        time.sleep(self.random.uniform(1, 15))
        self.server.start()

    def kill_broker(self) -> None:
        self.kafka.kill()
        time.sleep(self.random.uniform(1, 10))
        self.rig.bring_back(self.kafka)

    FAULTS = (kill_worker, restart_worker, freeze_worker, kill_warehouse, kill_broker)

    def slopes(self) -> str:
        """The way over time, and the second half's slope by least squares."""
        half = self.samples[len(self.samples) // 2 :]
        minutes = np.array([sample[0] / 60 for sample in half])
        said = []
        for name, column, unit in (("memory, MiB", 1, 2**20), ("of it the state's", 3, 2**20), ("open files", 2, 1)):
            way = [sample[column] / unit for sample in self.samples]
            slope = np.polyfit(minutes, [sample[column] / unit for sample in half], 1)[0]
            said.append(
                f"{name}: {' '.join(f'{value:.0f}' for value in way[:: max(1, len(way) // 12)])}; {slope:+.2f} a minute in the second half"
            )
        return "\n".join(said)


def state_bytes(port: int) -> float:
    """What the worker on this metrics port says its state takes; 0 while it is too busy to say it."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return 0.0
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("shopstream_state_bytes{"))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=30)
    arguments.add_argument("--rate", type=float, default=300, help="events a second")
    options = arguments.parse_args()
    console = Console()
    with console.status("making the events and asking SQL for the truth"):
        day = make_day(SEED, round(options.minutes * 60 * options.rate / EVENTS_A_USER))
    with tempfile.TemporaryDirectory(prefix="shopstream-soak-") as name:
        folder = Path(name)
        with EmbeddedKafka(folder / "kafka", quiet=True) as kafka, ClickHouseServer() as server:
            (folder / "rig").mkdir()
            rig = Rig(kafka.bootstrap, server, day, folder / "rig", "soak")
            try:
                rig.prepare()
                soak = Soak(rig, kafka, server, console)
                soak.run(options.minutes * 60)
                rig.settle(SETTLE_SECONDS)
                soak.look_after_the_steady_one()
                rig.stop_workers()
                rig.check()
            finally:
                rig.close()
    console.print(f"{len(day.messages):,} events, {sum(soak.faults.values())} faults: {dict(soak.faults)}")
    console.print(f"every number is right; the steady worker:\n{soak.slopes()}")


if __name__ == "__main__":
    main()
