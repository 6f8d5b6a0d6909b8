"""Lists as Parquet cells of bytes: a row's ids are little-endian int32 (of a managed table int64), or its weights float32, end to end.

Parquet writes a list as two levels a value, which costs more than the values do: such cells are written and read in less than half the
time (docs/decisions/0010-lists-as-cells.md). `with_lists` makes Arrow lists of them for any other use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from escm2rec.config import KEPT_PREFIX, WEIGHT_SUFFIX
from escm2rec.errors import DataError

CELLS = pa.binary()
WIDE = {b"ids": b"int64"}
"""Metadata of a column whose ids are int64."""
MOST_BYTES = 1 << 30
DAMAGED = "the data set is damaged, or of another schema or version of escm2rec: preprocess again"
Array = npt.NDArray[Any]


def to_cells(values: Array, offsets: npt.NDArray[np.integer[Any]]) -> pa.Array:
    """One cell a row: row i holds int32, int64 or float32 `values[offsets[i]:offsets[i + 1]]`. The values are not copied.

    DataError when they have more than 1 GiB: two of them may come into one row group, which Arrow reads up to 2 GiB of.
    """
    size = values.dtype.itemsize
    places = np.asarray(offsets, np.int64) * size
    if places[-1] > MOST_BYTES:
        raise DataError(
            f"the lists of a feature have {offsets[-1]:,} values of {size} bytes in one row group, which is more than 1 GiB",
            "set data.rows_per_group lower, or a max_length",
        )
    buffers = [None, pa.py_buffer(places.astype(np.int32)), pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(CELLS, len(offsets) - 1, buffers)


def from_cells(cells: pa.Array, kind: pa.DataType) -> tuple[pa.Array, npt.NDArray[np.int32]]:
    """Values (an Arrow array of `kind`: int32, int64 or float32) and offsets from 0 on; the values are not copied.

    ValueError when a cell is null or is no whole number of values, with the first such row as its second argument.
    """
    if cells.null_count:
        raise ValueError("a list is missing", int(np.argmax(cells.is_null().to_numpy(zero_copy_only=False))))
    _, places, data = cells.buffers()
    if not len(cells) or data is None:
        return pa.array([], kind), np.zeros(len(cells) + 1, np.int32)
    offsets = np.frombuffer(places, np.int32)[cells.offset : cells.offset + len(cells) + 1]
    first = int(offsets[0])
    if first:
        offsets = offsets - first
    size = kind.byte_width
    if np.bitwise_or.reduce(offsets) % size:
        row = int(np.argmax(offsets[1:] % size != 0))
        raise ValueError(f"a list of {offsets[row + 1] - offsets[row]} bytes is no whole number of values", row)
    count = int(offsets[-1]) // size
    return pa.Array.from_buffers(kind, count, [None, data.slice(first, count * size)]), offsets // size


def read_lists(array: pa.Array, column: str, kind: pa.DataType, where: str, first_row: int) -> tuple[pa.Array, Array]:
    """Values and offsets of a column of lists; a DataError names `where`, the row, counted from `first_row`, and the column."""
    if array.type != CELLS:
        raise DataError(f"{where}, column {column}: it is of type {array.type}, expected {CELLS}", DAMAGED)
    try:
        return from_cells(array, kind)
    except ValueError as error:
        fault, row = error.args
        raise DataError(f"{where}, row {first_row + row}, column {column}: {fault}", DAMAGED) from error


def with_lists(table: pa.Table) -> pa.Table:
    """A table of a data set with Arrow lists where it has cells, for people and other tools."""
    for number, field in enumerate(table.schema):
        if field.type == CELLS and not field.name.startswith(KEPT_PREFIX):
            ids = pa.int64() if (field.metadata or {}).items() >= WIDE.items() else pa.int32()
            kind = pa.float32() if field.name.endswith(WEIGHT_SUFFIX) else ids
            chunks = [_lists(chunk, kind) for chunk in table.column(number).chunks]
            table = table.set_column(number, field.name, pa.chunked_array(chunks, pa.list_(kind)))
    return table


def _lists(cells: pa.Array, kind: pa.DataType) -> pa.ListArray:
    values, offsets = from_cells(cells, kind)
    return pa.ListArray.from_arrays(pa.array(offsets), values)
