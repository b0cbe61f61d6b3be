"""The topics of one pipeline. Apart from everything compiled, so that a command that only names them starts at once."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_MESSAGE = 8 << 20
"""What every topic and producer of ours must let through, bytes: a reject carries up to 1 MiB raw as base64, and an event above the limit must arrive to be rejected."""


@dataclass(frozen=True, slots=True)
class Topics:
    """Names of the topics of one pipeline; partition p of each belongs together."""

    clickstream: str = "clickstream"
    orders: str = "orders"
    app_id: str = "shopstream"

    @property
    def sources(self) -> tuple[str, str, str]:
        return self.clickstream, self.orders, self.rekeyed

    @property
    def rekeyed(self) -> str:
        return f"{self.app_id}.rekeyed"

    @property
    def changelog(self) -> str:
        return f"{self.app_id}.changelog"

    @property
    def rejected(self) -> tuple[str, str]:
        return self.rejected_of(self.clickstream), self.rejected_of(self.orders)

    @staticmethod
    def rejected_of(topic: str) -> str:
        return f"{topic}.rejected"

    def kind(self, topic: str) -> str:
        """`clickstream` or `orders`, whatever the topic is called."""
        return "clickstream" if topic == self.clickstream else "orders"
