"""The Faust agents: one thin file each. The whole flow on one page: topic in, the partition's tables applied; flushes take it out."""

from __future__ import annotations

from typing import Any

from agents import clickstream, orders, rekeyed


def bind_agents(app: Any, topics: Any, owner: Any) -> None:
    """Give the app its agents; each hands runs of one topic to the owner of the partitions."""
    clickstream.bind(app, topics, owner)
    orders.bind(app, topics, owner)
    rekeyed.bind(app, topics, owner)
