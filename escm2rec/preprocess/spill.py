"""Raw columns as Arrow files that are read in place."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from escm2rec.config import KEPT_PREFIX
from escm2rec.preprocess.block import RawColumn
from escm2rec.preprocess.ragged import Array, Bools, Int64s, Ragged, gather, held_in, offsets_of
from escm2rec.preprocess.stable_hash import hash64
from escm2rec.schema import Feature

LIBC = ctypes.CDLL(None)
WEIGHTS = ".weights"  # no feature has a dot in its name
INT32 = np.iinfo(np.int32)
WIDE = {pa.int64(): (pa.int32(), pa.int64()), pa.large_list(pa.int64()): (pa.large_list(pa.int32()), pa.large_list(pa.int64()))}
"""What narrowed columns, and lists, are widened to."""


def to_arrow(features: Iterable[Feature], columns: Mapping[str, RawColumn]) -> dict[str, pa.Array]:
    """One Arrow column a feature: numbers with NaN where missing, nullable values (categorical), or lists, their weights beside them."""
    arrays: dict[str, pa.Array] = {}
    for feature in features:
        column = columns[feature.name]
        if not isinstance(column, Ragged):
            arrays[feature.name] = pa.array(column)
        elif feature.kind == "categorical":
            arrays[feature.name] = _scalars(column)
        else:
            offsets = pa.array(column.offsets)
            arrays[feature.name] = pa.LargeListArray.from_arrays(offsets, _flat(column.values))
            if column.weights is not None:
                arrays[feature.name + WEIGHTS] = pa.LargeListArray.from_arrays(offsets, pa.array(column.weights.astype(np.float32)))
    return arrays


def _flat(values: Any) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values)


def _scalars(column: Ragged) -> pa.Array:
    values = _flat(column.values)
    if len(values) == len(column):
        return values
    held = column.lengths > 0
    if isinstance(column.values, np.ndarray):
        spread = np.zeros(len(column), np.int64)
        spread[held] = column.values
        return pa.array(spread, mask=~held)
    places = np.cumsum(held) - 1
    return values.take(pa.array(np.where(held, places, 0), mask=~held))


def from_arrow(feature: Feature, columns: Any) -> RawColumn:
    """The raw column of a feature from a batch of such columns."""
    array = columns[feature.name]
    if feature.kind == "numeric":
        numbers: RawColumn = array.to_numpy()
        return numbers
    if feature.kind == "categorical":
        held = held_in(array)
        return Ragged((array.drop_null() if array.null_count else array).to_numpy(), offsets_of(held))
    offsets = array.offsets.to_numpy()
    weights = None
    if feature.kind == "weighted_list":
        weights = columns[feature.name + WEIGHTS].flatten().to_numpy()
    return Ragged(array.flatten().to_numpy(), offsets - offsets[0], weights)


def scalars_of(array: pa.Array) -> tuple[Array, Bools | None]:
    """The numbers of a categorical column of `to_arrow`, 0 where there is none; and where that is, if anywhere."""
    if not array.null_count:
        return array.to_numpy(), None
    return array.fill_null(0).to_numpy(), ~held_in(array)


def values_of(array: pa.Array) -> Array:
    """All numbers of a column of `to_arrow`, flat and without null."""
    flat = array.flatten() if pa.types.is_large_list(array.type) else array.drop_null() if array.null_count else array
    numbers: Array = flat.to_numpy()
    return numbers


def one_batch(batches: list[dict[str, pa.Array]]) -> pa.RecordBatch:
    """Batches of equal columns end to end. One whose column holds no value takes the type that the others have there, any before null, and
    whole numbers that were narrowed are widened where others were not; else types that differ give a TypeError that names column and
    types."""
    columns = {name: _end_to_end(name, [batch[name] for batch in batches]) for name in batches[0]}
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def _end_to_end(name: str, arrays: list[pa.Array]) -> pa.Array:
    types = list(dict.fromkeys(array.type for array in arrays))
    if len(types) == 1:
        return pa.concat_arrays(arrays)
    held = list(dict.fromkeys(array.type for array in arrays if holds(name, array)))
    wide = next((kind for kind in WIDE if set(held) <= set(WIDE[kind])), None)
    if len(held) > 1 and wide is not None and not name.startswith(KEPT_PREFIX):
        return pa.concat_arrays([array.cast(wide) if holds(name, array) else _empty(name, len(array), wide) for array in arrays])
    if len(held) > 1:
        raise TypeError(f"column {name!r} is of type {held[1]}, in earlier rows it is of type {held[0]}")
    kind = held[0] if held else next((kind for kind in types if not pa.types.is_null(kind)), types[0])
    return pa.concat_arrays([array if array.type == kind else _empty(name, len(array), kind) for array in arrays])


def holds(name: str, array: pa.Array) -> bool:
    """Whether a column of this name holds any value: of a list of a feature one in it, of a kept column a list without any is one."""
    of_feature = pa.types.is_large_list(array.type) and not name.startswith(KEPT_PREFIX)
    return bool(len(array.flatten()) if of_feature else array.null_count < len(array))


def _empty(name: str, rows: int, kind: pa.DataType) -> pa.Array:
    """So many rows without a value: nulls, or empty lists of a feature."""
    if not pa.types.is_large_list(kind) or name.startswith(KEPT_PREFIX):
        return pa.nulls(rows, kind)
    return pa.LargeListArray.from_arrays(pa.array(np.zeros(rows + 1, np.int64)), pa.array([], kind.value_type))


def narrow(array: pa.Array) -> pa.Array:
    """Whole numbers as int32 where they fit: half the bytes."""
    if pa.types.is_large_list(array.type):
        start, stop = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return pa.LargeListArray.from_arrays(array.offsets, narrow(array.values)) if start == 0 and stop == len(array.values) else array
    if array.type != pa.int64() or not len(array):
        return array
    limits = pc.min_max(array)
    low, high = limits["min"].as_py(), limits["max"].as_py()
    return array.cast(pa.int32()) if low is None or (low >= INT32.min and high <= INT32.max) else array


def numbered(array: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """Strings, or lists of them, as their places (int32) among the distinct ones, which come second. Numbers as they are, and None."""
    if pa.types.is_large_list(array.type):
        places, words = numbered(array.values)
        return (array, None) if words is None else (pa.LargeListArray.from_arrays(array.offsets, places), words)
    if not pa.types.is_large_string(array.type):
        return array, None
    coded = pc.dictionary_encode(array)
    return coded.indices, coded.dictionary


def hashed(places: pa.Array, words: pa.Array) -> pa.Array:
    """Such places as the 64 bits of the hashes of their strings (int64): all that a lookup needs."""
    if pa.types.is_large_list(places.type):
        return pa.LargeListArray.from_arrays(places.offsets, hashed(places.values, words))
    return pa.array(hash64(words).view(np.int64)).take(places)


def take(name: str, array: pa.Array, rows: Int64s) -> pa.Array:
    """Rows of a column of this name. Lists of a feature and their values are never null; a kept column is of any type, null anywhere."""
    numbers = pa.types.is_large_list(array.type) and array.type.value_type != pa.large_string()
    if name.startswith(KEPT_PREFIX) or not numbers or not len(array.values):
        return array.take(pa.array(rows))
    values, offsets = gather(array.values.to_numpy(), array.offsets.to_numpy(), rows)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


def write_batch(path: Path, batch: pa.RecordBatch) -> None:
    """An Arrow file of one batch."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


class MappedBatch:
    """The batch of such a file, in place: what is not looked at takes no memory."""

    def __init__(self, path: Path) -> None:
        with pa.memory_map(str(path)) as file:  # Python's own keeps the file open
            self._bytes = file.read_buffer()
        self.batch: pa.RecordBatch = pa.ipc.open_file(pa.BufferReader(self._bytes)).get_batch(0)

    def copy(self, start: int, stop: int) -> dict[str, pa.Array]:
        """The columns of these rows in memory of their own. What was mapped to read them is given back: up to 2 MiB around each, on kernels
        that cache files in large pieces, and of hundreds of files together more than all else."""
        rows = self.batch.slice(start, stop - start)
        columns = {
            name: pa.concat_arrays([column, column.slice(0, 0)]) for name, column in zip(rows.schema.names, rows.columns, strict=True)
        }
        LIBC.madvise(ctypes.c_void_p(self._bytes.address), ctypes.c_size_t(self._bytes.size), mmap.MADV_DONTNEED)
        return columns


def read_batch(path: Path) -> pa.RecordBatch:
    """The batch of such a file, in place."""
    return MappedBatch(path).batch
