"""What stands in the warehouse instead of a user's id."""

from __future__ import annotations

import hashlib
import hmac

from pipeline.pseudonyms import Pseudonyms, is_withheld


def test_a_pseudonym_is_the_keyed_hash_of_the_user_and_depends_on_the_secret() -> None:
    one, two = Pseudonyms(b"a secret of this shop"), Pseudonyms(b"another one")
    expected = hmac.new(b"a secret of this shop", b"user", hashlib.sha256).hexdigest()[:32].encode()
    assert one.of(b"user") == b"pseudonym:" + expected
    assert one.of(b"user") != one.of(b"user2")
    assert one.of(b"user") != two.of(b"user")


def test_rejects_keep_their_reason_and_lose_their_bytes() -> None:
    columns = {"topic": ["clickstream"] * 2, "key": [b"user", b""], "raw": [b"{", b""], "cause": ["why", "what"], "version": [3, 4]}
    changed = Pseudonyms(b"a secret of this shop").rejects(columns)
    assert changed["raw"] == [b"", b""]
    assert list(map(is_withheld, changed["key"])) == [True, True]
    assert {name: changed[name] for name in ("topic", "cause", "version")} == {
        name: columns[name] for name in ("topic", "cause", "version")
    }


def test_a_record_as_it_came_is_not_withheld() -> None:
    assert not any(map(is_withheld, (None, b"", b"user", b"a pseudonym:")))
