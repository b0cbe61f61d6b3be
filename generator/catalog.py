"""What the shop sells and where its visitors come from: fixed tables with weights, chosen by `generator.visits`."""

from __future__ import annotations

import random
from typing import NamedTuple


class Item(NamedTuple):
    item_id: str
    category: str
    cents: int


class Channel(NamedTuple):
    """`intent` scales the chance to go on at each step of a visit."""

    name: str
    campaigns: tuple[str, ...]
    weight: float
    intent: float


CATEGORIES = (
    ("phones", 42_000),
    ("laptops", 88_000),
    ("audio", 7_900),
    ("cables", 1_290),
    ("cameras", 35_000),
    ("home", 4_500),
    ("games", 3_990),
)
CHANNELS = (
    Channel("organic", (), 0.34, 1.0),
    Channel("direct", (), 0.22, 1.25),
    Channel("paid_search", ("brand", "generic_audio", "shopping"), 0.18, 1.1),
    Channel("social", ("spring_reels", "influencer"), 0.14, 0.6),
    Channel("email", ("newsletter", "cart_reminder"), 0.08, 1.5),
    Channel("affiliate", ("price_portal",), 0.04, 1.2),
)
DEVICES = (("mobile", 0.58, 0.8), ("desktop", 0.34, 1.2), ("tablet", 0.08, 1.0))
COUNTRIES = (
    ("DE", 0.55, "EUR", 1.0),
    ("AT", 0.12, "EUR", 1.0),
    ("FR", 0.13, "EUR", 1.0),
    ("CH", 0.08, "CHF", 1.05),
    ("US", 0.12, "USD", 1.1),
)
"""Name, weight, currency, price factor."""
HOURS = (2, 1, 1, 1, 1, 2, 4, 7, 9, 10, 10, 10, 11, 10, 9, 9, 10, 11, 13, 15, 16, 14, 9, 5)
"""Visits by hour of the day, UTC: a small peak at noon, a high one in the evening."""
SEARCHES = ("headphones", "usb c cable", "laptop 14", "phone case", "camera lens", "board game", "gift")


def items(rng: random.Random, number: int = 180) -> list[Item]:
    """Prices scatter around their category's and end in 0, 50, 90 or 99 cents."""
    made = []
    for i in range(number):
        category, price = CATEGORIES[i % len(CATEGORIES)]
        whole = max(1, int(price * rng.lognormvariate(0, 0.5)) // 100)
        made.append(Item(f"sku-{1000 + i}", category, whole * 100 + rng.choice((0, 50, 90, 99))))
    return made
