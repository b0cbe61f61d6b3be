"""`shopstream config`: every setting in force, where its value came from, secrets masked."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from rich.table import Table
from rich.text import Text

from pipeline.cli.reading import JsonOption, WarehouseOption, masked, plain_console, warehouse_url, write
from pipeline.reports.export import to_json
from pipeline.reports.text import safe
from pipeline.settings import FILE_VARIABLE, PREFIX, Settings, load_settings

MASK = "********"
STYLES = {"default": "bright_black", "file": "cyan", "environment": "green", "option": "yellow"}


def config(
    broker: Annotated[str | None, typer.Option(help="As a command would get it.", show_default=False)] = None,
    warehouse: WarehouseOption = None,
    definitions: Annotated[Path | None, typer.Option(help="As a command would get it.", show_default=False)] = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what is not the default.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The settings in force and where each came from: an option, the environment (SHOPSTREAM_…), the file that SHOPSTREAM_SETTINGS names, or the default.

    An option wins over the environment, the environment over the file. A secret may be in a file of its own: SHOPSTREAM_WAREHOUSE_PASSWORD_FILE.

    Example: SHOPSTREAM_SETTINGS=shop.toml shopstream config --changed
    """
    given: dict[str, object] = {"broker": broker, "warehouse": warehouse_url(warehouse), "definitions": definitions}
    rows = describe(load_settings(**given), given)
    rows = [row for row in rows if row["source"] != "default"] if changed else rows
    if as_json:
        write(to_json({"settings": rows}))
        return
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="bright_black")
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    for row in rows:
        value = "" if row["value"] is None else str(row["value"])
        origin = row["source"] + (f" {row['where']}" if row["where"] else "")
        table.add_row(row["variable"], Text(safe(value)), Text(safe(origin), STYLES[row["source"]]))
    plain_console().print(table)


def describe(settings: Settings, given: dict[str, object]) -> list[dict[str, Any]]:
    """name, variable, value, source ('option' | 'environment' | 'file' | 'default') and where (variable or file) of every setting; secrets as a mask."""
    named = os.environ.get(FILE_VARIABLE)
    in_file = set(tomllib.loads(Path(named).read_text())) if named else set()
    variables = {name.upper(): name for name in os.environ}
    rows = []
    for name in Settings.model_fields:
        source, where = _origin(name, given, variables, in_file, named)
        variable = PREFIX + name.upper()
        rows.append({"name": name, "variable": variable, "value": _shown(getattr(settings, name)), "source": source, "where": where})
    return rows


def _origin(name: str, given: dict[str, object], variables: dict[str, str], in_file: set[str], named: str | None) -> tuple[str, str]:
    variable = PREFIX + name.upper()
    if given.get(name) is not None:
        return "option", f"--{name.replace('_', '-')}"
    if Settings.model_fields[name].annotation == SecretStr | None and variable + "_FILE" in variables:
        return "environment", variables[variable + "_FILE"]
    if variable in variables:
        return "environment", variables[variable]
    return ("file", named or "") if name in in_file else ("default", "")


def _shown(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, str):
        return masked(value)
    return str(value) if isinstance(value, Path) else value
