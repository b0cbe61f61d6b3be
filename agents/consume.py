"""What every agent does with its stream. An error ends the process: Faust would acknowledge the run and go on."""

from __future__ import annotations

from typing import Any

from pipeline.streaming.ending import end_process


async def consume(stream: Any, owner: Any) -> None:
    async for run in stream:
        try:
            await owner.offer(run)
        except Exception as error:
            end_process(f"{run.topic}[{run.partition}] could not be applied: {error}", error)
