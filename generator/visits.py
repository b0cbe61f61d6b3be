"""One visitor's life in the shop: visits, what they look at, orders and what becomes of them, as (topic, ts, body) in no particular order.

Called by `generator.shop` and `generator.live` once a user, with a random generator of the user's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from generator.catalog import CHANNELS, COUNTRIES, DEVICES, HOURS, SEARCHES, Channel, Item
from generator.incidents import CALM, Conditions

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
CAMPAIGN_DAY = 5  # every week's sixth day has a promotion: more visits, discounts
Event = tuple[str, int, dict[str, Any]]


def number_of(user_id: str) -> int:
    """Visitors are numbered from 1, or from 0, without a gap."""
    return int(user_id[1:])


class Visitor:
    """A user with habits: a device, a country, how often they come back, how much they like to buy. Many wait for their next visit: each is small."""

    __slots__ = (
        "conditions", "country", "currency", "days", "device", "factor", "items", "liking", "orders", "pause_days", "registered", "rng",
        "sessions", "skill", "start_ms", "stays", "user_id",
    )  # fmt: skip

    def __init__(self, rng: random.Random, number: int, start_ms: int, days: int, items: list[Item], conditions: Conditions = CALM) -> None:
        self.rng = rng
        self.conditions = conditions
        self.user_id = f"u{number:06d}"
        self.start_ms, self.days, self.items = start_ms, days, items
        self.device, _, self.skill = rng.choices(DEVICES, [d[1] for d in DEVICES])[0]
        self.country, _, self.currency, self.factor = rng.choices(COUNTRIES, [c[1] for c in COUNTRIES])[0]
        self.liking = rng.lognormvariate(0, 0.5)
        self.pause_days = rng.lognormvariate(1.3, 0.9)
        self.stays = rng.random() < 0.45  # else the first visit is the last
        self.registered = False
        self.orders = 0
        self.sessions = 0

    def events(self) -> Iterator[Event]:
        rng = self.rng
        day = float(rng.triangular(0, self.days, 0))
        while day < self.days:
            ts = self.start_ms + int(day) * DAY_MS + self.time_of_day()
            yield from self.visit(ts, int(day) % 7 == CAMPAIGN_DAY)
            if not self.stays:
                return
            day += self.days_away()

    def time_of_day(self) -> int:
        """ms after midnight, by the day's rhythm."""
        return self.rng.choices(range(24), HOURS)[0] * HOUR_MS + self.rng.randrange(HOUR_MS)

    def days_away(self) -> float:
        """Days until the next visit; who has bought comes back sooner."""
        return max(0.2, self.rng.expovariate(1 / self.pause_days)) * (0.6 if self.orders else 1.0)

    # --- a visit --------------------------------------------------------------------------------------------------------

    def visit(self, ts: int, promotion: bool) -> Iterator[Event]:
        """Everything that follows from a visit that begins at `ts`, the fate of its order days later included."""
        rng = self.rng
        self.sessions += 1
        channel: Channel = rng.choices(CHANNELS, [c.weight for c in CHANNELS])[0]
        envelope: dict[str, Any] = {
            "user_id": self.user_id, "session_id": f"{self.user_id}-{self.sessions}", "channel": channel.name, "device": self.device,
            "country": self.country, "app_version": "5.2.1" if self.device == "mobile" else "web",
        }  # fmt: skip
        if channel.campaigns:
            envelope["campaign_id"] = rng.choice(channel.campaigns)
        intent = channel.intent * self.skill * self.liking * (1.4 if promotion else 1.0)

        def click(name: str, **fields: Any) -> Event:
            return "clickstream", ts, {"event": name, **envelope, **fields}

        def page(path: str) -> Event:
            return click("page_view", page=path, load_ms=int(rng.lognormvariate(6.3 if self.device == "mobile" else 5.9, 0.5)))

        yield click("session_start")
        yield page("/")
        if promotion and rng.random() < 0.5:
            yield click("view_promotion", promotion_id="weekend")
        if rng.random() < 0.35 / max(intent, 0.3):
            return  # a bounce
        if not self.registered and rng.random() < 0.25:
            ts += self._pause(40)
            self.registered = True
            yield click("sign_up")
        elif self.registered and rng.random() < 0.4:
            ts += self._pause(10)
            yield click("login")
        cart: list[Item] = []
        for _ in range(1 + min(9, int(rng.expovariate(1 / 2.2)))):
            ts += self._pause(35)
            if rng.random() < 0.3:
                yield click("search", search_term=rng.choice(SEARCHES))
            else:
                yield page("/category")
            ts += self._pause(20)
            item = self.items[min(int(rng.paretovariate(0.7)) - 1, len(self.items) - 1)]
            looked = {"item_id": item.item_id, "item_category": item.category, "price": self._price(item) / 100}
            yield page(f"/item/{item.item_id}")
            yield click("view_item", **looked)
            if rng.random() < 0.16 * min(intent, 3):
                ts += self._pause(30)
                cart.append(item)
                yield click("add_to_cart", **looked, quantity=1, cart_id=f"c-{self.user_id}-{self.sessions}")
                if rng.random() < 0.12:
                    ts += self._pause(25)
                    cart.remove(item)
                    yield click("remove_from_cart", **looked, quantity=1, cart_id=f"c-{self.user_id}-{self.sessions}")
            if rng.random() < self.conditions.page_fails(ts):
                yield click("page_error", page=f"/item/{item.item_id}")
        if cart and rng.random() < 0.55:
            if rng.random() < 0.1:
                ts += int(rng.uniform(0.7, 20) * HOUR_MS)  # comes back to the cart later: another session of the same visit's id
            ts += self._pause(40)
            yield click("begin_checkout", cart_id=f"c-{self.user_id}-{self.sessions}")
            if rng.random() < 0.85:
                ts += self._pause(60)
                yield click("add_shipping_info", cart_id=f"c-{self.user_id}-{self.sessions}")
                ts += self._pause(45)
                yield from self._order(ts, cart, envelope, promotion)

    def _pause(self, seconds: float) -> int:
        """At least a second; whole seconds now and then, so that equal times occur."""
        ms = 1000 + int(self.rng.expovariate(1 / (seconds * 1000)))
        return ms if self.rng.random() < 0.9 else ms // 1000 * 1000

    def _price(self, item: Item) -> int:
        return round(item.cents * self.factor)

    # --- an order -------------------------------------------------------------------------------------------------------

    def _order(self, ts: int, cart: list[Item], envelope: dict[str, Any], promotion: bool) -> Iterator[Event]:
        rng = self.rng
        self.orders += 1
        quantities = [rng.choices((1, 2, 3), (0.85, 0.12, 0.03))[0] for _ in cart]
        goods = sum(self._price(item) * n for item, n in zip(cart, quantities, strict=True))
        discount = goods // 10 if promotion else 0
        shipping = 0 if goods > 5000 else 499
        value = goods - discount + shipping
        lines = [
            {"item_id": i.item_id, "item_category": i.category, "quantity": n, "price": self._price(i) / 100}
            for i, n in zip(cart, quantities, strict=True)
        ]
        money = {
            "currency": self.currency,
            "value": value / 100,
            "tax": value * 19 // 119 / 100,
            "shipping": shipping / 100,
            "discount": discount / 100,
        }
        order_id = f"o-{self.user_id}-{self.orders}"
        method = rng.choices(("card", "wallet", "invoice"), (0.6, 0.3, 0.1))[0]

        def order(name: str, **fields: Any) -> Event:
            return "orders", ts, {"event": name, **envelope, "order_id": order_id, **fields}

        coupon = {"coupon": "WEEKEND10"} if promotion else {}
        yield order("order_created", **money, **coupon, items=lines)
        paid = False
        for _ in range(3):
            ts += self._pause(25)
            if rng.random() < self.conditions.payment_succeeds(ts):
                paid = True
                break
            yield order(
                "payment_failed",
                payment_method=method,
                error_code=rng.choice(("soft_insufficient_funds", "soft_timeout", "hard_stolen_card")),
            )
            if rng.random() < 0.3:
                break
        if not paid:
            ts += int(rng.uniform(0.1, 30) * HOUR_MS)
            yield order("order_cancelled")
            return
        yield order("purchase", **money, **coupon, payment_method=method, items=lines)
        if rng.random() < 0.02:
            ts += int(rng.uniform(0.1, 5) * HOUR_MS)
            yield order("order_cancelled")
            yield order("refund", currency=self.currency, refund_value=value / 100, refund_reason="cancelled")
            return
        ts += int(rng.uniform(4, 40) * HOUR_MS)
        yield order("order_shipped")
        ts += int(rng.uniform(20, 90) * HOUR_MS)
        yield order("order_delivered")
        if rng.random() < 0.09:
            ts += int(rng.uniform(10, 200) * HOUR_MS)
            share = rng.choice((1.0, 1.0, 0.5))
            yield order(
                "refund",
                currency=self.currency,
                refund_value=int(goods * share) / 100,
                refund_reason=rng.choice(("size", "defect", "regret")),
            )
