"""Encoded columns of a block of impressions, and batches cut from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from escm2rec.config import KEPT_PREFIX
from escm2rec.errors import DataError
from escm2rec.reader.batch import Batch
from escm2rec.schema import Feature, Schema

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class JaggedColumn:
    """Values of one table feature: row i holds `values[offsets[i]:offsets[i + 1]]`, with `lengths[i]` of them."""

    values: Array
    lengths: Array
    offsets: Array
    weights: Array | None


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


def decode(table: pa.Table, schema: Schema, labels: bool, where: str, order: pa.Array | None = None) -> Columns:
    """Decode an encoded table, its rows taken in `order` when given.

    Ids are checked against the table sizes: a DataError names `where`, the row, the column and the value.
    """
    table = table.combine_chunks()
    for feature in schema.tables:
        _check_ids(_column(table, feature.name, where), feature, where)
    if order is not None:
        table = table.take(order)
    rows = table.num_rows
    jagged = {feature.name: _jagged(table, feature, where) for feature in schema.tables}
    numeric = np.empty((rows, len(schema.numeric)), dtype=np.float32)
    for index, feature in enumerate(schema.numeric):
        numeric[:, index] = _column(table, feature.name, where).to_numpy(zero_copy_only=False)
    label_arrays: dict[str, Array] = {}
    if labels:
        for name in ("click", "conversion"):
            label_arrays[name] = _column(table, name, where).to_numpy(zero_copy_only=False).astype(np.float32)
        weight = _column(table, "weight", where).to_numpy(zero_copy_only=False) if schema.has_weight else np.ones(rows)
        label_arrays["weight"] = weight.astype(np.float32)
    extra = table.select([name for name in table.column_names if name.startswith((KEPT_PREFIX, "true_"))])
    return Columns(rows, jagged, numeric, label_arrays, extra)


def assemble(slices: Sequence[Slice], schema: Schema, padded_rows: int = 0) -> Batch:
    """One batch of the rows of `slices`, in order; labels are zeros when the blocks have none.

    The batch is padded to `padded_rows` with impressions that have no ids and weight 0, because row-wise tables need batches of one size
    on all ranks (gloo's all_gather refuses others).
    """
    unweighted = [feature for feature in schema.tables if feature.kind != "weighted_list"]
    weighted = [feature for feature in schema.tables if feature.kind == "weighted_list"]
    rows = sum(part.stop - part.start for part in slices)
    padding = max(0, padded_rows - rows)
    numeric = [part.columns.numeric[part.start : part.stop] for part in slices]
    return Batch(
        _keyed(unweighted, slices, rows + padding, padding) if unweighted else None,
        _keyed(weighted, slices, rows + padding, padding) if weighted else None,
        torch.from_numpy(np.concatenate([*numeric, np.zeros((padding, len(schema.numeric)), np.float32)])),
        _labels("click", slices, rows, padding),
        _labels("conversion", slices, rows, padding),
        _labels("weight", slices, rows, padding),
        rows,
        _labels("propensity_logit", slices, rows, padding) if slices and "propensity_logit" in slices[0].columns.labels else None,
    )


def _keyed(features: Sequence[Feature], slices: Sequence[Slice], stride: int, padding: int) -> KeyedJaggedTensor:
    empty = np.zeros(padding, np.int32)
    lengths: list[Array] = []
    values: list[Array] = []
    weights: list[Array] = []
    for feature in features:
        for part in slices:
            column = part.columns.jagged[feature.name]
            start, stop = column.offsets[part.start], column.offsets[part.stop]
            lengths.append(column.lengths[part.start : part.stop])
            values.append(column.values[start:stop])
            if column.weights is not None:
                weights.append(column.weights[start:stop])
        lengths.append(empty)
    return KeyedJaggedTensor(
        keys=[feature.name for feature in features],
        values=_concatenate(values, np.int64),
        lengths=_concatenate(lengths, np.int32),
        weights=_concatenate(weights, np.float32) if features[0].kind == "weighted_list" else None,
        stride=stride,
    )


def _concatenate(parts: list[Array], dtype: type[np.generic]) -> torch.Tensor:
    out = np.empty(sum(part.shape[0] for part in parts), dtype=dtype)
    if parts:
        np.concatenate(parts, out=out)
    return torch.from_numpy(out)


def _labels(name: str, slices: Sequence[Slice], rows: int, padding: int) -> torch.Tensor:
    if not slices or name not in slices[0].columns.labels:
        return torch.zeros(rows + padding)
    parts = [part.columns.labels[name][part.start : part.stop] for part in slices]
    return torch.from_numpy(np.concatenate([*parts, np.zeros(padding, np.float32)]))


def _column(table: pa.Table, name: str, where: str) -> pa.Array:
    if name not in table.column_names:
        raise DataError(f"{where}: no column {name!r}", "the data set is damaged or of another schema: preprocess again")
    column = table.column(name)
    return (
        column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    )


def _is_list(array: pa.Array) -> bool:
    return bool(pa.types.is_list(array.type) or pa.types.is_large_list(array.type))


def _check_ids(array: pa.Array, feature: Feature, where: str) -> None:
    ids = array.flatten() if _is_list(array) else array
    limits = pc.min_max(ids)
    low, high = limits["min"].as_py(), limits["max"].as_py()
    if low is None or (low >= 0 and high < feature.num_embeddings):
        return
    bad = pc.or_(pc.less(ids, 0), pc.greater_equal(ids, feature.num_embeddings))
    place = int(pc.index(bad, True).as_py())
    row = int(np.searchsorted(array.offsets.to_numpy(), place, side="right")) - 1 if _is_list(array) else place
    raise DataError(
        f"{where}, row {row}, column {feature.name}: id {ids[place].as_py()} is out of range, "
        f"its table has rows 0 to {feature.num_embeddings - 1}",
        "the data set was changed after it was written, or belongs to another schema: preprocess again",
    )


def _jagged(table: pa.Table, feature: Feature, where: str) -> JaggedColumn:
    array = _column(table, feature.name, where)
    if not _is_list(array):
        present = (
            np.ones(len(array), np.int32) if array.null_count == 0 else array.is_valid().to_numpy(zero_copy_only=False).astype(np.int32)
        )
        values = array.to_numpy(zero_copy_only=False) if array.null_count == 0 else array.drop_null().to_numpy(zero_copy_only=False)
        offsets = np.arange(len(array) + 1) if array.null_count == 0 else np.concatenate(([0], np.cumsum(present)))
        return JaggedColumn(values, present, offsets, None)
    # A slice of a list array keeps its parent's values: offsets say where its own begin.
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    weights = None
    if feature.kind == "weighted_list":
        weight_array = _column(table, feature.weight_column, where)
        weights = weight_array.values.to_numpy(zero_copy_only=False)
        if not np.array_equal(np.diff(weight_array.offsets.to_numpy()), np.diff(offsets)):
            raise DataError(f"{where}, column {feature.weight_column}: not as many weights as values", "preprocess again")
        weights = weights[weight_array.offsets.to_numpy()[0] :]
        values, offsets = values[offsets[0] :], offsets - offsets[0]
    return JaggedColumn(values, np.diff(offsets).astype(np.int32), offsets, weights)
