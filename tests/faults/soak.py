"""`python -m tests.faults.soak --minutes 30`: random faults for as long as asked, then every number compared; memory and open files of a worker that lives all along.

Not part of the test run. SHOPSTREAM_TEST_SEED repeats the events and the order of faults; moments depend on the machine.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console

from embedded.kafka import EmbeddedKafka
from tests.clickhouse_server import ClickHouseServer
from tests.faults.rig import SEED, SESSION_SECONDS, Rig, make_day
from tests.faults.test_kafka_faults import bring_back

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
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        self.steady = psutil.Process(self.rig.start().pid)
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
                self.samples.append((now - began, self.steady.memory_info().rss, self.steady.num_fds()))
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
        bring_back(self.rig, self.kafka)

    FAULTS = (kill_worker, restart_worker, freeze_worker, kill_warehouse, kill_broker)

    def slopes(self) -> str:
        """Of the second half, by least squares."""
        half = self.samples[len(self.samples) // 2 :]
        minutes, memory, files = np.array(half, np.float64).T
        minutes /= 60
        return (
            f"memory {memory[0] / 2**20:.0f} → {memory[-1] / 2**20:.0f} MiB, {np.polyfit(minutes, memory / 2**20, 1)[0]:+.2f} MiB a minute; "
            f"open files {files[0]:.0f} → {files[-1]:.0f}, {np.polyfit(minutes, files, 1)[0]:+.2f} a minute"
        )


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
    console.print(f"every number is right; the steady worker: {soak.slopes()}")


if __name__ == "__main__":
    main()
