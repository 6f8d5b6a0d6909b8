"""Numbers from bytes, eight characters at a time, for columns of them at once.

`words[i]` is the little-endian 64-bit word of the bytes from i: eight characters, the first one lowest. Digits are gathered in three
multiplications (D. Lemire, "Quickly parsing eight digits", 2018), so a number costs a fixed few vector operations and no loop.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa

from escm2rec.preprocess.ragged import Bools, Bytes, Float64s, Int64s, UInt64s, offsets_of, ragged_index

PAD = 24  # bytes that must be readable before and after the text
MAX_INT64 = np.uint64(2**63 - 1)
MAX_FLOAT32 = float(np.finfo(np.float32).max)
MIN_FLOAT32 = float(np.finfo(np.float32).tiny)

_ZEROS = np.uint64(0x3030303030303030)
_SIXES = np.uint64(0x0606060606060606)
_HIGH = np.uint64(0xF0F0F0F0F0F0F0F0)
_DOTS = np.uint64(0x2E2E2E2E2E2E2E2E)
_ONES = np.uint64(0x0101010101010101)
_TOPS = np.uint64(0x8080808080808080)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
# Shifts and masks by number of bytes, 0 to 8; a shift by 64 is undefined, so the masks are tables.
_LAST = np.array([0] + [(0xFFFFFFFFFFFFFFFF << 8 * (8 - n)) & 0xFFFFFFFFFFFFFFFF for n in range(1, 9)], dtype=np.uint64)
_FIRST = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)
_TEN_TO = np.array([10.0**n for n in range(9)])


def words_of(buffer: Bytes) -> UInt64s:
    """The unaligned 64-bit word at each byte, a view of the buffer."""
    return np.ndarray(shape=(len(buffer) - 7,), dtype="<u8", buffer=buffer.data, strides=(1,))


def first_bytes(words: UInt64s, starts: Int64s, lengths: Int64s) -> UInt64s:
    """Up to eight bytes from each start as one word, zero above."""
    result: UInt64s = words[starts] & _FIRST[lengths]
    return result


def whole_numbers(words: UInt64s, starts: Int64s, ends: Int64s) -> tuple[UInt64s, Bools]:
    """Non-negative decimal numbers and whether each is one that fits int64."""
    lengths = ends - starts
    value, good = _eight_digits(words, ends, np.minimum(lengths, 8))
    good &= lengths > 0
    long = np.flatnonzero(lengths > 8)
    if len(long):
        extra = lengths[long]
        middle, middle_good = _eight_digits(words, ends[long] - 8, np.minimum(extra - 8, 8))
        high, high_good = _eight_digits(words, ends[long] - 16, np.clip(extra - 16, 0, 3))
        whole = value[long] + middle * np.uint64(10**8) + high * np.uint64(10**16)
        value[long] = whole
        good[long] &= middle_good & high_good & (extra <= 19) & (whole <= MAX_INT64)
    return value, good


def _eight_digits(words: UInt64s, ends: Int64s, lengths: Int64s) -> tuple[UInt64s, Bools]:
    """The last `lengths` (0 to 8) bytes before each end as a number, and whether they are digits."""
    digits = (words[ends - 8] ^ _ZEROS) & _LAST[lengths]
    good: Bools = (((digits + _SIXES) | digits) & _HIGH) == 0
    return _gather_digits(digits), good


def _gather_digits(digits: UInt64s) -> UInt64s:
    """Eight digit values, most significant in the lowest byte, to one number (overwrites its argument)."""
    digits *= np.uint64(10 * 256 + 1)
    digits >>= np.uint64(8)
    digits &= np.uint64(0x00FF00FF00FF00FF)
    digits *= np.uint64(100 * 65536 + 1)
    digits >>= np.uint64(16)
    digits &= np.uint64(0x0000FFFF0000FFFF)
    digits *= np.uint64(10000 * 2**32 + 1)
    digits >>= np.uint64(32)
    return digits


def decimals(buffer: Bytes, words: UInt64s, starts: Int64s, ends: Int64s) -> Float64s:
    """Decimal numbers, correctly rounded; NaN where the text is none, or not finite."""
    lengths = ends - starts
    short = np.minimum(lengths, 8)
    text = words[ends - 8]
    dotted = (text ^ _DOTS) | ~_LAST[short]
    # The lowest flag of this zero-byte test is exact: it marks the first dot.
    flag = (dotted - _ONES) & ~dotted & _TOPS
    flag &= ~flag + np.uint64(1)
    has_dot = flag != 0
    before = np.where(has_dot, np.bitwise_count(flag - np.uint64(1)) >> 3, 8).astype(np.int64)
    digits = (text ^ _ZEROS) & _LAST[short]
    below = _FIRST[np.minimum(before, 7)]
    merged = np.where(has_dot, (digits & ~(below << np.uint64(8) | np.uint64(0xFF))) | ((digits & below) << np.uint64(8)), digits)
    good = ((((merged + _SIXES) | merged) & _HIGH) == 0) & (lengths <= 8) & (lengths > has_dot)
    value = _gather_digits(merged).astype(np.float64)
    value /= _TEN_TO[np.where(has_dot, 7 - before, 0)]
    odd = np.flatnonzero(~good)
    if len(odd):
        parsed = parse_decimals(slices(buffer, starts[odd], ends[odd]))
        value[odd] = np.where(np.isfinite(parsed), parsed, np.nan)
    return value


def parse_decimals(strings: pa.Array) -> Float64s:
    """Any notation of a float; NaN for what is none and for null."""
    parsed: Float64s = pl.Series(pl.from_arrow(strings)).cast(pl.Float64, strict=False).fill_null(float("nan")).to_numpy()
    return parsed


def slices(buffer: Bytes, starts: Int64s, ends: Int64s) -> pa.Array:
    """Pieces of the buffer as large strings; bytes that are no UTF-8 become question marks."""
    spans = np.empty(2 * len(starts) + 1, dtype=np.int64)
    spans[0:-1:2], spans[1::2], spans[-1] = starts, ends, 0
    _, index = ragged_index(spans, np.arange(0, 2 * len(starts), 2, dtype=np.int64))
    data = np.where(buffer[index] < 128, buffer[index], np.uint8(ord("?")))
    offsets = offsets_of(ends - starts)
    return pa.LargeStringArray.from_buffers(len(starts), pa.py_buffer(offsets), pa.py_buffer(data))
