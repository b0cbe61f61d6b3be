"""The tutorial as a newcomer does it: every command on the page, in order, in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_command_of_the_tutorial_works_as_it_stands(tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.S)
    assert len(blocks) == 4
    shopstream = f'shopstream() {{ PYTHONPATH="{ROOT}" "{sys.executable}" -m pipeline.cli.main "$@"; }}\n'
    script = "set -eu\n" + shopstream + "\n".join(blocks)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    said = " ".join(done.stdout.split())
    assert "read 6 · applied 5" in said
    assert "rejected 1" in said
    assert '"value": 49.9' in done.stdout or "49.9" in said
    assert "bad_timestamp" in said
