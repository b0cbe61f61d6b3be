"""Runs a command and ends it with its owner: `python watchdog.py OWNER_PID FOLDER COMMAND…`. Started by `embedded.kafka`, standard library only.

It reads a pipe whose other end the owner holds: when the owner is gone, however it went, the read ends, the command is killed and FOLDER removed
('' keeps it). A byte in the pipe: KILL kills the command, too, but keeps FOLDER, as the owner means to start it again; FREEZE and THAW stop it and let it
go on. A child that the owner forked may hold that end open, too, so the owner's process id is watched besides.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.5
KILL, FREEZE, THAW = b"k", b"s", b"c"


def die_with_parent() -> None:
    """Linux: the command is killed when the watchdog itself is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(owner: int, folder: str, command: list[str]) -> int:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    while process.poll() is None and os.getppid() == owner:
        if select.select([0], [], [], POLL_SECONDS)[0]:
            said = os.read(0, 1)
            if said in (FREEZE, THAW):
                process.send_signal(signal.SIGSTOP if said == FREEZE else signal.SIGCONT)
                continue
            folder = "" if said else folder
            break
    else:
        if process.poll() is not None and os.getppid() == owner:
            return process.returncode
    process.kill()
    process.wait()
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
