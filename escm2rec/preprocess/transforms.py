"""What becomes of raw values before anything is fitted or encoded: clipped numbers, cut lists, crossed columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from escm2rec.errors import DataError
from escm2rec.preprocess.block import RawBlock
from escm2rec.preprocess.ragged import Float64s, Ragged, offsets_of
from escm2rec.preprocess.stable_hash import cross_hash
from escm2rec.schema import Feature


def clipped(feature: Feature, numbers: Float64s) -> Float64s:
    """Numbers beyond the bounds of `clip` set to them; NaN stays."""
    return numbers if feature.clip is None else np.clip(numbers, *feature.clip)


def cut(feature: Feature, column: Ragged) -> Ragged:
    """Rows cut to `max_length` values.

    The two sides of an Ali-CCP impression are each cut, and once more when they are one: that gives the values that cutting the whole
    would give. What vocabularies count is the values of the sides, so of a field that is on both, some that the whole does not keep.
    """
    if feature.max_length is None:
        return column
    return column.cut(feature.max_length, feature.max_length_keeps or "first")


def add_crosses(block: RawBlock, crosses: tuple[Feature, ...]) -> RawBlock:
    """The block with these features, from its extras; of Ali-CCP these are of whole impressions. Any value missing, all is."""
    if not crosses:
        return block
    return replace(block, features={**block.features, **{feature.name: _crossed(block, feature) for feature in crosses}})


def _crossed(block: RawBlock, feature: Feature) -> Ragged:
    columns = [_checked(block, feature, part) for part in feature.cross or ()]
    held = np.logical_and.reduce([column.is_valid().to_numpy(zero_copy_only=False) for column in columns])
    rows = pa.array(np.flatnonzero(held))
    values = cross_hash([column.take(rows) for column in columns]) if len(rows) else np.zeros(0, np.uint64)
    return Ragged(values.view(np.int64), offsets_of(held))


def _checked(block: RawBlock, feature: Feature, part: str) -> pa.Array:
    column = block.extras[part]
    if pt.is_boolean(column.type):
        return column.cast(pa.uint8())
    if pt.is_integer(column.type) or pt.is_string(column.type) or pt.is_large_string(column.type) or pt.is_null(column.type):
        return column
    raise DataError(
        f"{block.file.path}: feature {feature.name!r} crosses column {part!r}: expected whole numbers or strings, found type {column.type}",
        "cross columns that could be categorical features",
    )
