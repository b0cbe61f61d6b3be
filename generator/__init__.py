"""A seeded, realistic shop: the same seed makes the same messages. For the sample, the demo, tests and benchmarks; the pipeline knows nothing of it."""

from generator.shop import Faults, Message, shop

__all__ = ["Faults", "Message", "shop"]
