"""Which values have a row of their own: counted on training impressions, kept in Parquet, looked up in columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from escm2rec.config import FeatureConfig
from escm2rec.errors import DataError
from escm2rec.folder import sha256_of
from escm2rec.preprocess.ragged import Int32s, Int64s
from escm2rec.preprocess.stable_hash import distinct, hash64
from escm2rec.schema import Feature

ValueType = Literal["int64", "string"]
MERGE_ROWS = 1 << 20  # partial counts held before they are merged
DENSE_SPAN = 1 << 22  # a table over the range of the values is used up to this, or 16 entries a value


def value_type_of(values: Any) -> ValueType:
    """int64 for numpy values, string for Arrow values."""
    return "string" if isinstance(values, pa.Array) else "int64"


def count_values(values: Any, times: Int64s | None = None) -> pl.DataFrame:
    """Distinct values and how often each occurs, an occurrence counting `times`."""
    if times is not None:
        held = np.flatnonzero(times)
        values, times = values[held], times[held]
    if not len(values):
        return pl.DataFrame(schema={"value": pl.String if isinstance(values, pa.Array) else pl.Int64, "count": pl.Int64})
    if isinstance(values, pa.Array):
        counted = pc.value_counts(values)
        return pl.DataFrame({"value": pl.from_arrow(counted.field("values")), "count": pl.from_arrow(counted.field("counts"))})
    low, high = int(values.min()), int(values.max())
    if high - low < max(1024, 4 * len(values)):
        counts = np.bincount(values - low, weights=times)
        held = np.flatnonzero(counts)
        return pl.DataFrame({"value": held + low, "count": counts[held].astype(np.int64)})
    frame = pl.DataFrame({"value": values, "count": np.ones(len(values), dtype=np.int64) if times is None else times})
    return frame.group_by("value").agg(pl.col("count").sum())


class ValueCounter:
    """Adds up partial counts; memory grows with the distinct values only."""

    def __init__(self) -> None:
        self._total: pl.DataFrame | None = None
        self._parts: list[pl.DataFrame] = []
        self._waiting = 0

    def add(self, counts: pl.DataFrame, where: str = "") -> None:
        """Add what `count_values` gave; DataError when the type of the values differs from earlier ones."""
        known = self._total if self._total is not None else self._parts[0] if self._parts else None
        if known is not None and known.schema["value"] != counts.schema["value"]:
            if not len(counts):
                return
            raise DataError(f"{where}: values are of type {counts.schema['value']}, in earlier files they are {known.schema['value']}")
        self._parts.append(counts)
        self._waiting += len(counts)
        if self._waiting > max(MERGE_ROWS, len(self._total) if self._total is not None else 0):
            self._merge()

    def _merge(self) -> None:
        parts = self._parts if self._total is None else [self._total, *self._parts]
        self._total = pl.concat(parts).group_by("value").agg(pl.col("count").sum())
        self._parts, self._waiting = [], 0

    @property
    def total(self) -> pl.DataFrame:
        """Columns value and count, in no particular order."""
        if self._parts or self._total is None:
            if not self._parts:
                return pl.DataFrame(schema={"value": pl.Int64, "count": pl.Int64})
            self._merge()
        assert self._total is not None
        return self._total


def fit_vocabulary(feature: FeatureConfig, counts: pl.DataFrame) -> pl.DataFrame:
    """Columns value, count, row: the most frequent first, then by value (strings by their bytes); rows follow the OOV rows."""
    ordered = counts.filter(pl.col("count") >= feature.min_count).sort(["count", "value"], descending=[True, False])
    if feature.max_size is not None:
        ordered = ordered.head(feature.max_size)
    rows = pl.Series("row", np.arange(feature.oov_rows, feature.oov_rows + len(ordered), dtype=np.int32))
    return ordered.select("value", "count").with_columns(rows)


class Vocabulary:
    """Finds the table row of each value: its own, or one of the shared rows by stable hash."""

    def __init__(self, frame: pl.DataFrame, value_type: ValueType, oov_rows: int) -> None:
        self._oov_rows = np.uint64(oov_rows)
        self._frame = frame.select("value", "row") if value_type == "string" else None
        self._dense: Int32s | None = None
        if value_type == "int64":
            values, rows = frame["value"].to_numpy(), frame["row"].to_numpy().astype(np.int32)
            self._low = int(values.min()) if len(values) else 0
            self._span = int(values.max()) - self._low + 1 if len(values) else 0
            if self._span <= max(DENSE_SPAN, 16 * len(values)):
                self._dense = np.full(self._span + 1, -1, dtype=np.int32)
                self._dense[values - self._low] = rows
            else:
                order = np.argsort(values)
                self._values, self._rows = values[order], rows[order]

    def rows(self, values: Any) -> Int32s:
        """Table row of each int64 or string value."""
        if self._frame is not None:
            return self._string_rows(values)
        if self._dense is not None:
            # Below the range wraps to a huge unsigned number: one comparison finds both ends, and the last slot says -1.
            places = np.minimum((values - np.int64(self._low)).view(np.uint64), np.uint64(self._span)).view(np.int64)
            rows: Int32s = self._dense[places]
        else:
            places = np.minimum(np.searchsorted(self._values, values), len(self._values) - 1)
            rows = np.where(self._values[places] == values, self._rows[places], np.int32(-1))
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            rows[missing] = self._shared(values[missing])
        return rows

    def _string_rows(self, values: pa.Array) -> Int32s:
        if not len(values):
            return np.empty(0, dtype=np.int32)
        words, index = distinct(values)
        assert self._frame is not None
        looked_up = pl.DataFrame({"value": pl.from_arrow(words)}).join(self._frame, on="value", how="left", maintain_order="left")
        rows = looked_up["row"].fill_null(-1).to_numpy().astype(np.int32)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            rows[missing] = self._shared(words.take(pa.array(missing)))
        return rows[index]

    def _shared(self, values: Any) -> Int32s:
        shared: Int32s = (hash64(values) % self._oov_rows).astype(np.int32)
        return shared


class HashedValues:
    """Finds table rows by stable hash alone."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = np.uint64(num_rows)

    def rows(self, values: Any) -> Int32s:
        """Table row of each int64 or string value."""
        if isinstance(values, pa.Array):
            if not len(values):
                return np.empty(0, dtype=np.int32)
            words, index = distinct(values)
            return (hash64(words) % self._num_rows).astype(np.int32)[index]
        return (hash64(values) % self._num_rows).astype(np.int32)


def load_rows(feature: Feature, folder: Path) -> Vocabulary | HashedValues:
    """The lookup of a table feature, from `<folder>/<feature>.parquet` unless it is hashed."""
    if feature.encoding == "hash":
        return HashedValues(feature.num_embeddings)
    path = folder / f"{feature.name}.parquet"
    try:
        frame = pl.read_parquet(path, use_pyarrow=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot read the vocabulary {path}: {error}", "the data set or run is damaged: make it again") from error
    if sha256_of(path) != feature.vocabulary_sha256:
        raise DataError(f"{path} is not the vocabulary that the schema was made with", "preprocess again")
    assert feature.value_type is not None
    return Vocabulary(frame, feature.value_type, feature.oov_rows)
