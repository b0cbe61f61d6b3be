"""Writes the reference pages from the code: `python docs/reference/make.py`. A test says when they are behind it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer
from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from pipeline.cli.main import app
from pipeline.settings import PREFIX, Settings
from pipeline.telemetry.metrics import reference

HERE = Path(__file__).parent
MADE = "<!-- made by docs/reference/make.py -->"


def settings_page() -> str:
    lines = [
        MADE,
        "# Settings",
        "",
        f"From the environment, or from the TOML file that `{PREFIX}SETTINGS` names (keys in small letters, without the prefix); options of a command win over",
        "both. A secret can come from a file: append `_FILE` to its variable. `shopstream config` shows what is in force and where it came from.",
        "",
        "| variable | default | meaning |",
        "| --- | --- | --- |",
    ]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, PydanticUndefined) else f"`{field.default}`"
        secret = " (secret)" if SecretStr.__name__ in str(field.annotation) else ""
        choices = getattr(field.annotation, "__args__", ())
        allowed = " \\| ".join(f"`{c}`" for c in choices if isinstance(c, str))
        meaning = "; ".join(filter(None, (field.description or "", allowed))) + secret
        lines.append(f"| `{PREFIX}{name.upper()}` | {default} | {meaning.strip()} |")
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    lines = [
        MADE,
        "# Commands",
        "",
        "Exit codes: 0 done, 1 failed while running, 2 wrong use or settings; ended by a signal: 128 + its number.",
        "",
    ]
    for path, command in sorted(_leaves("shopstream", typer.main.get_command(app))):
        lines += [f"## {path}", "", inspect.cleandoc(command.help or "").replace("\b\n", ""), ""]
        options = [p for p in command.params if p.name != "help"]
        if options:
            lines += ["| option | default | meaning |", "| --- | --- | --- |"]
            lines += [_option(p) for p in options]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _leaves(path: str, command: Any) -> list[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        return [(path, command)]
    return [leaf for name, child in children.items() for leaf in _leaves(f"{path} {name}", child)]


def _option(parameter: Any) -> str:
    names = parameter.name.upper() if parameter.param_type_name == "argument" else ", ".join(parameter.opts)
    default = "" if parameter.default in (None, False) or callable(parameter.default) else f"`{parameter.default}`"
    required = " (required)" if parameter.required else ""
    return f"| `{names}`{required} | {default} | {(getattr(parameter, 'help', None) or '').replace('|', chr(92) + '|')} |"


def metrics_page() -> str:
    return (
        f"{MADE}\n# Metrics\n\nAt `/metrics` of a worker, see `SHOPSTREAM_METRICS_PORT` in [settings](settings.md).\n\n{reference()}".rstrip()
        + "\n"
    )


PAGES = {"metrics.md": metrics_page, "settings.md": settings_page, "commands.md": commands_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (HERE / name).write_text(make())
