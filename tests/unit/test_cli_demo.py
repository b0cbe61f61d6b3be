"""Wrong use of `demo` ends with what to do, before anything is started; its help teaches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import shopstream


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("--minutes", "0"), "--minutes"),
        (("--minutes", "soon"), "--minutes"),
        (("--speed", "0.5"), "--speed"),
        (("--visitors", "3"), "50"),
        (("--workers", "0"), "--workers"),
        (("--head-start", "400"), "365"),
        (("--seconds", "3"), "--seconds"),
    ],
)
def test_a_wrong_option_is_answered_with_its_name_and_range(arguments: tuple[str, ...], remedy: str) -> None:
    said = shopstream("demo", *arguments, columns=200)
    assert said.code == 2
    assert remedy in said.all


def test_a_folder_that_no_command_made_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "letter").touch()
    for options, remedy in (((), "--overwrite"), (("--overwrite",), "is not a warehouse")):
        said = shopstream("demo", "--warehouse", tmp_path / "precious", *options, columns=200)
        assert said.code == 2
        assert remedy in said.all
    assert (tmp_path / "precious" / "letter").exists()


@pytest.mark.parametrize("command", ["demo", "replay"])
def test_help_shows_an_example(command: str) -> None:
    said = shopstream(command, "--help", columns=200)
    assert said.code == 0
    assert f"shopstream {command} " in said.all
    assert "Example" in said.all
