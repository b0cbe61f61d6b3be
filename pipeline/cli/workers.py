"""The worker processes of a command that runs a whole pipeline: started, watched, started again, stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from embedded.watchdog import die_with_parent

RESTARTS = 5
STOP_SECONDS = 90


class RunFailed(Exception):
    """The run can't be completed; the message says why and shows the worker's last lines."""


class Workers:
    """The worker processes of a run, one a metrics port (0: it serves none); one that dies is started again (a restart is exact), a few times.

    arguments: of `shopstream worker`.
    """

    def __init__(self, metrics_ports: Sequence[int], environment: dict[str, str], folder: Path, arguments: Sequence[str] = ()) -> None:
        self._log = folder / "workers.log"
        self._environment = environment
        self._arguments = arguments
        self._restarts = 0
        self._ports = metrics_ports
        self._processes = [self._start(port) for port in metrics_ports]

    def _start(self, metrics_port: int) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "pipeline.cli.main", "worker", *self._arguments]
            return subprocess.Popen(
                command,
                env=self._environment | {"SHOPSTREAM_METRICS_PORT": str(metrics_port)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
                start_new_session=True,  # Ctrl-C at the terminal is for the command, which has something to finish with them
            )

    def look_after(self) -> None:
        """Start again what died. Raises RunFailed past the limit, and when a worker has stopped consuming a topic for its many rejects."""
        if stopped := [line for line in self.tail(200).splitlines() if "consumption of" in line and "stopped" in line]:
            raise RunFailed(f"too many records are rejected. Is a --map missing, or a file not in order of time (--sort)?\n{stopped[-1]}")
        for i, process in enumerate(self._processes):
            if process.poll() is not None:
                self._restarts += 1
                if self._restarts > RESTARTS:
                    raise RunFailed(f"workers ended {self._restarts} times, the last with code {process.returncode}.\n{self.tail()}")
                self._processes[i] = self._start(self._ports[i])

    def stop(self, end_of_input: bool = True) -> None:
        """Ask them to end, each with a last flush; tell them before that the input has ended, if it has. Raises RunFailed when one does not end well."""
        for process in self._processes:
            if end_of_input:
                process.send_signal(signal.SIGUSR1)
            process.terminate()
        for process in self._processes:
            try:
                code = process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                raise RunFailed(f"a worker did not end within {STOP_SECONDS} s.\n{self.tail()}") from None
            if code not in (
                0,
                -signal.SIGTERM,
                -signal.SIGUSR1,
                -signal.SIGKILL,
            ):  # one that was just started again owns nothing yet; what is applied is in the warehouse
                raise RunFailed(f"a worker ended with code {code}.\n{self.tail()}")

    def kill(self) -> None:
        """End them at once."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def tail(self, lines: int = 20) -> str:
        """The last lines that the workers wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
