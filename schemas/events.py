"""The events a shop sends: one JSON object a Kafka message, on `clickstream` or `orders`.

`pipeline.decode` parses with these types; `schemas.generate` writes their JSON Schema. A field means the same on either topic, so both
types have all of them (GA4 sends `value` with `add_to_cart`, too). Service, inventory and ad spend will be topics of their own.

Rules that the types can't say: `user_id` may be absent only when `anonymous_id` is there, which then is the user; of a key that
comes twice the last one counts; unknown fields are left out and counted; an optional text that is null or empty is absent;
a `ts` of whole milliseconds may be written as a float (1.7e12).
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final

import msgspec
from msgspec import Meta

TOPICS: Final = ("clickstream", "orders")

EVENTS_OF_TOPIC: Final[dict[str, tuple[str, ...]]] = {
    "clickstream": (
        "page_view", "session_start", "sign_up", "login", "view_item_list", "select_item", "view_item", "search", "add_to_cart",
        "remove_from_cart", "view_cart", "begin_checkout", "add_shipping_info", "add_payment_info", "view_promotion", "select_promotion",
        "view_content", "engage_content", "page_error",
    ),
    "orders": ("order_created", "purchase", "payment_failed", "order_cancelled", "order_shipped", "order_delivered", "refund"),
}  # fmt: skip
TOPIC_OF_EVENT: Final[dict[str, int]] = {name: TOPICS.index(topic) for topic, names in EVENTS_OF_TOPIC.items() for name in names}
"""Known names and the topic they belong to. Other names are accepted and counted: shops add their own."""

ID_LENGTH: Final = 256
TEXT_LENGTH: Final = 1024
MAX_ITEMS: Final = 1000
NUMBER_LIMIT: Final = 250_000_000_000
"""Below 2^38, so that a float of up to four decimals, times 10,000 and rounded, is the amount that was written: half a step of the float
(2^-16 at 2^38, times 10,000: 0.15) and half a step of the product (0.25) stay below one half."""

ABSENT: Final = float("nan")
"""Of a number that was not sent. JSON has no NaN, so none can be sent; a column of floats needs no second look for None."""

Id = Annotated[str, Meta(min_length=1, max_length=ID_LENGTH)]
OptionalId = Annotated[str, Meta(max_length=ID_LENGTH)] | None
Text = Annotated[str, Meta(max_length=TEXT_LENGTH)] | None
Number = Annotated[float, Meta(ge=0, le=NUMBER_LIMIT)] | None
Timestamp = (
    Annotated[int, Meta(description="ms since 1970 UTC")] | Annotated[datetime, Meta(tz=True, description="RFC 3339 with an offset")]
)


class Item(msgspec.Struct, gc=False):
    """One line of an order."""

    item_id: Text = ""
    item_category: Text = ""
    quantity: Number = ABSENT
    price: Number = ABSENT


class Event(msgspec.Struct, gc=False):
    """The envelope and every known field. Fields stand in the order producers tend to write them: msgspec looks each key up from where the last one was found."""

    event_id: Id
    event: Id
    ts: Timestamp
    user_id: Id | None = None
    anonymous_id: OptionalId = ""
    session_id: Text = ""
    channel: Text = ""
    campaign_id: Text = ""
    device: Text = ""
    country: Text = ""
    app_version: Text = ""
    experiment: Text = ""
    variant: Text = ""
    currency: Text = ""
    page: Text = ""
    item_id: Text = ""
    item_category: Text = ""
    price: Number = ABSENT
    quantity: Number = ABSENT
    cart_id: Text = ""
    order_id: Text = ""
    value: Number = ABSENT
    tax: Number = ABSENT
    shipping: Number = ABSENT
    discount: Number = ABSENT
    coupon: Text = ""
    payment_method: Text = ""
    error_code: Text = ""
    refund_value: Number = ABSENT
    refund_reason: Text = ""
    items: Annotated[list[Item], Meta(max_length=MAX_ITEMS)] | None = None
    content_id: Text = ""
    kind: Text = ""
    load_ms: Number = ABSENT
    search_term: Text = ""
    promotion_id: Text = ""


MONEY_FIELDS: Final = ("price", "value", "tax", "shipping", "discount", "refund_value")
NUMBER_FIELDS: Final = (*MONEY_FIELDS, "quantity", "load_ms")
STRING_FIELDS: Final = tuple(
    name for name in Event.__struct_fields__ if name not in (*NUMBER_FIELDS, "event_id", "event", "ts", "user_id", "anonymous_id", "items")
)
"""Fields that a filter, a breakdown or a dimension may name."""


class ClickstreamEvent(Event, gc=False):
    """What a visitor does in the shop. Key of the message: `user_id`."""


class OrderEvent(Event, gc=False):
    """What happens to an order. Key of the message: `user_id`."""


KNOWN_FIELDS: Final = frozenset(Event.__struct_fields__)
