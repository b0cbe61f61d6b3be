"""`shopstream doctor`: looks at everything a worker needs, each check within a time limit, and says what to do. Changes nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.cli.checks import (
    KAFKA_ERRORS,
    Finding,
    check_broker,
    check_disk,
    check_group,
    check_record_times,
    check_topics,
    check_warehouse,
)
from pipeline.cli.reading import JsonOption, WarehouseOption, plain_console, warehouse_url, write
from pipeline.definitions_file import DefinitionsError, load
from pipeline.reports.export import to_json
from pipeline.reports.text import safe_lines
from pipeline.settings import Settings, SettingsError, load_settings

Check = Callable[[Settings, float], list[Finding]]
NEED_THE_BROKER: dict[str, Check] = {"topics": check_topics, "workers": check_group, "clock": check_record_times}
REMEDIES = {"broker": "start Kafka, or correct SHOPSTREAM_BROKER and the security settings; to try things out, `shopstream run` needs none"}
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    broker: Annotated[str | None, typer.Option(help="Bootstrap servers; SHOPSTREAM_BROKER.", show_default=False)] = None,
    warehouse: WarehouseOption = None,
    definitions: Annotated[Path | None, typer.Option(help="SHOPSTREAM_DEFINITIONS.", show_default=False)] = None,
    timeout: Annotated[float, typer.Option(min=0.5, max=600, help="Seconds that each check may take.", metavar="SECONDS")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Check settings, Kafka and its topics, the workers, the warehouse and its migrations, clocks and disks.

    Changes nothing. Every finding is ok, warn or fail and says what to do. Exit code 0: no fail, 1: at least one, 2: wrong use.

    Example: shopstream doctor --json | jq '.findings[] | select(.state != "ok")'
    """
    logging.getLogger("kafka").setLevel(logging.CRITICAL)  # what it has to say is in the findings
    findings = examine(timeout, broker=broker, warehouse=warehouse_url(warehouse), definitions=definitions)
    worst = max((("ok", "warn", "fail").index(finding.state) for finding in findings), default=0)
    if as_json:
        write(to_json({"state": ("ok", "warn", "fail")[worst], "findings": findings}))
    else:
        plain_console().print(findings_table(findings))
    if worst == 2:
        raise typer.Exit(1)


def examine(seconds: float, **given: object) -> list[Finding]:
    """All findings, in the order in which things build on each other. Takes at most twice `seconds`."""
    try:
        settings = load_settings(**given)
    except SettingsError as error:
        return [Finding("settings", "fail", str(error), "correct it; `shopstream config` says where each value comes from")]
    found = [_definitions(settings)]
    first = _together({"broker": check_broker, "warehouse": check_warehouse, "disk": check_disk}, settings, seconds)
    if any(finding.state == "fail" for finding in first["broker"]):
        after = {name: [Finding(name, "warn", "not checked: the broker does not answer")] for name in ("topics", "workers")}
    else:
        after = _together(NEED_THE_BROKER, settings, seconds)
    found += [*first["broker"], *after["topics"], *after["workers"], *first["warehouse"], *after.get("clock", []), *first["disk"]]
    return found


def _definitions(settings: Settings) -> Finding:
    try:
        known = load(settings.definitions)
    except DefinitionsError as error:
        return Finding("settings", "fail", str(error), "correct the definitions file")
    what = f"{len(known.funnels)} funnels, {len(known.retentions)} retentions, {len(known.kpis)} KPIs"
    return Finding("settings", "ok", f"{settings.definitions or 'the bundled definitions'}: {what}; days in {known.time_zone}")


def _together(checks: dict[str, Check], settings: Settings, seconds: float) -> dict[str, list[Finding]]:
    """Every check in a thread of its own, which is left behind when it takes too long: a broker that is down must hang nobody."""
    results: dict[str, list[Finding]] = {}

    def work(name: str, check: Check) -> None:
        try:
            results[name] = check(settings, seconds)
        except KAFKA_ERRORS as error:
            results[name] = [Finding(name, "fail", str(error) or repr(error), REMEDIES.get(name, "look at the broker's log"))]
        except Exception as error:  # a check that breaks is a finding too
            results[name] = [Finding(name, "fail", f"the check itself failed: {error!r}", "please report it")]

    threads = {name: threading.Thread(target=work, args=(name, check), daemon=True) for name, check in checks.items()}
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    late = [Finding(name, "fail", f"no answer within {seconds:g} s", REMEDIES.get(name, "try --timeout 60")) for name in checks]
    return {name: results.get(name, [finding]) for name, finding in zip(checks, late, strict=True)}


def findings_table(findings: list[Finding]) -> RenderableType:
    """A line a finding, its remedy below it."""
    table = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="bright_black")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        text = Text(safe_lines(finding.found))
        if finding.remedy:
            text.append(f"\n→ {safe_lines(finding.remedy)}", "bold")
        table.add_row(finding.check, Text(finding.state, STYLES[finding.state]), text)
    counts = {state: sum(finding.state == state for finding in findings) for state in STYLES}
    return Group(table, Text(), Text(", ".join(f"{n} {state}" for state, n in counts.items() if n)))
