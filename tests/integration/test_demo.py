"""`shopstream demo`, the whole of it: its numbers equal the generator's however it is ended, and nothing of it is left."""

from __future__ import annotations

import fcntl
import os
import pty
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from urllib.request import urlopen
from uuid import uuid4

import pytest

from generator.answers import DEMO_FILE, Answers
from generator.live import LiveShop
from pipeline.cli.demo_check import verdict
from pipeline.definitions_file import load
from pipeline.sinks.embedded import EmbeddedWarehouse
from tests.integration.driving import reported, same
from tests.oracle.sql import Oracle
from tests.seed import SEED

TERMINAL_SECONDS = 150.0
VISITORS = 100
SMALL = ("--visitors", str(VISITORS), "--head-start", "2", "--seed", str(SEED))


class Demo:
    """The command in a session of its own with a folder for temporary files; every process that it starts carries its mark."""

    def __init__(self, folder: Path, *arguments: str, terminal: int | None = None) -> None:
        self._mark = uuid4().hex
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        sized = ("COLUMNS", "LINES")  # a runner's own size would stand for the terminal's
        kept = {k: v for k, v in os.environ.items() if k not in sized and (not k.startswith("SHOPSTREAM_") or k == "SHOPSTREAM_CACHE")}
        environment = kept | {
            "DEMO_TEST_MARK": self._mark,
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TERM": "xterm-256color",
            "PYTHONUNBUFFERED": "1",
        }
        command = [sys.executable, "-m", "pipeline.cli.main", "demo", *arguments]
        out: int = subprocess.PIPE if terminal is None else terminal
        error = subprocess.STDOUT if terminal is None else terminal
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=error, start_new_session=True
        )

    def signal(self, number: int) -> None:
        """To the whole process group, as the terminal's Ctrl-C goes."""
        os.killpg(self.process.pid, number)

    def left(self) -> list[str]:
        """Processes and temporary files that should not be there."""
        deadline = time.monotonic() + 10  # the watchdog of the broker looks twice a second
        while (found := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found + [str(path) for path in self.temporary.iterdir()]

    def _processes(self) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self._mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found


def line_with(demo: Demo, text: str) -> str:
    assert demo.process.stdout is not None
    said = []
    for raw in demo.process.stdout:
        said.append(raw.decode())
        if text in said[-1]:
            return said[-1]
    raise AssertionError(f"the demo ended without saying {text!r}:\n{''.join(said)}")


def test_it_ends_by_itself_and_its_numbers_equal_the_generators_and_sqls(tmp_path: Path) -> None:
    minutes = random.Random(SEED).uniform(0.02, 0.3)
    demo = Demo(tmp_path, "--minutes", f"{minutes:.3f}", "--speed", "40000", *SMALL, "--warehouse", str(tmp_path / "kept"))
    said = demo.process.communicate(timeout=400)[0].decode()
    assert demo.process.returncode == 0, said
    assert "numbers equal the generator's" in said
    assert "funnel of" in said
    assert "\x1b[" not in said
    assert demo.left() == []
    check_against_sql(tmp_path / "kept", said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_at_any_moment_its_numbers_equal_sqls(tmp_path: Path, number: signal.Signals) -> None:
    demo = Demo(tmp_path, "--speed", "20000", *SMALL, "--warehouse", str(tmp_path / "kept"))
    line_with(demo, "active users")
    time.sleep(random.Random(f"{SEED} {number}").uniform(0, 10))
    demo.signal(number)
    said = demo.process.communicate(timeout=120)[0].decode()
    assert demo.process.returncode == 0, said
    check_against_sql(tmp_path / "kept", said)


def check_against_sql(folder: Path, said: str) -> None:
    """Every row of the kept reports, against SQL over the messages that were sent, which the seed makes once more."""
    sent = int(re.search(r"sent ([\d,]+) events", said)[1].replace(",", ""))  # type: ignore[index]
    facts = [(m.topic, m.value) for m in islice(LiveShop(SEED, VISITORS).messages(), sent) if m.fact]
    assert len(facts) > 100
    warehouse = EmbeddedWarehouse(str(folder))
    try:
        oracle = Oracle(warehouse.query, load(DEMO_FILE), facts)
        truth = (oracle.funnels(), oracle.retentions(), oracle.kpis())
        for kind, found, wanted in zip(("funnels", "retentions", "KPIs"), reported(warehouse), truth, strict=True):
            same(f"{kind} (SHOPSTREAM_TEST_SEED={SEED})", found, wanted)
    finally:
        warehouse.close()


def test_ctrl_c_finishes_compares_and_leaves_nothing(tmp_path: Path) -> None:
    demo = Demo(tmp_path, *SMALL)
    address = line_with(demo, "metrics at ").split("metrics at ")[1].strip()
    before, behind = sent_and_lag(line_with(demo, "active users"))
    scraped = scrape(address)
    after, _ = sent_and_lag(line_with(demo, "active users"))
    deadline = time.monotonic() + 60
    while not scrape(address)["shopstream_kpi"] and time.monotonic() < deadline:  # the worker asks every 10 s
        time.sleep(1)
    watched = scrape(address)["shopstream_kpi"]
    demo.signal(signal.SIGINT)
    said = demo.process.communicate(timeout=120)[0].decode()
    assert demo.process.returncode == 0, said
    assert "numbers equal the generator's" in said
    assert "Traceback" not in said
    assert demo.left() == []
    known = ("applied_events", "duplicate_events", "rejected_records", "too_late_events")
    assert 0 < before - behind <= sum(scraped[f"shopstream_{name}_total"] for name in known) <= after
    assert watched > 0


def sent_and_lag(line: str) -> tuple[int, int]:
    sent, lag = re.search(r"([\d,]+) events \([\d,]+/s, lag ([\d,]+)\)", line).groups()  # type: ignore[union-attr]
    return int(sent.replace(",", "")), int(lag.replace(",", ""))


def scrape(address: str) -> Counter[str]:
    """The sum of each metric's series."""
    sums: Counter[str] = Counter()
    with urlopen(address, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if not line.startswith("#"):
                series, value = line.rsplit(" ", 1)
                sums[series.split("{")[0]] += float(value)  # type: ignore[assignment]
    return sums


def test_a_metrics_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        demo = Demo(tmp_path, *SMALL, "--metrics-port", str(port))
        said = demo.process.communicate(timeout=120)[0].decode()
    assert demo.process.returncode == 2, said
    assert f"127.0.0.1:{port}" in said
    assert "--metrics-port" in said
    assert demo.left() == []


def test_sigterm_on_a_terminal_gives_the_screen_back_and_leaves_nothing(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    demo = Demo(tmp_path, *SMALL, terminal=theirs)
    os.close(theirs)
    shown = b""
    resized = told = False
    deadline = time.monotonic() + TERMINAL_SECONDS
    while chunk := _read(ours, deadline):
        shown += chunk
        if not resized and shown.count(b"retention visitors") >= 2:
            resized = True
            fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 48, 160, 0, 0))
        if not told and b"retention buyers" in shown:  # only the large screen has it
            told = True
            demo.process.send_signal(signal.SIGTERM)
    if not told:
        demo.signal(signal.SIGKILL)
        pytest.fail(
            f"the large screen did not come; resized: {resized}; the end of what was shown:\n{shown[-20_000:].decode(errors='replace')}"
        )
    os.close(ours)
    assert demo.process.wait(120) == 0, shown[-3000:].decode()
    enters, leaves = shown.find(b"\x1b[?1049h"), shown.rfind(b"\x1b[?1049l")
    assert 0 < enters < leaves
    assert b"numbers equal the generator's" in shown[leaves:]
    assert demo.left() == []


def _read(terminal: int, deadline: float) -> bytes:
    """What came next; nothing when the other end is closed, or at the deadline."""
    if not select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
        return b""
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def test_ctrl_c_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    demo = Demo(tmp_path, *SMALL)
    line_with(demo, "starting")
    time.sleep(1.5)
    demo.signal(signal.SIGINT)
    said = demo.process.communicate(timeout=60)[0].decode()
    assert demo.process.returncode in (0, 130), said
    assert "Traceback" not in said
    assert demo.left() == []


def test_a_warehouse_that_lost_something_is_told() -> None:
    warehouse = EmbeddedWarehouse("")
    try:
        warehouse.migrate()
        answers = Answers(0)
        facts = (message.fact for message in LiveShop(1, 50).messages())
        fact = next(fact for fact in facts if fact)
        answers.add(fact)
        compared = verdict(warehouse, answers, {"bad": 2})
    finally:
        warehouse.close()
    assert ("events", "rejected", 0, 2) in compared.different
    assert {report for report, *_ in compared.different} >= {"retention", "kpi", "events"}
    assert compared.numbers > len(compared.different)
