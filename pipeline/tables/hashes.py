"""Hashes of texts, compiled: XXH64, and Kafka's partitioner.

In: texts as one buffer of UTF-8. Out: hashes and partitions. Called by decode, and by replay to send events where they belong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipeline.columns import I32, I64, U8, U64
from pipeline.tables.kernel import jit

_P1 = np.uint64(0x9E3779B185EBCA87)
_P2 = np.uint64(0xC2B2AE3D27D4EB4F)
_P3 = np.uint64(0x165667B19E3779F9)
_P4 = np.uint64(0x85EBCA77C2B2AE63)
_P5 = np.uint64(0x27D4EB2F165667C5)
SECOND_SEED = np.uint64(0x5851F42D4C957F2D)


@jit
def _rotl(x: np.uint64, r: int) -> np.uint64:
    return (x << np.uint64(r)) | (x >> np.uint64(64 - r))


def _load(bits: int) -> Any:
    """A compiled read of `bits` bits at a byte of a buffer: `base` is `buffer.ctypes.data`. Given an array, every call would count references to it."""

    @intrinsic
    def load(_context: Any, base: Any, at: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            address = builder.inttoptr(builder.add(arguments[0], arguments[1]), ir.IntType(bits).as_pointer())
            return builder.zext(builder.load(address, align=1), ir.IntType(64)) if bits < 64 else builder.load(address, align=1)

        return (types.uint64 if bits == 64 else types.int64)(types.uintp, types.int64), generate

    return load


byte_at, u32_at, u64_at = _load(8), _load(32), _load(64)


@intrinsic
def trailing_zeros(_context: Any, word: Any) -> Any:
    """Index of a word's lowest bit that is set; the word is not 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.uint64), generate


@jit
def _round(acc: np.uint64, lane: np.uint64) -> np.uint64:
    return _rotl(acc + lane * _P2, 31) * _P1


@jit
def xxh64(base: int, start: int, stop: int, seed: np.uint64) -> np.uint64:
    """XXH64 of bytes `start` to `stop` of the buffer at `base` (Collet's specification); the same as ClickHouse's `xxHash64` when the seed is 0."""
    n = stop - start
    at = start
    if n >= 32:
        v1 = seed + _P1 + _P2
        v2 = seed + _P2
        v3 = seed
        v4 = seed - _P1
        while at + 32 <= stop:
            v1 = _round(v1, u64_at(base, at))
            v2 = _round(v2, u64_at(base, at + 8))
            v3 = _round(v3, u64_at(base, at + 16))
            v4 = _round(v4, u64_at(base, at + 24))
            at += 32
        h = _rotl(v1, 1) + _rotl(v2, 7) + _rotl(v3, 12) + _rotl(v4, 18)
        for v in (v1, v2, v3, v4):
            h = (h ^ _round(np.uint64(0), v)) * _P1 + _P4
    else:
        h = seed + _P5
    h += np.uint64(n)
    while at + 8 <= stop:
        h = _rotl(h ^ _round(np.uint64(0), u64_at(base, at)), 27) * _P1 + _P4
        at += 8
    if at + 4 <= stop:
        h = _rotl(h ^ (np.uint64(u32_at(base, at)) * _P1), 23) * _P2 + _P3
        at += 4
    while at < stop:
        h = _rotl(h ^ (np.uint64(byte_at(base, at)) * _P5), 11) * _P1
        at += 1
    h = (h ^ (h >> np.uint64(33))) * _P2
    h = (h ^ (h >> np.uint64(29))) * _P3
    return h ^ (h >> np.uint64(32))


@jit
def hash64(data: U8, ends: I64, out: U64) -> None:
    """Row i of `data` is `data[ends[i-1]:ends[i]]`; its XXH64 goes to `out[i]`, 0 for an empty row."""
    base, start = data.ctypes.data, 0
    for i in range(len(ends)):
        out[i] = xxh64(base, start, ends[i], np.uint64(0)) if ends[i] > start else np.uint64(0)
        start = ends[i]


@jit
def hash128(data: U8, ends: I64, out: U64) -> None:
    """As `hash64`, two XXH64 with different seeds into `out[i, 0:2]`."""
    base, start = data.ctypes.data, 0
    for i in range(len(ends)):
        out[i, 0] = xxh64(base, start, ends[i], np.uint64(0))
        out[i, 1] = xxh64(base, start, ends[i], SECOND_SEED)
        start = ends[i]


@jit
def murmur2_partition(base: int, start: int, stop: int, partitions: int) -> int:
    """Kafka's default partitioner: `toPositive(murmur2(row)) % partitions` (org.apache.kafka.common.utils.Utils.murmur2)."""
    m = np.uint32(0x5BD1E995)
    h = np.uint32(0x9747B28C) ^ np.uint32(stop - start)
    at = start
    while at + 4 <= stop:
        k = np.uint32(u32_at(base, at))
        k = np.uint32(k * m)
        k ^= k >> np.uint32(24)
        k = np.uint32(k * m)
        h = np.uint32(h * m) ^ k
        at += 4
    rest = stop - at
    if rest >= 3:
        h ^= np.uint32(byte_at(base, at + 2)) << np.uint32(16)
    if rest >= 2:
        h ^= np.uint32(byte_at(base, at + 1)) << np.uint32(8)
    if rest >= 1:
        h ^= np.uint32(byte_at(base, at))
        h = np.uint32(h * m)
    h ^= h >> np.uint32(13)
    h = np.uint32(h * m)
    h ^= h >> np.uint32(15)
    return np.int64((h & np.uint32(0x7FFFFFFF)) % np.uint32(partitions))


@jit
def murmur2_partitions(data: U8, ends: I64, partitions: int, out: I32) -> None:
    """`murmur2_partition` of each row."""
    base, start = data.ctypes.data, 0
    for i in range(len(ends)):
        out[i] = murmur2_partition(base, start, ends[i], partitions)
        start = ends[i]


def text_rows(texts: list[str]) -> tuple[U8, I64]:
    """Strings as one UTF-8 buffer and each row's end, what the hash kernels read."""
    joined = "".join(texts)
    if joined.isascii():
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        return np.frombuffer(joined.encode(), np.uint8), np.cumsum(lengths)
    rows = [text.encode() for text in texts]
    return np.frombuffer(b"".join(rows), np.uint8), np.cumsum(np.fromiter(map(len, rows), np.int64, len(rows)))
