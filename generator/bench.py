"""Millions of clickstream events in seconds: JSON of exactly 255 bytes, users by Zipf's law. For benchmarks; numpy only.

Out: lists of raw bytes, keys and values. Called by `benchmarks`.
"""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt

EVENT_BYTES = 255
EXPONENT = 0.8
START_MS = 1_772_323_200_000
NAMES = (
    ("page_view", 0.44), ("view_item", 0.25), ("search", 0.09), ("session_start", 0.08), ("add_to_cart", 0.07), ("begin_checkout", 0.03), ("purchase", 0.025),
    ("sign_up", 0.015),
)  # fmt: skip
CHANNELS = (b"organic", b"direct_", b"payedad", b"social_", b"email__")
DEVICES = (b"mobile_", b"desktop", b"tablet_")


def zipf_users(rng: np.random.Generator, n: int, users: int, exponent: float = EXPONENT) -> npt.NDArray[np.int64]:
    """[n] user numbers in [0, users), the i-th as likely as (i + 1) ** -exponent: the continuous law's inverse, scattered so that rank is not order."""
    power = 1 - exponent
    rank = ((users**power - 1) * rng.random(n) + 1) ** (1 / power)
    ranks: npt.NDArray[np.int64] = np.minimum(rank.astype(np.int64) - 1, users - 1)
    scattered: npt.NDArray[np.int64] = (ranks * 2_654_435_761 + 12_345) % users
    return scattered if np.gcd(2_654_435_761, users) == 1 else ranks


def events(
    n: int, users: int, seed: int = 1, start_ms: int = START_MS, span_ms: int = 3_600_000, exponent: float = EXPONENT
) -> tuple[list[bytes], list[bytes]]:
    """(keys, values) of `n` events whose ts rise evenly over `span_ms` with a jitter of 5 s; event ids never repeat within a seed."""
    rng = np.random.default_rng(seed)
    user = zipf_users(rng, n, users, exponent)
    ts = start_ms + np.arange(n, dtype=np.int64) * span_ms // max(n, 1) + rng.integers(0, 5000, n)
    which = rng.choice(len(NAMES), n, p=np.array([weight for _, weight in NAMES]))
    rows = np.empty((n, EVENT_BYTES), np.uint8)
    for number, (name, _) in enumerate(NAMES):
        chosen = np.flatnonzero(which == number)
        rows[chosen] = _fill(rng, name, seed, chosen, user[chosen], ts[chosen])
    keys = np.empty((n, 9), np.uint8)
    keys[:, 0] = ord("u")
    keys[:, 1:] = _digits(user, 8)
    return _lines(keys), _lines(rows)


def _fill(
    rng: np.random.Generator, name: str, seed: int, number: npt.NDArray[np.int64], user: npt.NDArray[np.int64], ts: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """[m, 255] events of one name: a template with its variable parts written over."""
    body = {
        "event_id": f"{seed % 10000:04d}-eeeeeeeeeeee", "event": name, "ts": 1_000_000_000_000, "user_id": "uuuuuuuuu", "session_id": "ssssssssssss",
        "channel": "ccccccc", "device": "ddddddd", "country": "DE", "page": "", "item_id": "iiiiiii", "item_category": "audio", "price": 9999.99,
    }  # fmt: skip
    if name == "purchase":
        del body["session_id"], body["item_category"]
        body |= {"order_id": "oooooooooo", "value": 8888.88, "currency": "EUR"}
    body["page"] = "/"
    short = EVENT_BYTES - len(json.dumps(body, separators=(",", ":")))
    body["page"] = "/" + "p" * short
    template = json.dumps(body, separators=(",", ":")).encode()
    rows = np.tile(np.frombuffer(template, np.uint8), (len(number), 1))

    def put(mark: bytes, values: npt.NDArray[np.uint8]) -> None:
        at = template.index(mark)
        rows[:, at : at + values.shape[1]] = values

    put(b"eeeeeeeeeeee", _digits(number, 12))
    put(b"1000000000000", _digits(ts, 13))
    put(b"uuuuuuuuu", np.concatenate((np.full((len(user), 1), ord("u"), np.uint8), _digits(user, 8)), axis=1))
    if name != "purchase":
        put(b"ssssssssssss", _digits(user * 1000 + ts // 1_800_000 % 1000, 12))
    put(b"ccccccc", _choices(rng, CHANNELS, len(number)))
    put(b"ddddddd", _choices(rng, DEVICES, len(number)))
    put(b"iiiiiii", _digits(rng.integers(0, 5000, len(number)), 7))
    put(b"9999.99", _digits(rng.integers(1000, 9999, len(number)), 4))
    if name == "purchase":
        put(b"oooooooooo", _digits(number, 10))
        put(b"8888.88", _digits(rng.integers(1000, 9999, len(number)), 4))
    return rows


def _digits(values: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.uint8]:
    """[m, width] decimal digits with leading zeros, as ASCII."""
    powers = 10 ** np.arange(width - 1, -1, -1, dtype=np.int64)
    return (values[:, None] // powers % 10 + ord("0")).astype(np.uint8)


def _choices(rng: np.random.Generator, texts: tuple[bytes, ...], m: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(texts), np.uint8).reshape(len(texts), -1)[rng.integers(0, len(texts), m)]


def _lines(rows: npt.NDArray[np.uint8]) -> list[bytes]:
    raw, width = rows.tobytes(), rows.shape[1]
    return [raw[i : i + width] for i in range(0, len(raw), width)]
