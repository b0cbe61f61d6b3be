"""The user's cache folder: compiled kernels and, for the embedded broker, Kafka's jars."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path


class FolderError(Exception):
    """A folder of the worker's own can't be written; the message names it and the way out."""


def cache_folder() -> Path:
    """`SHOPSTREAM_CACHE`, or the user's cache folder."""
    if named := os.environ.get("SHOPSTREAM_CACHE"):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "shopstream"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shopstream"


def kernel_cache() -> Path:
    """Where numba keeps compiled kernels: a folder of this very source tree's state.

    numba notices a change of the file a kernel is in, not of one that it calls in another file, and would run the old code.
    """
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([root / "windows.py", *(root / "tables").glob("*.py")]):
        digest.update(path.read_bytes())
    return cache_folder() / f"kernels-{digest.hexdigest()[:16]}"
