"""Hashes that are the same for ever, on every machine: for out-of-vocabulary rows, hashed tables and splits.

Strings: FNV-1a, 64 bits, over the UTF-8 bytes (http://www.isthe.com/chongo/tech/comp/fnv/). Integers: the output function of SplitMix64
applied to the value plus its increment (Steele, Lea and Flood, OOPSLA 2014; http://prng.di.unimi.it/splitmix64.c), two's complement.
FNV's low bits are weak for short strings, so `hash64` passes strings through SplitMix64 too.

A tuple (a, b, ...), for crossed features: h = 0, then h = splitmix64(h ^ hash64(text)) for each value in order, whole numbers as
decimal text, so that 12 and "12" are one value (`cross_hash`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from escm2rec.preprocess.ragged import Float64s, Int64s, UInt64s

_FNV_OFFSET = np.uint64(0xCBF29CE484222325)
FEW = 16  # strings: a loop over the bytes of so few is faster than a vector step a position
_FNV_PRIME = np.uint64(0x100000001B3)


def fnv1a64(strings: pa.Array) -> UInt64s:
    """FNV-1a of each string's UTF-8 bytes; vectorised over strings, one step a byte position."""
    array = strings.cast(pa.large_binary())
    _, offsets_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data_buffer, dtype=np.uint8) if data_buffer is not None else np.empty(0, dtype=np.uint8)
    hashes = np.full(len(array), _FNV_OFFSET, dtype=np.uint64)
    starts, lengths = offsets[:-1], np.diff(offsets)
    alive = np.flatnonzero(lengths > 0)
    position = 0
    while len(alive) > FEW:
        hashes[alive] = (hashes[alive] ^ data[starts[alive] + position]) * _FNV_PRIME
        position += 1
        alive = alive[lengths[alive] > position]
    for row in alive.tolist():
        value = int(hashes[row])
        for byte in data[starts[row] + position : offsets[row + 1]].tolist():
            value = (value ^ byte) * int(_FNV_PRIME) & 0xFFFFFFFFFFFFFFFF
        hashes[row] = value
    return hashes


def splitmix64(values: Any) -> UInt64s:
    """SplitMix64 of each integer, signed ones taken as their two's complement."""
    x = np.ascontiguousarray(values).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: UInt64s = x ^ (x >> np.uint64(31))
    return result


def hash64(values: Any) -> UInt64s:
    """Hash of int64 values (numpy) or strings (Arrow): splitmix64, of the FNV-1a for strings."""
    return splitmix64(fnv1a64(values) if isinstance(values, pa.Array | pa.ChunkedArray) else values)


def cross_hash(columns: Sequence[pa.Array]) -> UInt64s:
    """Hash of each row's tuple of values: columns of whole numbers or strings, without null."""
    hashes: UInt64s = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        words, index = distinct(column)
        hashes = splitmix64(hashes ^ hash64(words.cast(pa.large_string()))[index])
    return hashes


def split_points(base: UInt64s, salt: str) -> Float64s:
    """A number in [0, 1) for each base hash, another one for another salt: the top 53 bits of splitmix64(base ^ fnv1a64(salt))."""
    salted = splitmix64(base ^ fnv1a64(pa.array([salt]))[0])
    return (salted >> np.uint64(11)).astype(np.float64) * 2.0**-53


def row_hash(file_name: str, rows: Int64s) -> UInt64s:
    """Hash of a row's place: splitmix64(fnv1a64(file name) + row index, from 0)."""
    return splitmix64(fnv1a64(pa.array([file_name]))[0] + rows.astype(np.uint64))


def distinct(values: pa.Array) -> tuple[pa.Array, Int64s]:
    """Distinct values, and for each value the position of its own among them."""
    encoded = pc.dictionary_encode(values)
    return encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
