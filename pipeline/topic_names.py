"""The topics of one pipeline. Apart from everything compiled, so that a command that only names them starts at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

LARGEST_MESSAGE = 8 << 20
"""What every topic and producer of ours must let through, bytes: a reject carries up to 1 MiB raw as base64, and an event above the limit must arrive to be rejected."""


@dataclass(frozen=True, slots=True)
class Topics:
    """Names of the topics of one pipeline at one revision; partition p of each belongs together.

    app_id: the consumer group, and what the names of internal topics and transactional ids begin with.
    """

    clickstream: str = "clickstream"
    orders: str = "orders"
    app_id: str = "shopstream"
    revision: int = 0

    def at(self, revision: int) -> Topics:
        """Those of another revision; called on those of revision 0."""
        return replace(self, app_id=f"{self.app_id}.r{revision}", revision=revision) if revision else self

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
