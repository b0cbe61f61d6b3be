"""Writes the reference pages from the code: `python docs/reference/make.py`. A test says when they are behind it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import SecretStr
from pydantic_core import PydanticUndefined

from pipeline.cli.main import app
from pipeline.definitions_file import MOST_STEPS, DefinitionsError, known_keys
from pipeline.definitions_kpis import AGGREGATES
from pipeline.definitions_reader import REQUIRED
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


EVERY_TABLE = """
[[funnel]]
name = "f"
conversion_window = "1d"
%s
[[funnel.exclusion]]
event = "x"
[[retention]]
name = "r"
cohort = { event = "x" }
return = { event = "x" }
""" % ("[[funnel.step]]\nevent = 'x'\n" * MOST_STEPS)
KPI_KEYS = {"event": "'x'", "field": "'value'", "within": "'30d'", "quantile": "0.5"}
SECTIONS = ("shop", "time", "sessions", "funnel", "funnel.step", "funnel.exclusion", "retention", "retention.cohort", "retention.return")


def definitions_page() -> str:
    """Keys, what they take and their defaults, as the reader of the file asks for them."""
    lines = [
        MADE,
        "# Keys of a definitions file",
        "",
        "What they mean is in [definitions](../definitions.md). A key that is not here is refused, with the nearest one that is.",
        "",
    ]
    known = known_keys(EVERY_TABLE)
    for section in SECTIONS:
        keys = {key.rpartition(".")[2]: found for key, found in known.items() if key.rpartition(".")[0] == section and key not in SECTIONS}
        written = f"[[{section}]]" if known[section][0] == "an array of tables" else f"[{section}]"
        lines += [f"## {written}", "", *_keys(keys), ""]
    lines += ["## [[kpi]]", ""]
    for source, aggregates in AGGREGATES.items():
        lines += [f'### source = "{source}"', "", *_keys(_of_source(source, aggregates)), ""]
    formula = "[[kpi]]\nname = 'a'\naggregate = 'count'\nevent = 'x'\n[[kpi]]\nname = 'b'\nformula = 'a / a'\n"
    lines += ['### source = "formula"', "", *_keys({"formula": known_keys(formula)["kpi.formula"]}), ""]
    return "\n".join(lines).rstrip() + "\n"


def _of_source(source: str, aggregates: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Its keys; those that only one aggregate has say so."""
    found: dict[str, tuple[str, str]] = {}
    seen: dict[str, list[str]] = {}
    for aggregate in aggregates:
        text = f"[[kpi]]\nname = 'k'\nsource = '{source}'\naggregate = '{aggregate}'\n"
        for key, value in KPI_KEYS.items():
            try:
                known_keys(text + f"{key} = {value}\n")
            except DefinitionsError as error:
                if any(line.startswith(f"kpi[1].{key}: has no meaning") for line in error.errors):
                    continue
            text += f"{key} = {value}\n"
        for path, takes in known_keys(text).items():
            key = path.removeprefix("kpi.")
            if path.startswith("kpi.") and key != "source":
                found.setdefault(key, takes)
                seen.setdefault(key, []).append(aggregate)
    only = {key: f"; with aggregate = {', '.join(of)}" * (len(of) < len(aggregates)) for key, of in seen.items()}
    return {key: (takes + only[key], default) for key, (takes, default) in found.items()}


def _keys(keys: dict[str, tuple[str, str]]) -> list[str]:
    rows = [
        f"| `{key}` | {f'`{default}`' if default not in ('', REQUIRED) and '; else' not in takes else default * (default == REQUIRED)} | {takes} |"
        for key, (takes, default) in keys.items()
    ]
    return ["| key | default | takes |", "| --- | --- | --- |", *rows]


PAGES = {"definitions.md": definitions_page, "metrics.md": metrics_page, "settings.md": settings_page, "commands.md": commands_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (HERE / name).write_text(make())
