"""Columns of a Parquet or CSV table as raw columns: typed, checked, flat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from escm2rec.config import ImpressionTable
from escm2rec.errors import DataError
from escm2rec.preprocess.block import RawColumn
from escm2rec.preprocess.digits import MAX_FLOAT32, MAX_INT64, parse_decimals
from escm2rec.preprocess.ragged import Bools, Float64s, Int64s, Ragged, held_in, offsets_of
from escm2rec.preprocess.rejections import INT64, NULL_IN_LIST, NUMBER, PAIR, TEXT, UNEQUAL, BadRows, values_at
from escm2rec.preprocess.texts import not_utf8
from escm2rec.preprocess.transforms import clipped, cut
from escm2rec.schema import Feature

RowsOf = Callable[[], Int64s]  # whose row each value of a column is, for the rare case that one is wrong
KIND_OR_COLUMN = "set the feature's kind or column to what the file holds"


def _without_views(kind: pa.DataType) -> pa.DataType:
    """The type with plain texts and bytes for views, of which Arrow cannot take rows."""
    if pt.is_string_view(kind) or pt.is_binary_view(kind):
        return pa.string() if pt.is_string_view(kind) else pa.binary()
    if pt.is_map(kind):
        return pa.map_(_without_views(kind.key_type), _without_views(kind.item_type), kind.keys_sorted)
    if not kind.num_fields or not pt.is_nested(kind):
        return kind
    fields = [kind.field(place).with_type(_without_views(kind.field(place).type)) for place in range(kind.num_fields)]
    if pt.is_struct(kind):
        return pa.struct(fields)
    if pt.is_fixed_size_list(kind):
        return pa.list_(fields[0], kind.list_size)
    return pa.large_list(fields[0]) if pt.is_large_list(kind) else pa.list_(fields[0]) if pt.is_list(kind) else kind


def without_views(column: Any) -> Any:
    """An array or its chunks with plain texts and bytes for views."""
    plain = _without_views(column.type)
    return column if plain == column.type else column.cast(plain)


@dataclass(frozen=True)
class TableColumn:
    """One column of a batch, with where it is from and where its bad rows are marked."""

    name: str
    array: pa.Array
    path: Path
    is_csv: bool
    bad: BadRows

    @classmethod
    def of(cls, table: pa.Table, path: Path, is_csv: bool, bad: BadRows) -> Callable[[str], TableColumn]:
        """Finds the columns of a batch by name."""

        def column(name: str) -> TableColumn:
            chunks = table[name]
            array = chunks.chunk(0) if chunks.num_chunks == 1 else pa.concat_arrays(chunks.chunks) if chunks.num_chunks else None
            array = pa.array([], chunks.type) if array is None else array
            array = without_views(array.dictionary_decode() if pt.is_dictionary(array.type) else array)
            return cls(name, array, path, is_csv, bad)

        return column

    def wrong_type(self, expected: str, hint: str = KIND_OR_COLUMN) -> DataError:
        """The whole column is not what the config says."""
        return DataError(f"{self.path}: column {self.name!r}: expected {expected}, found type {self.array.type}", hint)

    @property
    def is_list(self) -> bool:
        """Whether each row holds a list."""
        kind = self.array.type
        return bool(pt.is_list(kind) or pt.is_large_list(kind) or pt.is_fixed_size_list(kind) or pt.is_map(kind))


def raw_column(feature: Feature, columns: Callable[[str], TableColumn], source: ImpressionTable) -> RawColumn:
    """The raw column of a feature; bad rows are marked, a column of another type is a DataError."""
    column = columns(feature.column)
    if feature.kind == "numeric":
        found = numbers_of(column)
        numbers = clipped(feature, found)
        held = held_in(column.array)
        wrong = held & ~((np.abs(found) <= MAX_FLOAT32) & ((numbers > -1) if feature.log1p else True))
        column.bad.mark(wrong, NUMBER, column.name, values_at(column.array))
        return numbers
    if feature.kind == "categorical":
        if column.is_list or pt.is_struct(column.array.type):
            raise column.wrong_type("one value a row")
        held = held_in(column.array)
        values = _values(column, column.array.drop_null(), lambda: np.flatnonzero(held))
        return Ragged(values, offsets_of(held))
    if column.is_csv:
        if feature.weights_column is not None:
            example = source.list_separator.join(f"{value}{source.weight_separator}{weight}" for value, weight in ((12, 0.5), (7, 1)))
            raise DataError(
                f"{column.path}: feature {feature.name!r} has a weights_column, which is for Parquet",
                f"in a CSV cell write each value with its weight: {example}",
            )
        return cut(feature, _csv_list(feature, column, source))
    weights = columns(feature.weights_column) if feature.weights_column is not None else None
    return cut(feature, _parquet_list(feature, column, weights))


def numbers_of(column: TableColumn, hint: str = KIND_OR_COLUMN) -> Float64s:
    """A column of numbers; NaN for null, and in a CSV for what is no number. `hint` is what to do about a column of another type."""
    kind = column.array.type
    if column.is_csv:
        return parse_decimals(column.array)
    if pt.is_boolean(kind):
        column_array = column.array.cast(pa.uint8())
    elif pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind):
        column_array = column.array
    elif pt.is_null(kind):
        return np.full(len(column.array), np.nan)
    else:
        raise column.wrong_type("a number", hint)
    floats = column_array.cast(pa.float64(), safe=False)
    numbers: Float64s = pc.fill_null(floats, float("nan")).to_numpy(zero_copy_only=False)
    return numbers


def _values(column: TableColumn, flat: pa.Array, rows: RowsOf) -> Any:
    """Values without null as int64 (numpy) or strings (Arrow); `rows` says whose each is."""
    kind = flat.type
    if pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind):
        text = flat.cast(pa.large_string())
        return text if column.is_csv else _utf8(column, text, rows)  # of a CSV it was checked
    if pt.is_boolean(kind):
        return flat.cast(pa.uint8()).to_numpy(zero_copy_only=False).astype(np.int64)
    if pt.is_integer(kind):
        numbers = flat.to_numpy(zero_copy_only=False)
        if pt.is_uint64(kind):
            where = _rows_with(numbers > MAX_INT64, rows, len(column.array))
            column.bad.mark(where, INT64, column.name, values_at(column.array))
        return numbers.astype(np.int64, copy=False)
    if pt.is_null(kind) and not len(flat):
        return np.empty(0, dtype=np.int64)
    raise column.wrong_type("whole numbers or strings", _of_no_ids(kind))


def _of_no_ids(kind: pa.DataType) -> str:
    """What to do about ids of such a type."""
    if pt.is_floating(kind) or pt.is_decimal(kind):
        return "cast ids to whole numbers: pandas turns a column with nulls into floats (its 'Int64' keeps both); or set kind: numeric"
    if pt.is_temporal(kind):
        return "write what of the time matters, such as its hour or weekday, as whole numbers or text"
    return KIND_OR_COLUMN


def _utf8(column: TableColumn, flat: pa.Array, rows: RowsOf) -> pa.Array:
    """The strings; Parquet does not check that they are UTF-8, so rows with others are marked, and those are then empty."""
    wrong = not_utf8(flat)
    if wrong is None:
        return flat
    at, raw = np.flatnonzero(wrong), flat.cast(pa.large_binary())

    def seen(places: Int64s) -> list[str]:
        return [repr(raw[first].as_py()) for first in at[np.searchsorted(rows()[at], places)]]

    column.bad.mark(_rows_with(wrong, rows, len(column.array)), TEXT, column.name, seen)
    return pc.if_else(pa.array(wrong), pa.scalar("", pa.large_string()), flat)


def _rows_with(wrong: Bools, rows: RowsOf, count: int) -> Bools:
    """Which rows own a wrong value."""
    where = np.zeros(count, dtype=np.bool_)
    if wrong.any():
        where[rows()[wrong]] = True
    return where


def _csv_list(feature: Feature, column: TableColumn, source: ImpressionTable) -> Ragged:
    count = len(column.array)
    parts = pc.split_pattern(column.array, source.list_separator)
    lengths = pc.fill_null(pc.list_value_length(parts), 0).to_numpy(zero_copy_only=False)
    flat = parts.flatten()
    if feature.kind == "list":
        return Ragged(flat.cast(pa.large_string()), offsets_of(lengths))
    at = pc.split_pattern(flat, source.weight_separator, max_splits=1, reverse=True)
    pair = pc.equal(pc.list_value_length(at), 2).to_numpy(zero_copy_only=False)
    both = at.flatten()
    firsts = at.offsets.to_numpy()[:-1].astype(np.int64)
    values = both.take(pa.array(firsts)).cast(pa.large_string())
    weights = parse_decimals(both.take(pa.array(firsts + pair)))
    wrong = ~(pair & (np.abs(weights) <= MAX_FLOAT32))
    column.bad.mark(_rows_with(wrong, lambda: np.repeat(np.arange(count), lengths), count), PAIR, column.name, values_at(column.array))
    return Ragged(values, offsets_of(lengths), weights)


def _parquet_list(feature: Feature, column: TableColumn, weights: TableColumn | None) -> Ragged:
    if not column.is_list:
        raise column.wrong_type("a list a row")
    lengths, flat = _flatten(column)

    def rows() -> Int64s:
        return np.repeat(np.arange(len(lengths)), lengths)

    if feature.kind == "list":
        return Ragged(_values(column, _without_null(column, flat, rows), rows), offsets_of(lengths))
    if weights is None:
        if not (pt.is_struct(flat.type) and flat.type.num_fields == 2):
            raise column.wrong_type("a list of (value, weight) structs, a map, or a weights_column beside it")
        flat, weight_flat = flat.field(0), flat.field(1)
        weight_column = column
    else:
        if not weights.is_list:
            raise weights.wrong_type("a list of weights a row")
        weight_lengths, weight_flat = _flatten(weights)
        weight_column = weights
        unequal = lengths != weight_lengths
        column.bad.mark(
            unequal, UNEQUAL, column.name, lambda at: [f"{lengths[row]} values and {weight_lengths[row]} weights" for row in at]
        )
        if unequal.any():  # the rows are left out later; until then their weights must be as many
            weight_flat = _fitted(weight_flat, lengths, weight_lengths)
    if not (pt.is_integer(weight_flat.type) or pt.is_floating(weight_flat.type) or pt.is_null(weight_flat.type)):
        raise weight_column.wrong_type("weights that are numbers")
    floats = weight_flat if pt.is_float32(weight_flat.type) else weight_flat.cast(pa.float64(), safe=False)
    numbers = (floats.fill_null(float("nan")) if floats.null_count else floats).to_numpy()
    wrong = _rows_with(~(np.abs(numbers) <= MAX_FLOAT32), rows, len(lengths))
    column.bad.mark(wrong, NUMBER, weight_column.name, values_at(weight_column.array))
    return Ragged(_values(column, _without_null(column, flat, rows), rows), offsets_of(lengths), numbers)


def _flatten(column: TableColumn) -> tuple[Int64s, pa.Array]:
    """Lengths of the lists, 0 for null, and all their values."""
    array = column.array
    if pt.is_map(array.type):
        array = array.cast(pa.list_(pa.struct([("value", array.type.key_type), ("weight", array.type.item_type)])))
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    flat = array.flatten()
    return lengths, flat.dictionary_decode() if pt.is_dictionary(flat.type) else flat


def _without_null(column: TableColumn, flat: pa.Array, rows: RowsOf) -> pa.Array:
    """The values, rows with a null among them marked; the null is then any value."""
    if not flat.null_count:
        return flat
    wrong = flat.is_null().to_numpy(zero_copy_only=False)
    column.bad.mark(_rows_with(wrong, rows, len(column.array)), NULL_IN_LIST, column.name, values_at(column.array))
    text = pt.is_string(flat.type) or pt.is_large_string(flat.type)
    return pc.fill_null(flat, "" if text else 0) if not pt.is_null(flat.type) else pa.array(np.zeros(len(flat), dtype=np.int64))


def _fitted(flat: pa.Array, lengths: Int64s, weight_lengths: Int64s) -> pa.Array:
    """Weights cut or padded with 0 to the lengths of the values."""
    starts = np.repeat(offsets_of(weight_lengths)[:-1], lengths)
    place = np.arange(int(lengths.sum())) - np.repeat(offsets_of(lengths)[:-1], lengths)
    inside = place < np.repeat(weight_lengths, lengths)
    taken = flat.take(pa.array(np.where(inside, starts + place, 0), mask=~inside))
    return pc.fill_null(taken, 0)
