"""What a partition writes to its changelog, and reads back: deltas and snapshots, packed.

A record is a part of a delta or a snapshot: key `delta` or `snapshot`, value `Part`. The parts of one flush follow each other (one producer, one
transaction). A delta carries the columns accepted since the last flush; a snapshot carries the whole state and makes everything before it
unnecessary. The first flush of a partition is a snapshot. `pipeline.partition` calls `pack`, and `Reader` on a restore;
`pipeline.streaming.standby` goes on reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

PART_BYTES = 900_000
"""Below the broker's default max.message.bytes (1,048,588) with room for the batch's and the part's own framing."""

FORMAT = 1
"""Of meta and arrays. Whoever changes what is in them, so that it can't be told from the bytes, counts up: an older or newer program then stops with a clear word."""

DELTA = b"delta"
SNAPSHOT = b"snapshot"
SEALED = b"sealed"
"""Key of the last record of a changelog whose partition has gone over to another revision; the value is that revision in decimal."""
T = TypeVar("T")
NamedArrays = dict[str, npt.NDArray[Any]]


class Part(msgspec.Struct, array_like=True):
    flush: int
    index: int
    count: int
    data: bytes


class _ArrayHead(msgspec.Struct, array_like=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    packed: int  # bytes of its frame


class _Head(msgspec.Struct, array_like=True):
    meta: bytes
    arrays: list[_ArrayHead]
    format: int = 1


_decode_part = msgspec.msgpack.Decoder(Part).decode
_decode_head = msgspec.msgpack.Decoder(_Head).decode


REMEDY = "The state is gone: bring the topic back from a backup (`shopstream restore`), or let `shopstream rebuild --from earliest` compute all numbers anew."


class ChangelogError(Exception):
    """The changelog does not hold what this program wrote: a part is missing or damaged. Restoring would give wrong numbers, so it stops."""


def pack(key: bytes, flush: int, meta: Any, arrays: NamedArrays, level: int = 1) -> list[tuple[bytes, bytes]]:
    """Changelog records (key, value) of one delta or snapshot; `meta` is anything msgspec can encode.

    The head and each array are a frame of their own: as one frame they took twice the time and came out no smaller.
    """
    compress = zstandard.ZstdCompressor(level=level).compress
    frames = [compress(np.ascontiguousarray(array).tobytes()) for array in arrays.values()]
    heads = [_ArrayHead(name, array.dtype.str, array.shape, len(f)) for (name, array), f in zip(arrays.items(), frames, strict=True)]
    head = compress(msgspec.msgpack.encode(_Head(msgspec.msgpack.encode(meta), heads, FORMAT)))
    data = b"".join([len(head).to_bytes(4, "little"), head, *frames])
    count = max(1, -(-len(data) // PART_BYTES))
    return [(key, msgspec.msgpack.encode(Part(flush, i, count, data[i * PART_BYTES : (i + 1) * PART_BYTES]))) for i in range(count)]


def unpack(data: bytes, decode_meta: Callable[[bytes], T]) -> tuple[T, NamedArrays]:
    """The meta, decoded with a msgpack decoder made for its type, and the arrays that `pack` was given."""
    decompress = zstandard.ZstdDecompressor().decompress
    head, at = _head(data)
    arrays: NamedArrays = {}
    for item in head.arrays:
        raw = decompress(data[at : at + item.packed])
        arrays[item.name] = np.frombuffer(raw, np.dtype(item.dtype)).reshape(item.shape).copy()  # writable, as kernels are compiled for
        at += item.packed
    return decode_meta(head.meta), arrays


class Sealed(Exception):
    """The partition has gone over to another revision: nobody may go on with this changelog."""


def unpack_meta(data: bytes, decode_meta: Callable[[bytes], T]) -> T:
    """The meta alone."""
    return decode_meta(_head(data)[0].meta)


def _head(data: bytes) -> tuple[_Head, int]:
    """The head and where the first array's frame begins."""
    at = 4 + int.from_bytes(data[:4], "little")
    head = _decode_head(zstandard.ZstdDecompressor().decompress(data[4:at]))
    if head.format != FORMAT:
        raise ChangelogError(
            f"the changelog has format {head.format}, this version reads format {FORMAT}. Run the version that wrote it, or let "
            "`shopstream rebuild --from earliest` compute all numbers anew."
        )
    return head, at


class Entry(NamedTuple):
    """A whole delta or snapshot as it was packed."""

    snapshot: bool
    flush: int
    data: bytes


class Reader:
    """Gathers parts, in log order and in as many pieces as one likes, into entries that follow each other without a gap."""

    def __init__(self) -> None:
        self._newest: int | None = None  # flush number of the newest whole entry
        self._entries: list[Entry] = []
        self._parts: list[Part] = []

    def read(self, records: Iterable[tuple[bytes | None, bytes | None]]) -> None:
        """Raises ChangelogError on a gap in parts or flush numbers, Sealed at the end of a changelog that is closed.

        A snapshot begins anew, whatever came before it: the former owner may have deleted the rest of that while it was read.
        """
        for key, value in records:
            if key == SEALED and value is not None:
                raise Sealed(f"it has gone over to revision {value.decode()}")
            if key not in (DELTA, SNAPSHOT) or value is None:
                raise ChangelogError(f"a changelog record with key {key!r}: another program writes to this topic")
            try:
                part = _decode_part(value)
            except msgspec.DecodeError as error:
                raise ChangelogError(f"a damaged changelog record: {error}") from error
            if key == SNAPSHOT and part.index == 0:
                self._parts = []
            if part.index != len(self._parts) or (self._parts and part.flush != self._parts[0].flush):
                raise ChangelogError(f"flush {part.flush}: part {part.index} of {part.count} does not follow what was read. {REMEDY}")
            self._parts.append(part)
            if len(self._parts) == part.count:
                self._whole(key, part.flush, b"".join(p.data for p in self._parts))
                self._parts = []

    def take(self) -> list[Entry]:
        """What became whole since the last call: the newest snapshot among it and what follows."""
        entries, self._entries = self._entries, []
        return entries

    def end(self) -> None:
        """Nothing more comes. Raises ChangelogError when the last flush is not whole."""
        if self._parts:
            raise ChangelogError(f"flush {self._parts[0].flush} is not whole. {REMEDY}")

    def _whole(self, key: bytes, flush: int, data: bytes) -> None:
        if key == SNAPSHOT:
            self._entries = []
        elif self._newest is None:
            raise ChangelogError(f"flush {flush} comes before any snapshot: the head of the changelog is gone. {REMEDY}")
        elif flush != self._newest + 1:
            raise ChangelogError(f"flush {flush} follows {self._newest}: a part of the changelog is gone. {REMEDY}")
        self._newest = flush
        self._entries.append(Entry(key == SNAPSHOT, flush, data))
