"""The documents point at what is there: tests, files, commands and settings."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli.main import app
from pipeline.settings import PREFIX, Settings
from tests.doc_commands import DOCUMENTS, ROOT, mentions

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


@pytest.mark.parametrize("page", ["definitions.md", "settings.md", "commands.md", "metrics.md"])
def test_reference_is_what_the_code_says(page: str) -> None:
    make = runpy.run_path(str(ROOT / "docs" / "reference" / "make.py"))
    assert (ROOT / "docs" / "reference" / page).read_text() == make["PAGES"][page](), "run `python docs/reference/make.py`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_in_the_documents_exist(document: Path) -> None:
    for words in mentions(document.read_text()):
        parsed(words)


def test_examples_in_the_help_parse() -> None:
    examples = list(mentions((ROOT / "docs" / "reference" / "commands.md").read_text()))
    assert len(examples) >= 15
    with pytest.raises(Exception, match="No such option"):
        parsed(["report", "funnel", "--nome", "checkout"])
    with pytest.raises(AssertionError, match="no command"):
        parsed(["reprot", "funnel"])


def parsed(words: list[str]) -> None:
    """Raises "No such option"; whether a file or a value is right is for those who execute it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command {words}"
        command, words = command.commands[words[0]], words[1:]
    command.make_parser(command.context_class(command)).parse_args(list(words))


@pytest.mark.parametrize("verb", re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M))
def test_recipes_expand(verb: str) -> None:
    assert subprocess.run(["make", "--dry-run", verb], cwd=ROOT, capture_output=True, text=True, check=False).returncode == 0


def test_files_and_modules_in_the_documents_exist() -> None:
    for document in DOCUMENTS:
        if document.name == "CHANGELOG.md":
            continue
        code = [span for span in re.findall(r"`([^`\n]+)`", document.read_text()) if not re.search(r"[…*<{$]", span)]
        paths = [
            m[0]
            for span in code
            for m in re.finditer(r"^(?:deploy|docs|schemas|pipeline|tests|generator|sample|agents|embedded|benchmarks)/[\w./-]+", span)
        ]
        missing = [path for path in paths if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists()]
        assert missing == [], document
        modules = re.findall(r"python -m ((?:schemas|generator|benchmarks|tests)[\w.]*)", document.read_text())
        assert all((ROOT / (module.replace(".", "/") + ".py")).exists() or (ROOT / module.replace(".", "/")).is_dir() for module in modules)
