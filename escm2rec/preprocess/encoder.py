"""Raw columns to the encoded columns of a data set, as `escm2rec.schema` lays them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from escm2rec.cells import WIDE, to_cells
from escm2rec.config import KEPT_PREFIX, WEIGHT_SUFFIX
from escm2rec.errors import DataError
from escm2rec.preprocess.block import RawColumn
from escm2rec.preprocess.ragged import Float64s, Int64s, Ragged, concat_rows
from escm2rec.preprocess.shares import held
from escm2rec.preprocess.spill import from_arrow, scalars_of
from escm2rec.preprocess.transforms import cut
from escm2rec.preprocess.vocabulary import Lookup, open_lookup, value_type_of
from escm2rec.schema import Feature, Schema

LABEL_COLUMNS = ("click", "conversion", "weight", "true_propensity", "true_cvr")

# An encoded column before it is Arrow: ragged rows (list, weighted_list), ids with -1 for missing (categorical, numeric in buckets), or
# float32 with NaN for missing (numeric). Missing stays visible until the two sides of an Ali-CCP impression are one.
Encoded = Any
NO_VALUE = np.int32(-1)


@dataclass(frozen=True)
class Rows:
    """Encoded columns of rows that have labels and kept columns; `records` are positions of common records, where there are any."""

    features: Mapping[str, Encoded]
    labels: Mapping[str, Any]
    kept: Mapping[str, pa.Array]
    records: Int64s | None


class Encoder:
    """Encodes raw columns by a schema and its lookups; the same in preprocess and in score."""

    def __init__(self, schema: Schema, lookups: Path, keep: Sequence[str] | None = None) -> None:
        """`lookups` holds what `write_lookup` wrote."""
        self.schema = schema
        self.kept = tuple(schema.keep if keep is None else keep)
        self._rows = {feature.name: open_lookup(feature, lookups) for feature in schema.tables}
        self._nullable = {feature.name for feature in schema.tables if not feature.is_list}
        self._wide = {feature.name for feature in schema.tables if feature.is_list and feature.is_managed}

    def columns(self, columns: Mapping[str, RawColumn], where: str) -> dict[str, Encoded]:
        """Every raw column, encoded. DataError names `where` when one holds values of another type than the schema."""
        for feature in self.schema.tables:
            raw = columns[feature.name]
            if not isinstance(raw, Ragged):
                continue
            if feature.value_type != value_type_of(raw.values) and len(raw.values):
                raise DataError(
                    f"{where}: column {feature.column!r} holds {value_type_of(raw.values)} values, it was trained on {feature.value_type}",
                    "encode logs of the format that the data set was made from",
                )
        return {feature.name: self.encode(feature, columns[feature.name]) for feature in self.schema.features}

    def encode(self, feature: Feature, raw: RawColumn) -> Encoded:
        """One such column."""
        return encode(feature, raw, self._rows.get(feature.name))

    def stored(self, batch: pa.RecordBatch) -> dict[str, Encoded]:
        """The same of columns that `spill` stored, whose strings are hashes."""
        return {feature.name: self._stored(feature, batch) for feature in self.schema.features}

    def _stored(self, feature: Feature, batch: pa.RecordBatch) -> Encoded:
        lookup = self._rows.get(feature.name)
        if feature.kind != "categorical" or lookup is None:
            return self.encode(feature, from_arrow(feature, batch))
        values, missing = scalars_of(batch[feature.name])
        rows = lookup.rows(values)
        if missing is not None:
            rows[missing] = NO_VALUE
        return rows

    def table(self, rows: Rows, places: Int64s | None, common: Mapping[str, Encoded]) -> tuple[pa.Table, dict[str, Int64s]]:
        """The rows at these places (None: all), joined with the encoded common records; and what `shares.held` counts of each feature."""
        columns: dict[str, pa.Array] = {}
        counts: dict[str, Int64s] = {}
        for feature in self.schema.features:
            column = _take(rows.features[feature.name], places)
            if rows.records is not None and feature.cross is None:  # crosses are of whole impressions
                column = _joined(feature, column, common[feature.name], _take(rows.records, places))
            counts[feature.name] = held(feature, column)
            columns |= _arrow(feature, column)
        for name in LABEL_COLUMNS:
            if name in rows.labels:
                columns[name] = pa.array(_take(rows.labels[name], places))
        picked = None if places is None else pa.array(places)
        for name in self.kept:
            columns[KEPT_PREFIX + name] = rows.kept[name] if picked is None else rows.kept[name].take(picked)
        fields = [self._field(name, column.type) for name, column in columns.items()]
        return pa.table(list(columns.values()), schema=pa.schema(fields)), counts

    def _field(self, name: str, kind: pa.DataType) -> pa.Field:
        """What is never null says so, and so do lists of int64."""
        nullable = name in self._nullable or name.startswith(KEPT_PREFIX)
        return pa.field(name, kind, nullable, WIDE if name in self._wide else None)


def encode(feature: Feature, raw: RawColumn, lookup: Lookup | None) -> Encoded:
    """One raw column, encoded."""
    if not isinstance(raw, Ragged):
        return _standardised(feature, raw) if lookup is None else lookup.rows(raw)
    assert lookup is not None
    rows = lookup.rows(raw.values) if len(raw.values) else np.empty(0, dtype=feature.id_type.to_pandas_dtype())
    if feature.kind != "categorical":
        return Ragged(rows, raw.offsets, None if raw.weights is None else raw.weights.astype(np.float32))
    if len(rows) == len(raw):
        return rows
    scalar = np.full(len(raw), NO_VALUE, dtype=rows.dtype)
    scalar[np.diff(raw.offsets) > 0] = rows
    return scalar


def _standardised(feature: Feature, numbers: Float64s) -> Encoded:
    values = np.log1p(numbers) if feature.log1p else numbers
    return ((values - feature.mean) / feature.std).astype(np.float32)


def _take(column: Encoded, places: Int64s | None) -> Encoded:
    if places is None:
        return column
    return column.take(places) if isinstance(column, Ragged) else column[places]


def _joined(feature: Feature, own: Encoded, common: Encoded, records: Int64s) -> Encoded:
    """What the skeleton line says and, after it, what its common record says."""
    if isinstance(common, Ragged):
        return cut(feature, concat_rows(own, common.take(records))) if len(common.values) else own
    taken = common[records]
    return np.where(np.isnan(own) if own.dtype == np.float32 else own == NO_VALUE, taken, own)


def _arrow(feature: Feature, column: Encoded) -> dict[str, pa.Array]:
    if not feature.is_table:
        return {feature.name: pa.array(np.nan_to_num(column, nan=0.0))}
    if not feature.is_list:
        missing = column == NO_VALUE
        return {feature.name: pa.array(column, mask=missing if missing.any() else None)}
    columns = {feature.name: to_cells(column.values, column.offsets)}
    if feature.kind == "weighted_list":
        columns[feature.name + WEIGHT_SUFFIX] = to_cells(column.weights, column.offsets)
    return columns
