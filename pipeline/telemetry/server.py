"""`/metrics`, `/healthz` and `/readyz` on the worker's own event loop: when the loop stands still, nothing answers, and that is an answer.

In: functions that say the text, the health and the readiness. Called by `streaming.worker`. Loopback unless a setting says otherwise; answers hold no secret.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

HOST_SETTING, PORT_SETTING = "SHOPSTREAM_METRICS_HOST", "SHOPSTREAM_METRICS_PORT"


class PortTaken(Exception):
    """The address for metrics can't be had; the message names the settings."""


@dataclass(frozen=True, slots=True)
class State:
    """Answer of /healthz or /readyz: 200 when `good`, else 503; `why` in words, `details` for machines."""

    good: bool
    why: str
    details: dict[str, Any] = field(default_factory=dict)


@asynccontextmanager
async def serving(
    host: str, port: int, text: Callable[[], bytes], content_type: str, health: Callable[[], State], readiness: Callable[[], State]
) -> AsyncIterator[None]:
    """Answer while the block runs; port 0: don't. Raises PortTaken."""
    if not port:
        yield
        return

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=text(), headers={"Content-Type": content_type})

    async def healthz(_: web.Request) -> web.Response:
        return _answer(health())

    async def readyz(_: web.Request) -> web.Response:
        return _answer(readiness())

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/healthz", healthz), web.get("/readyz", readyz)])
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise PortTaken(
                f"metrics can't be served at {host}:{port} ({error.strerror}). Give this worker an address of its own with {HOST_SETTING} and "
                f"{PORT_SETTING}; {PORT_SETTING}=0 serves none."
            ) from None
        yield
    finally:
        await runner.cleanup()


def _answer(state: State) -> web.Response:
    body = {"status": "ok" if state.good else "not ok", "why": state.why, **state.details}
    return web.Response(text=json.dumps(body) + "\n", status=200 if state.good else 503, content_type="application/json")
