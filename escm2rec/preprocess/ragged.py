"""Rows that hold any number of values each: flat values, offsets, and perhaps weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]


SMALL_BYTES = 1 << 31  # offsets of 32 bits reach so far, and are a third faster


@dataclass(frozen=True, slots=True)
class Ragged:
    """Row i holds `values[offsets[i]:offsets[i + 1]]`, and the same slice of `weights` when there are any.

    `values` are numpy numbers, or Arrow strings; `offsets` begin at 0 and end at the number of values.
    """

    values: Any
    offsets: Int64s
    weights: Array | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64s:
        """Number of values of each row."""
        return np.diff(self.offsets)

    def take(self, rows: Int64s) -> Ragged:
        """The rows at these positions, in this order; a position of -1 gives an empty row."""
        if not len(self.values):
            return Ragged(self.values, np.zeros(len(rows) + 1, dtype=np.int64), self.weights)
        if isinstance(self.values, np.ndarray) and len(rows) and rows.min() >= 0:
            values, offsets = gather(self.values, self.offsets, rows)
            return Ragged(values, offsets, None if self.weights is None else gather(self.weights, self.offsets, rows)[0])
        offsets, index = ragged_index(self.offsets, rows)
        values = self.values.take(pa.array(index)) if isinstance(self.values, pa.Array) else self.values[index]
        return Ragged(values, offsets, None if self.weights is None else self.weights[index])

    def cut(self, most: int, keeps: Literal["first", "last"]) -> Ragged:
        """The first or last `most` values of each row."""
        lengths = np.minimum(self.lengths, most)
        offsets = offsets_of(lengths)
        if offsets[-1] == self.offsets[-1]:
            return self
        starts = self.offsets[:-1] if keeps == "first" else self.offsets[1:] - lengths
        index = np.repeat(starts - offsets[:-1], lengths)
        index += np.arange(len(index), dtype=np.int64)
        values = self.values.take(pa.array(index)) if isinstance(self.values, pa.Array) else self.values[index]
        return Ragged(values, offsets, None if self.weights is None else self.weights[index])


def held_in(array: pa.Array) -> Bools:
    """Which places of an Arrow array hold a value; its bits at once, where Arrow's own way to numpy goes bit by bit."""
    if not array.null_count:
        return np.ones(len(array), dtype=np.bool_)
    bits = array.buffers()[0]
    if bits is None:  # of the type null
        return np.zeros(len(array), dtype=np.bool_)
    first = array.offset // 8
    held = np.unpackbits(np.frombuffer(bits, np.uint8)[first : (array.offset + len(array) + 7) // 8], bitorder="little")
    return held[array.offset - 8 * first :][: len(array)].view(np.bool_)


def gather(values: Array, offsets: Int64s, rows: Int64s) -> tuple[Array, Int64s]:
    """Values and offsets of the rows at these positions, copied row by row: an index of each value takes many times as long
    (docs/decisions/0009)."""
    if len(rows) * 4 < len(offsets):  # a few rows of many: polars alone need not pass over all offsets
        lists = pl.Series(pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))))
        taken = lists.gather(rows).to_arrow()
        return taken.values.to_numpy(), taken.offsets.to_numpy()
    size = values.dtype.itemsize
    places = offsets * size
    small = max(int(places[-1]), int((places[rows + 1] - places[rows]).sum())) < SMALL_BYTES
    kind, width = (pa.binary(), np.int32) if small else (pa.large_binary(), np.int64)
    cells = pa.Array.from_buffers(kind, len(offsets) - 1, [None, pa.py_buffer(places.astype(width)), pa.py_buffer(values)])
    _, taken_places, data = cells.take(pa.array(rows)).buffers()
    new = np.frombuffer(taken_places, width)[: len(rows) + 1].astype(np.int64) // size
    return np.frombuffer(data, values.dtype)[: new[-1]], new


def offsets_of(lengths: Array) -> Int64s:
    """Offsets that begin at 0, from lengths."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ragged_index(offsets: Int64s, rows: Int64s) -> tuple[Int64s, Int64s]:
    """Offsets of the taken rows, and the position of each of their values among the old values; row -1 is empty."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    if len(rows) and rows.min() < 0:
        lengths = np.where(rows < 0, 0, lengths)
    new = offsets_of(lengths)
    index = np.repeat(starts - new[:-1], lengths)
    index += np.arange(len(index), dtype=np.int64)
    return new, index


def concat_rows(first: Ragged, second: Ragged) -> Ragged:
    """Row by row, the values of `first` and then those of `second` (numpy values, equally many rows)."""
    if len(second.values) == 0:
        return first
    if len(first.values) == 0:
        return second
    offsets = first.offsets + second.offsets
    both = Ragged(
        np.concatenate([first.values, second.values]),
        np.concatenate([first.offsets, second.offsets[1:] + first.offsets[-1]]),
        np.concatenate([first.weights, second.weights]) if first.weights is not None and second.weights is not None else None,
    )
    rows = np.arange(2 * len(first), dtype=np.int64).reshape(2, -1).T.reshape(-1)
    mixed = both.take(rows)
    return Ragged(mixed.values, offsets, mixed.weights)
