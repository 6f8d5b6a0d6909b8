"""Raw columns to the encoded columns of a data set, as `escm2rec.schema` lays them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from escm2rec.config import KEPT_PREFIX, WEIGHT_SUFFIX
from escm2rec.errors import DataError
from escm2rec.preprocess.block import RawBlock, RawColumn
from escm2rec.preprocess.common import CommonRecords
from escm2rec.preprocess.ragged import Float64s, Int64s, Ragged, concat_rows
from escm2rec.preprocess.shares import held
from escm2rec.preprocess.spilled import SpilledColumn
from escm2rec.preprocess.vocabulary import load_rows, value_type_of
from escm2rec.schema import Feature, Schema

CHUNK_ROWS = 16_384  # common records encoded at a time
LABEL_COLUMNS = ("click", "conversion", "weight", "true_propensity", "true_cvr")

# An encoded column before it is Arrow: ragged rows (list, weighted_list), int32 with -1 for missing (categorical), or float32 with NaN for
# missing (numeric). Missing stays visible until the two sides of an Ali-CCP impression are one.
Encoded = Any
NO_VALUE = np.int32(-1)


@dataclass(frozen=True)
class EncodedCommon:
    """Encoded columns of common records, memory-mapped."""

    features: dict[str, Encoded]


class Encoder:
    """Encodes raw columns by a schema and its vocabulary; the same in preprocess and in score."""

    def __init__(self, schema: Schema, vocabulary: Path, workspace: Path, memory_bytes: int, keep: Sequence[str] | None = None) -> None:
        """`workspace` is for what is looked up; sorting it takes up to `memory_bytes`."""
        self.schema = schema
        self.kept = tuple(schema.keep if keep is None else keep)
        self._rows = {feature.name: load_rows(feature, vocabulary, workspace, memory_bytes) for feature in schema.tables}
        self._nullable = {feature.name for feature in schema.features if feature.kind == "categorical"}

    def column(self, feature: Feature, raw: RawColumn, where: str) -> Encoded:
        """One raw column, encoded."""
        if not isinstance(raw, Ragged):
            return _standardised(feature, raw)
        if feature.value_type != value_type_of(raw.values) and len(raw.values):
            raise DataError(
                f"{where}: column {feature.column!r} holds {value_type_of(raw.values)} values, it was trained on {feature.value_type}",
                "encode logs of the format that the data set was made from",
            )
        rows = self._rows[feature.name].rows(raw.values) if len(raw.values) else np.empty(0, dtype=np.int32)
        if feature.kind != "categorical":
            return Ragged(rows, raw.offsets, None if raw.weights is None else raw.weights.astype(np.float32))
        scalar = np.full(len(raw), NO_VALUE)
        scalar[np.diff(raw.offsets) > 0] = rows
        return scalar

    def common(self, records: CommonRecords, folder: Path) -> EncodedCommon:
        """Every common record once, under `folder`."""
        folder.mkdir(parents=True)
        encoded = {}
        for feature in self.schema.features:
            raw = records.features[feature.name]
            with closing(SpilledColumn(folder / feature.name)) as spilled:
                for start in range(0, max(records.count, 1), CHUNK_ROWS):
                    spilled.append(self.column(feature, slice_rows(raw, start, start + CHUNK_ROWS), "common records"))
                encoded[feature.name] = spilled.finish()
        return EncodedCommon(encoded)

    def tables(self, block: RawBlock, common: EncodedCommon | None, rows: int) -> Iterator[tuple[pa.Table, dict[str, Int64s]]]:
        """Tables of at most so many rows, common records joined, with labels and kept columns; and what `shares.held` counts of each."""
        if not len(block):
            return
        where = str(block.file.path)
        encoded = {feature.name: self.column(feature, block.features[feature.name], where) for feature in self.schema.features}
        for start in range(0, len(block), rows):
            yield self._table(encoded, block, common, start, min(start + rows, len(block)))

    def _table(
        self, encoded: dict[str, Encoded], block: RawBlock, common: EncodedCommon | None, start: int, stop: int
    ) -> tuple[pa.Table, dict[str, Int64s]]:
        columns: dict[str, pa.Array] = {}
        counts: dict[str, Int64s] = {}
        for feature in self.schema.features:
            column = slice_rows(encoded[feature.name], start, stop)
            if common is not None:
                assert block.common is not None
                column = _joined(column, common.features[feature.name], block.common[start:stop])
            counts[feature.name] = held(feature, column)
            columns |= _arrow(feature, column)
        for name in LABEL_COLUMNS:
            if name in block.labels:
                columns[name] = pa.array(block.labels[name][start:stop])
        for name in self.kept:
            columns[KEPT_PREFIX + name] = block.extras[name].slice(start, stop - start)
        return pa.table(
            list(columns.values()), schema=pa.schema([self._field(name, column.type) for name, column in columns.items()])
        ), counts

    def _field(self, name: str, kind: pa.DataType) -> pa.Field:
        """What is never null says so: Parquet then reads lists 1.3 times as fast (docs/decisions/0001)."""
        return pa.field(name, kind, nullable=name in self._nullable or name.startswith(KEPT_PREFIX))


def _standardised(feature: Feature, numbers: Float64s) -> Encoded:
    values = np.log1p(numbers) if feature.log1p else numbers
    return ((values - feature.mean) / feature.std).astype(np.float32)


def slice_rows(column: Any, start: int, stop: int) -> Any:
    """Rows from `start` to before `stop` of a raw or encoded column, without copying values."""
    if not isinstance(column, Ragged):
        return column[start:stop]
    offsets = column.offsets[start : stop + 1]
    low, high = offsets[0], offsets[-1]
    return Ragged(column.values[low:high], offsets - low, None if column.weights is None else column.weights[low:high])


def _joined(own: Encoded, common: Encoded, records: Int64s) -> Encoded:
    """What the skeleton line says and, after it, what its common record says."""
    if isinstance(common, Ragged):
        return concat_rows(own, common.take(records)) if len(common.values) else own
    taken = common[records]
    return np.where(np.isnan(own) if own.dtype == np.float32 else own == NO_VALUE, taken, own)


def _arrow(feature: Feature, column: Encoded) -> dict[str, pa.Array]:
    if feature.kind == "numeric":
        return {feature.name: pa.array(np.nan_to_num(column, nan=0.0))}
    if feature.kind == "categorical":
        return {feature.name: pa.array(column, mask=column == NO_VALUE)}
    columns = {feature.name: _lists(column.offsets, column.values)}
    if feature.kind == "weighted_list":
        columns[feature.name + WEIGHT_SUFFIX] = _lists(column.offsets, column.weights)
    return columns


def _lists(offsets: Int64s, values: Any) -> pa.ListArray:
    flat = pa.array(values)
    kind = pa.list_(pa.field("element", flat.type, nullable=False))
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat, type=kind)
