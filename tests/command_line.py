"""Runs the `shopstream` command in this process, as its entry point does, so that a test of many uses takes seconds.

Out: exit code, stdout and stderr. Nothing of the caller's environment (SHOPSTREAM_…) reaches the command, nothing that it sets up stays.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from pipeline.cli.main import main


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        """Both streams as one text without line breaks, for messages that are wrapped."""
        return " ".join((self.out + " " + self.err).split())


def shopstream(*arguments: str | Path | int, columns: int = 80, stdin: str = "", **environment: str) -> Said:
    """Run with `environment` as its variables. An error that escapes is printed as the interpreter would, with code 70."""
    kept: Mapping[str, str] = {k: v for k, v in os.environ.items() if not k.startswith("SHOPSTREAM_") or k == "SHOPSTREAM_CACHE"}
    out, err = io.StringIO(), io.StringIO()
    handlers, level, terminate = logging.root.handlers[:], logging.root.level, signal.getsignal(signal.SIGTERM)
    variables = {**kept, "COLUMNS": str(columns), **environment}
    code = 0
    with (
        patch.dict(os.environ, variables, clear=True),
        patch.object(sys, "argv", ["shopstream", *map(str, arguments)]),
        patch.object(sys, "stdin", io.StringIO(stdin)),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            traceback.print_exc(file=err)
            code = 70
    logging.root.handlers[:], logging.root.level = handlers, level
    signal.signal(signal.SIGTERM, terminate)
    return Said(code, out.getvalue(), err.getvalue())
