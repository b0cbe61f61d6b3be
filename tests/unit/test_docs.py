"""The documents point at what is there: tests, files, commands and settings."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest

from pipeline.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NOT_SETTINGS = {"SETTINGS", "CACHE", "TEST_SEED", "FAULT", "KAFKA_HEAP", "WAREHOUSE_KEY"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", document.read_text())
    local = [first or second for first, second in targets if not (first or second).startswith(("http", "mailto"))]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_every_promise_names_tests_that_exist() -> None:
    named = []
    for line in (ROOT / "docs" / "guarantees.md").read_text().splitlines():
        file = ""
        for path, test in re.findall(r"`((?:tests/[\w/]+\.py)?)(?:::(\w+))?`", line):
            file = path or file
            if path or test:
                named.append((file, test))
    assert len(named) > 20
    missing = [(f, t) for f, t in named if not (ROOT / f).is_file() or (t and f"def {t}(" not in (ROOT / f).read_text())]
    assert missing == []


def test_settings_in_the_documents_exist() -> None:
    known = {name.upper() for name in Settings.model_fields}
    known |= {f"{name}_FILE" for name in known} | NOT_SETTINGS
    for document in DOCUMENTS:
        unknown = set(re.findall(rf"{PREFIX}([A-Z_]+[A-Z])", document.read_text())) - known
        assert not unknown, f"{document.relative_to(ROOT)} names {unknown}"


def test_make_verbs_in_the_documents_exist() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in DOCUMENTS:
        assert set(re.findall(r"`?make ([a-z-]+)`?(?=[\s`.,;)])", "\n".join(code_of(document.read_text())))) <= verbs, document


def code_of(text: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)


def test_help_lists_the_verbs() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"setup", "sample", "demo", "test", "test-faults", "lint", "bench"} <= set(re.findall(r"make ([a-z-]+)", shown))


@pytest.mark.parametrize("page", ["settings.md", "commands.md", "metrics.md"])
def test_reference_is_what_the_code_says(page: str) -> None:
    make = runpy.run_path(str(ROOT / "docs" / "reference" / "make.py"))
    assert (ROOT / "docs" / "reference" / page).read_text() == make["PAGES"][page](), "run `python docs/reference/make.py`"
