"""Numbers to table rows: buckets between quantiles of the training values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from escm2rec.preprocess.ragged import Array, Float64s, Int32s, Int64s
from escm2rec.preprocess.value_counts import ValueCounter, count_values

MAX_INT64 = np.int64(2**63 - 1)
NO_NUMBER = np.int32(-1)


def keys_of(numbers: Float64s) -> Int64s:
    """An int64 for each float64, in the same order: its bits, those of a negative number turned over. 0.0 and -0.0 are one."""
    bits = (numbers + 0.0).view(np.int64)
    return np.where(bits < 0, bits ^ MAX_INT64, bits)


def numbers_of(keys: Int64s) -> Float64s:
    """The numbers of such keys."""
    return np.where(keys < 0, keys ^ MAX_INT64, keys).view(np.float64)


def count_numbers(numbers: Float64s, times: Int64s | None = None) -> pl.DataFrame:
    """`count_values` of the keys of numbers that are there."""
    held = ~np.isnan(numbers)
    return count_values(keys_of(numbers[held]), None if times is None else times[held])


def fit_boundaries(counter: ValueCounter, buckets: int, memory_bytes: int) -> list[float]:
    """Boundaries of buckets of about equally many values, from the counts of their keys (`keys_of`): exact quantiles.

    Boundary k is the least value that at least k / `buckets` of all values do not exceed. Equal ones are one, and one that no value exceeds
    is left out, so that every bucket holds training values.
    """
    total, reached = counter.occurrences(), 0
    wanted = -(-np.arange(1, buckets, dtype=np.int64) * total // buckets)  # values at or below the boundary, at least
    found: list[Array] = []
    greatest = np.float64(-np.inf)
    for table in counter.by_value(memory_bytes):
        numbers, counts = numbers_of(table["value"].to_numpy()), reached + np.cumsum(table["count"].to_numpy())
        found.append(numbers[np.searchsorted(counts, wanted[(wanted > reached) & (wanted <= counts[-1])])])
        reached, greatest = int(counts[-1]), numbers[-1]
    boundaries = np.unique(np.concatenate([*found, np.zeros(0)]))
    return [float(boundary) for boundary in boundaries[boundaries < greatest]]


class Buckets:
    """Finds the bucket of each number."""

    def __init__(self, boundaries: Sequence[float]) -> None:
        self._boundaries = np.array(boundaries, dtype=np.float64)

    def rows(self, numbers: Any) -> Int32s:
        """How many boundaries are below each number; -1 for NaN."""
        rows = np.searchsorted(self._boundaries, numbers).astype(np.int32)
        return np.where(np.isnan(numbers), NO_NUMBER, rows)
