"""File systems too small for what is to be written on them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small(folder: Path, mebibytes: int) -> Iterator[None]:
    """Mounts a file system of that size on the folder; skips the test where that is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", folder]
    mounted = subprocess.run(mount, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a full disk needs a file system of its own, and mounting one is not allowed here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> Path:
    """Writes, past every buffer, until there is no space left on the folder's device. Returns what takes the space."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):  # ends with: no space left on device
        while file.write(bytes(1 << 12)):
            pass
    return ballast
