"""The commands in the documents: `sh` blocks as they are executed, and every other mention of a command, for a look at its options.

A page is one bash script, run in a folder of its own. What it names and this machine has not (hosts, secrets, paths) stands in for `PLACES`; what can't
run here at all is in `NOT_HERE`, with the reason, and is checked as far as it can be.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

NOT_HERE = {
    "docker": "containers and images of a registry; test_compose*.py run the services as processes. Its options are held against COMPOSE_OPTIONS",
    "make": "sets up .venv from a package index, or is this very suite. Each verb must be one, and its recipe must expand",
}
COMPOSE_OPTIONS = {
    "up": {"--build", "--detach", "--wait", "--scale"},
    "down": {"--volumes"},
    "ps": set[str](),
    "exec": set[str](),
}
"""Of `docker compose`, version 2: those that the documents use."""

SHELL = r"""
set -euo pipefail
workers=()
run() { "$PYTHON" -m pipeline.cli.main "$@"; }
# A worker is a terminal of its own: it goes on beside the page, which waits until it is ready, and ends in good order when the page does.
shopstream() {
    case " $* " in
        " worker "*) ( exec "$PYTHON" -m pipeline.cli.main "$@" ) >> workers.log 2>&1 & workers+=($!); ready ;;
        *" --watch "* | *" --speed "* | " traffic "*) { timeout --preserve-status --signal INT 3 "$PYTHON" -m pipeline.cli.main "$@" || test $? = 130; } ;;
        *) run "$@" ;;
    esac
}
ready() {
    for _ in $(seq 300); do
        curl --silent --fail --output /dev/null "http://127.0.0.1:$SHOPSTREAM_METRICS_PORT/readyz" && return
        kill -0 "${workers[-1]}" || break
        sleep 0.2
    done
    cat workers.log; exit 1
}
end() {
    code=$?
    trap - EXIT
    kill -TERM "${workers[@]}" 2> /dev/null || true
    for worker in "${workers[@]}"; do wait "$worker" || { code=$?; cat workers.log; }; done
    exit $code
}
trap end EXIT
python() { "$PYTHON" "$@"; }
make() { command make --directory "$ROOT" --dry-run "$@" > /dev/null; }
docker() {
    "$PYTHON" -m tests.doc_commands "$@"
    if test "$2" = exec; then "${@:4}"; fi
}
"""


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.S | re.M)


def script(page: Path, places: Mapping[str, str]) -> str:
    text = "\n".join(blocks(page))
    for there, here in places.items():
        text = text.replace(there, here)
    return SHELL + text


def mentions(text: str) -> Iterator[list[str]]:
    """Arguments of each `shopstream …` in a text: in blocks, in `code`, and after `Example:`. `a|b` is each of them."""
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M) for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    lines += re.findall(r"`([^`\n]+)`", prose) + re.findall(r"^\s*(?:Example|Its exact bytes): (.+)$", prose, re.M)
    for line in lines:
        found = re.search(r"(?:^|[\s/])shopstream ([a-z].*)", line.split(" #")[0])
        if found is None or line.startswith("cat "):
            continue
        words = shlex.split(re.split(r" [|&>]", found[1])[0])
        for i, word in enumerate(words):
            if "|" in word:
                yield from ([*words[:i], choice] for choice in word.split("|"))
                break
        else:
            yield words


def check_compose(words: list[str], services: set[str]) -> None:
    """Raises ValueError unless `docker compose …` is one that the documents may say."""
    if words[:1] != ["compose"] or words[1] not in COMPOSE_OPTIONS:
        raise ValueError(f"docker {' '.join(words)}: not in COMPOSE_OPTIONS")
    rest = words[2:3] if words[1] == "exec" else words[2:]
    options = {word for word in rest if word.startswith("-")}
    named = {word.split("=")[0] for word in rest if not word.startswith("-")}
    if unknown := options - COMPOSE_OPTIONS[words[1]] | named - services:
        raise ValueError(f"docker {' '.join(words)}: {sorted(unknown)} are neither options nor services")


if __name__ == "__main__":
    import sys

    from tests.compose_file import SERVICES

    check_compose(sys.argv[1:], set(SERVICES))
