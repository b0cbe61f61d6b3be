"""User ids that must not leave Kafka: what the warehouse is told of a rejected record instead of its bytes.

The warehouse's other rows count users and name none. `pipeline.streaming.flushes` asks before it inserts; `pipeline.reports.rejects` knows the mark.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

MARK = b"pseudonym:"
"""Begins the key of a record whose bytes are in Kafka alone. Whoever sends a key that begins so hides nothing but his own bad record's bytes."""
DIGITS = 32


class Pseudonyms:
    """The same user's records get the same pseudonym: HMAC-SHA-256 of the record's key, which is the user id, with a secret of the shop's own.

    Without the secret nobody can tell whose it is, not even by trying every id; another secret gives other pseudonyms.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def of(self, key: bytes) -> bytes:
        """MARK and 32 hexadecimal digits; MARK alone for a record without a key."""
        return MARK + hmac.digest(self._secret, key, hashlib.sha256).hex()[:DIGITS].encode() if key else MARK

    def rejects(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Columns of the warehouse's `rejects`, [n] each, with pseudonyms for keys and without the bytes: in a broken record an id may be anywhere."""
        return columns | {"key": [self.of(key) for key in columns["key"]], "raw": [b""] * len(columns["raw"])}


def is_withheld(key: bytes | None) -> bool:
    """Whether the record's bytes are in Kafka alone."""
    return key is not None and key.startswith(MARK)
