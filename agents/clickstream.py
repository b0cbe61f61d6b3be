"""Agent of the `clickstream` topic: runs in, applied by the partition that owns them."""

from __future__ import annotations

from typing import Any

from agents.consume import consume


def bind(app: Any, topics: Any, owner: Any) -> None:
    @app.agent(app.topic(topics.clickstream, value_serializer="raw", key_serializer="raw", acks=False), name="clickstream", concurrency=1)
    async def clickstream(stream: Any) -> None:
        await consume(stream, owner)
