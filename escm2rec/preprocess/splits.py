"""Which split each row belongs to."""

from __future__ import annotations

import fnmatch
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from escm2rec.config import SPLITS, ColumnSplit, FileSplit, HashSplit
from escm2rec.errors import DataError
from escm2rec.preprocess.block import RawBlock
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.stable_hash import hash64, row_hash, split_points

NO_SPLIT = -1
TRAIN, VALIDATION = 0, 1
AnySplit = FileSplit | ColumnSplit | HashSplit
Numbers = npt.NDArray[np.int8]


def split_column(split: AnySplit) -> str | None:
    """The raw column that the split reads, if any."""
    return None if isinstance(split, FileSplit) else split.column


def file_may_train(split: AnySplit, file: RawFile) -> bool:
    """Whether a file can hold training rows."""
    return not isinstance(split, FileSplit) or _by_file(split, file) == TRAIN


def split_numbers(split: AnySplit, block: RawBlock) -> Numbers:
    """Position in SPLITS of each row's split, -1 for none.

    Hash: splitmix64(base ^ fnv1a64(salt)) as a number in [0, 1), cut by the shares in order; base is the hash of the column's value, or of
    file name and row. A null in the column belongs to no split. `validation_share` takes its rows of training files the same way, without
    a salt.
    """
    if isinstance(split, FileSplit):
        number = _by_file(split, block.file)
        numbers = np.full(len(block), number, dtype=np.int8)
        if number == TRAIN and split.validation_share:
            points = split_points(row_hash(block.file.name, block.rows), salt="")
            numbers[points < split.validation_share] = VALIDATION
        return numbers
    if isinstance(split, ColumnSplit):
        texts = _cast(block, split.column, pa.string())
        numbers = np.full(len(block), NO_SPLIT, dtype=np.int8)
        for number, name in reversed(list(enumerate(SPLITS))):
            held = pc.fill_null(pc.is_in(texts, pa.array(getattr(split, name), pa.string())), False)
            numbers[held.to_numpy(zero_copy_only=False)] = number
        return numbers
    return _by_hash(split, block)


def _by_file(split: FileSplit, file: RawFile) -> int:
    for number, name in enumerate(SPLITS):
        if fnmatch.fnmatchcase(file.name, getattr(split, name)):
            return number
    return NO_SPLIT


def _cast(block: RawBlock, column: str, kind: pa.DataType) -> pa.Array:
    """A column to split by; DataError where its values have no such form."""
    array = block.extras[column]
    try:
        return array.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{block.file.path}: column {column!r} of type {array.type} cannot split: {error}", "split by a column of whole numbers or text"
        ) from error


def _by_hash(split: HashSplit, block: RawBlock) -> Numbers:
    if split.column is None:
        base = row_hash(block.file.name, block.rows)
        held: Any = np.ones(len(block), dtype=np.bool_)
    else:
        array = block.extras[split.column]
        held = array.is_valid().to_numpy(zero_copy_only=False)
        if pa.types.is_integer(array.type):
            base = hash64(pc.fill_null(_cast(block, split.column, pa.int64()), 0).to_numpy(zero_copy_only=False))
        else:
            base = hash64(pc.fill_null(_cast(block, split.column, pa.large_string()), ""))
    edges = np.cumsum([split.train, split.validation])
    edges[edges > 1 - 1e-9] = 2.0  # rounding must not leave a sliver to a split whose share is 0
    numbers = np.searchsorted(edges, split_points(base, split.salt), side="right").astype(np.int8)
    return np.where(held, numbers, np.int8(NO_SPLIT))
