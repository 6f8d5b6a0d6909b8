"""Encoded columns of a block of impressions, and batches cut from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from escm2rec.cells import DAMAGED, read_lists
from escm2rec.config import KEPT_PREFIX
from escm2rec.errors import DataError
from escm2rec.reader.batch import Batch, tables_by_batch
from escm2rec.schema import Feature, Schema

Array = npt.NDArray[Any]
Order = npt.NDArray[np.int64]


@dataclass(frozen=True)
class JaggedColumn:
    """Values of one table feature: row i holds `values[offsets[i]:offsets[i + 1]]`, or `values[i]` alone where `offsets` is None."""

    values: Array  # int32
    offsets: Array | None
    weights: Array | None = None  # float32, as long as values


@dataclass(frozen=True)
class Columns:
    """A decoded block of encoded impressions, ready to be sliced by row."""

    num_rows: int
    jagged: dict[str, JaggedColumn]
    numeric: Array  # float32 [num_rows, number of numeric features]
    labels: dict[str, Array]  # click, conversion, weight as float32 [num_rows]
    extra: pa.Table  # kept.* and true_* columns asked for


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of a block."""

    columns: Columns
    start: int
    stop: int


def encoded_columns(schema: Schema, labels: bool) -> list[str]:
    """Names of the Parquet columns that a batch needs."""
    names: list[str] = []
    for feature in schema.features:
        names.append(feature.name)
        if feature.kind == "weighted_list":
            names.append(feature.weight_column)
    if labels:
        names += ["click", "conversion", *(["weight"] if schema.has_weight else [])]
    return names


def decode(table: pa.Table, schema: Schema, labels: bool, where: str, order: Order | None = None, first_row: int = 0) -> Columns:
    """Decode an encoded table, its rows taken in `order` when given.

    Ids are checked against the table sizes: a DataError names `where`, the row, counted from `first_row`, the column and the value.
    """
    rows = table.num_rows
    jagged = {feature.name: _jagged(table, feature, where, order, first_row) for feature in schema.tables}
    numeric = np.empty((rows, len(schema.numeric)), dtype=np.float32)
    for index, feature in enumerate(schema.numeric):
        numeric[:, index] = _numbers(table, feature.name, where, order)
    label_arrays: dict[str, Array] = {}
    if labels:
        label_arrays = {name: _numbers(table, name, where, order) for name in ("click", "conversion")}
        label_arrays["weight"] = _numbers(table, "weight", where, order) if schema.has_weight else np.ones(rows, np.float32)
    extra = table.select([name for name in table.column_names if name.startswith((KEPT_PREFIX, "true_"))])
    return Columns(rows, jagged, numeric, label_arrays, extra if order is None or not extra.num_columns else extra.take(pa.array(order)))


def assemble(slices: Sequence[Slice], schema: Schema, padded_rows: int = 0, pin_memory: bool = False) -> Batch:
    """One batch of the rows of `slices`, in order; labels are zeros when the blocks have none.

    The batch is padded to `padded_rows` with impressions that have no ids and weight 0, because row-wise tables need batches of one size
    on all ranks (gloo's all_gather refuses others). With `pin_memory` it is made in page-locked memory, from which a GPU copies.
    """
    rows = sum(part.stop - part.start for part in slices)
    size = max(rows, padded_rows)
    numeric = torch.empty((size, len(schema.numeric)), pin_memory=pin_memory)
    _fill(numeric.numpy(), [part.columns.numeric[part.start : part.stop] for part in slices])

    def label(name: str) -> torch.Tensor:
        out = torch.empty(size, pin_memory=pin_memory)
        has = slices and name in slices[0].columns.labels
        _fill(out.numpy(), [part.columns.labels[name][part.start : part.stop] for part in slices] if has else [])
        return out

    unweighted, weighted, managed = (
        _keyed(features, slices, size, pin_memory) if features else None for features in tables_by_batch(schema.tables)
    )
    return Batch(
        unweighted,
        weighted,
        numeric,
        label("click"),
        label("conversion"),
        label("weight"),
        rows,
        label("propensity_logit") if slices and "propensity_logit" in slices[0].columns.labels else None,
        managed,
    )


def _fill(out: Array, parts: list[Array]) -> None:
    """The parts one after another, then zeros."""
    end = sum(len(part) for part in parts)
    if parts:
        np.concatenate(parts, out=out[:end])
    out[end:] = 0


def _keyed(features: Sequence[Feature], slices: Sequence[Slice], stride: int, pin_memory: bool) -> KeyedJaggedTensor:
    lengths = torch.zeros((len(features), stride), dtype=torch.int32, pin_memory=pin_memory)
    values: list[Array] = []
    weights: list[Array] = []
    for feature, of_feature in zip(features, lengths.numpy(), strict=True):
        end = 0
        for part in slices:
            column, low, high = part.columns.jagged[feature.name], part.start, part.stop
            begin, end = end, end + high - low
            if column.offsets is None:
                of_feature[begin:end] = 1
            else:
                cuts = column.offsets[low : high + 1]
                np.subtract(cuts[1:], cuts[:-1], out=of_feature[begin:end])
                low, high = int(cuts[0]), int(cuts[-1])
            values.append(column.values[low:high])
            if column.weights is not None:
                weights.append(column.weights[low:high])
    return KeyedJaggedTensor(
        keys=[feature.name for feature in features],
        values=_concatenate(values, torch.int64, pin_memory),
        lengths=lengths.view(-1),
        weights=_concatenate(weights, torch.float32, pin_memory) if features[0].kind == "weighted_list" else None,
        stride=stride,
    )


def _concatenate(parts: list[Array], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
    out = torch.empty(sum(len(part) for part in parts), dtype=dtype, pin_memory=pin_memory)
    _fill(out.numpy(), parts)
    return out


def _column(table: pa.Table, name: str, where: str) -> pa.Array:
    index = table.schema.get_field_index(name)
    if index < 0:
        raise DataError(f"{where}: no column {name!r}", DAMAGED)
    column = table.column(index)
    return (
        column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    )


def _numbers(table: pa.Table, name: str, where: str, order: Order | None) -> Array:
    numbers: Array = _column(table, name, where).to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return numbers if order is None else numbers[order]


def _jagged(table: pa.Table, feature: Feature, where: str, order: Order | None, first_row: int) -> JaggedColumn:
    array = _column(table, feature.name, where)
    if not feature.is_list:
        if array.type != feature.id_type:
            raise DataError(f"{where}, column {feature.name}: it is of type {array.type}, expected {feature.id_type}", DAMAGED)
        return _single(array, feature, where, order, first_row)
    values, offsets = read_lists(array, feature.name, feature.id_type, where, first_row)
    _check_ids(values.to_numpy(), offsets, feature, where, first_row)
    weights = None
    if feature.kind == "weighted_list":
        name = feature.weight_column
        weights, weight_offsets = read_lists(_column(table, name, where), name, pa.float32(), where, first_row)
        if not np.array_equal(weight_offsets, offsets):
            raise DataError(f"{where}, column {name}: not as many weights as values", "preprocess again")
    if order is None:
        return JaggedColumn(values.to_numpy(), offsets, None if weights is None else weights.to_numpy())
    return _permuted(offsets, values, weights, order)


def _single(array: pa.Array, feature: Feature, where: str, order: Order | None, first_row: int) -> JaggedColumn:
    values = (array.fill_null(0) if array.null_count else array).to_numpy()
    _check_ids(values, None, feature, where, first_row)
    if order is not None:
        values = values[order]
    if not array.null_count:
        return JaggedColumn(values, None)
    present = array.is_valid().to_numpy(zero_copy_only=False)
    if order is not None:
        present = present[order]
    return JaggedColumn(values[present], np.concatenate(([0], np.cumsum(present))))


def _permuted(offsets: Array, values: pa.Array, weights: pa.Array | None, order: Order) -> JaggedColumn:
    # fbgemm's kernel takes half the time of Arrow's `take`, and a third of numpy's indexing.
    lengths, taken, taken_weights = torch.ops.fbgemm.permute_1D_sparse_data(
        torch.from_numpy(order.astype(np.int32)),
        torch.from_numpy(np.diff(offsets)),
        torch.from_dlpack(values),
        None if weights is None else torch.from_dlpack(weights),
        len(values),
    )
    taken_offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
    return JaggedColumn(taken.numpy(), taken_offsets.numpy(), None if weights is None else taken_weights.numpy())


def _check_ids(ids: Array, offsets: Array | None, feature: Feature, where: str, first_row: int) -> None:
    unsigned = ids.view(np.dtype(f"u{ids.itemsize}"))  # a negative id becomes a large one: one comparison finds both
    if not len(ids) or unsigned.max() < feature.num_ids:
        return
    place = int(np.argmax(unsigned >= feature.num_ids))
    has = f"hashes of values are below {feature.num_ids}" if feature.is_managed else f"its table has rows 0 to {feature.num_ids - 1}"
    row = place if offsets is None else int(np.searchsorted(offsets, place, side="right")) - 1
    raise DataError(
        f"{where}, row {first_row + row}, column {feature.name}: id {ids[place]} is out of range, {has}",
        "the data set was changed after it was written, or belongs to another schema: preprocess again",
    )
