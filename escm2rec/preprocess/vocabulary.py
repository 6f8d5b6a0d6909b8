"""Values to table rows: by a vocabulary that is fitted on training rows, or by stable hash; or to what stands for them until then.

A vocabulary is looked up in files that are made from its Parquet and read in place, so memory does not grow with it: whole numbers in a
narrow range by their value, all others by their 64-bit hash. Two whole numbers never have the same. Of strings, one that is out of
vocabulary takes the row of a known one with chance `values / 2^64`, and of two known ones with the same hash the more frequent has the row.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from escm2rec.config import MAX_TABLE_ROWS, FeatureConfig
from escm2rec.errors import DataError
from escm2rec.folder import sha256_of
from escm2rec.preprocess.buckets import Buckets
from escm2rec.preprocess.external import query
from escm2rec.preprocess.ragged import Int32s, Int64s
from escm2rec.preprocess.spilled import ColumnFile, read_column
from escm2rec.preprocess.stable_hash import distinct, hash64
from escm2rec.preprocess.value_counts import TABLE_ROWS, ValueCounter
from escm2rec.schema import MANAGED_IDS, Feature

ValueType = Literal["int64", "string"]
SORT_ROWS = 1 << 22  # sorted in memory up to this, on disk beyond
DENSE_SPAN = 1 << 22  # a table over the range of the values is used up to this, or 4 entries a value
SORTED = {"keys": np.int64, "rows": np.int32, "starts": np.int32}
"""Hashes in order as int64, their rows, and where the hashes of each leading bits begin: where hashes are 2^b, those of b - 1 bits."""
TOP_BITS = np.uint64(64 - (MANAGED_IDS - 1).bit_length())
HEAD = 2  # slots of 4 bytes before the rows


def _int64(values: Any) -> Int64s:
    numbers: Int64s = values.astype(np.int64, copy=False)
    return numbers


def value_type_of(values: Any) -> ValueType:
    """int64 for numpy values, string for Arrow values."""
    return "string" if isinstance(values, pa.Array) else "int64"


def fit_vocabulary(feature: FeatureConfig, counter: ValueCounter, path: Path, memory_bytes: int) -> int:
    """Write the columns value, count and row, the most frequent first, then by value; rows follow the OOV rows. How many there are.

    DataError when a table cannot hold them.
    """
    writer: pq.ParquetWriter | None = None
    row = feature.oov_rows
    empty = pa.table({"value": pa.array([], pa.int64()), "count": pa.array([], pa.int64())})
    tables = counter.by_count(feature.min_count, feature.max_size, memory_bytes)
    try:
        for table in tables:
            if row + len(table) > MAX_TABLE_ROWS:
                raise DataError(
                    f"feature {feature.name!r} has more values than the {MAX_TABLE_ROWS:,} rows of a table", "set max_size or hash_size"
                )
            writer = _write(writer, path, table, row)
            row += len(table)
        writer = _write(writer, path, empty, row) if writer is None else writer
    finally:
        if writer is not None:
            writer.close()
    return row - feature.oov_rows


def _write(writer: pq.ParquetWriter | None, path: Path, table: pa.Table, first: int) -> pq.ParquetWriter:
    rows = pa.array(np.arange(first, first + len(table), dtype=np.int32))
    table = table.append_column("row", rows)
    writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
    writer.write_table(table, row_group_size=TABLE_ROWS)
    return writer


def write_lookup(path: Path, feature: Feature, folder: Path, memory_bytes: int) -> None:
    """Write the files `FEATURE.*` that a Vocabulary finds rows in, from the Parquet of a vocabulary; sorting takes `memory_bytes`."""
    stem = folder / feature.name
    if feature.value_type == "int64":
        low, high, count = _range_of(path)
        span = high - low + 1 if count else 0
        if span <= max(DENSE_SPAN, 4 * count):
            _write_dense(path, stem.with_name(f"{feature.name}.dense"), low, span)
            return
    _write_sorted(path, stem, memory_bytes)


class Vocabulary:
    """Finds the table row of each value: its own, or one of the shared rows by stable hash."""

    def __init__(self, feature: Feature, folder: Path) -> None:
        """Reads the files of `write_lookup` in place."""
        self._oov_rows = np.uint64(feature.oov_rows)
        self._strings = feature.value_type == "string"
        self._dense: Any = None
        if (path := folder / f"{feature.name}.dense").is_file():
            held = np.asarray(read_column(path, np.int32))
            self._before, self._dense = held[:HEAD].view(np.int64)[0], held[HEAD:]
        else:
            files = (np.asarray(read_column(folder / f"{feature.name}.{what}", kind)) for what, kind in SORTED.items())
            self._keys, self._rows, self._starts = files
            self._shift = 64 - (len(self._starts) - 1).bit_length() + 1

    def rows(self, values: Any) -> Int32s:
        """Table row of each whole number or string; of strings, their hashes (`hash64` as int64) will do."""
        if not len(values):
            return np.empty(0, dtype=np.int32)
        if isinstance(values, pa.Array):
            words, index = distinct(values)
            return self._by_hash(hash64(words).view(np.int64))[index]
        if self._strings:
            return self._by_hash(_int64(values))
        if self._dense is None:
            return self._by_hash(hash64(_int64(values)).view(np.int64))
        # What is below the range, or above it by more than int64 holds, becomes negative: the first slot and the last say -1.
        rows = self._dense.take(values - self._before, mode="clip")
        missing = np.flatnonzero(rows < 0)
        return self._with_shared(rows, missing, hash64(_int64(values[missing])) if len(missing) else None)

    def _by_hash(self, hashes: Int64s) -> Int32s:
        """The row of each hash. Those of the same leading bits lie side by side, one or two as a rule: they are tried one after another."""
        rows = np.full(len(hashes), -1, dtype=np.int32)
        if not len(self._keys):
            return self._with_shared(rows, np.arange(len(rows)), hashes.view(np.uint64))
        bucket = (hashes >> self._shift) + (len(self._starts) >> 1)
        place, end = self._starts.take(bucket), self._starts.take(bucket + 1)
        left = np.flatnonzero(place < end)
        while len(left):
            found = self._keys.take(place[left]) == hashes[left]
            rows[left[found]] = self._rows.take(place[left[found]])
            left = left[~found]
            place[left] += 1
            left = left[place[left] < end[left]]
        missing = np.flatnonzero(rows < 0)
        return self._with_shared(rows, missing, hashes[missing].view(np.uint64))

    def _with_shared(self, rows: Int32s, missing: Int64s, hashes: Any) -> Int32s:
        """Rows with a shared one, by the hash, for those that are missing."""
        if len(missing):
            rows[missing] = (hashes % self._oov_rows).astype(np.int32)
        return rows


def _tables(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(TABLE_ROWS, columns=columns)


def _range_of(path: Path) -> tuple[int, int, int]:
    """Least and greatest int64 value, and how many there are; 0, 0, 0 of none."""
    low, high, count = 0, 0, 0
    for batch in _tables(path, ["value"]):
        values = batch["value"].to_numpy()
        if len(values):
            least, most = int(values.min()), int(values.max())
            low, high = (min(low, least), max(high, most)) if count else (least, most)
            count += len(values)
    return low, high, count


def _write_dense(path: Path, file: Path, low: int, span: int) -> None:
    """The number before `low`, by int64's rules, in HEAD slots; then the row of each value from it to one past the last; -1 for none."""
    before = np.array([low], np.int64) - 1
    with file.open("wb") as column:  # written, not mapped: on a full disk the process would die of a page that has no place
        before.tofile(column)
        for start in range(0, span + 2, TABLE_ROWS):
            np.full(min(TABLE_ROWS, span + 2 - start), -1, np.int32).tofile(column)
    dense: Any = np.memmap(file, dtype=np.int32, mode="r+", offset=before.nbytes)
    for batch in _tables(path, ["value", "row"]):
        dense[batch["value"].to_numpy() - before] = batch["row"].to_numpy()
    dense.flush()


def _write_sorted(path: Path, stem: Path, memory_bytes: int) -> None:
    """Hashes in order, the row of each, and where those of each leading bits begin; of equal hashes the first row counts."""
    with pq.ParquetFile(path) as file:
        count = file.metadata.num_rows
    schema = pa.schema([("key", pa.int64()), ("row", pa.int32())])
    batches = (
        pa.RecordBatch.from_arrays([_keys(batch["value"]), batch["row"]], schema=schema) for batch in _tables(path, ["value", "row"])
    )
    reader = pa.RecordBatchReader.from_batches(schema, batches)
    if count <= SORT_ROWS:
        ordered: Iterator[pa.Table] = iter([reader.read_all().sort_by([("key", "ascending"), ("row", "ascending")])])
    else:
        folder = stem.with_name(f"{stem.name}.sort")
        ordered = query('SELECT key, "row" FROM rows ORDER BY key, "row"', reader, folder, memory_bytes, TABLE_ROWS)
    keys, rows, starts = (ColumnFile(stem.with_name(f"{stem.name}.{what}"), kind) for what, kind in SORTED.items())
    bits = max(1, (count - 1).bit_length() - 1)
    begun, written = 0, 0
    for table in ordered:
        held = table["key"].to_numpy()
        keys.append(held)
        rows.append(table["row"].to_numpy())
        if len(held):
            bucket = (held >> (64 - bits)) + (1 << (bits - 1))
            starts.append(written + np.searchsorted(bucket, np.arange(begun, bucket[-1] + 1)))
            begun, written = int(bucket[-1]) + 1, written + len(held)
    starts.append(np.full((1 << bits) + 1 - begun, written))
    for file in (keys, rows, starts):
        file.finish()


def _keys(values: pa.Array) -> pa.Array:
    return pa.array(hash64(values.to_numpy() if values.type == pa.int64() else values).view(np.int64))


class HashedValues:
    """Finds table rows by stable hash alone."""

    def __init__(self, feature: Feature) -> None:
        self._num_rows = np.uint64(feature.num_embeddings)
        self._strings = feature.value_type == "string"

    def rows(self, values: Any) -> Int32s:
        """Table row of each whole number or string; of strings, their hashes (`hash64` as int64) will do."""
        if isinstance(values, pa.Array):
            if not len(values):
                return np.empty(0, dtype=np.int32)
            words, index = distinct(values)
            return (hash64(words) % self._num_rows).astype(np.int32)[index]
        hashes = _int64(values).view(np.uint64) if self._strings else hash64(_int64(values))
        return (hashes % self._num_rows).astype(np.int32)


class ManagedValues:
    """Finds what stands for a value until training gives it a row: the top 62 bits of its stable hash."""

    def __init__(self, feature: Feature) -> None:
        self._strings = feature.value_type == "string"

    def rows(self, values: Any) -> Int64s:
        """Of each whole number or string; of strings, their hashes (`hash64` as int64) will do."""
        if isinstance(values, pa.Array):
            words, index = distinct(values)
            return (hash64(words) >> TOP_BITS).view(np.int64)[index]
        hashes = _int64(values).view(np.uint64) if self._strings else hash64(_int64(values))
        return (hashes >> TOP_BITS).view(np.int64)


Lookup = Vocabulary | HashedValues | ManagedValues | Buckets


def open_lookup(feature: Feature, folder: Path) -> Lookup:
    """The lookup of a table feature; that of a vocabulary from the files of `write_lookup`."""
    if feature.encoding == "buckets":
        return Buckets(feature.boundaries or ())
    if feature.is_managed:
        return ManagedValues(feature)
    return HashedValues(feature) if feature.encoding == "hash" else Vocabulary(feature, folder)


def check_vocabulary(feature: Feature, folder: Path) -> Path:
    """`<folder>/<feature>.parquet`; DataError when it is not what the schema was made with."""
    path = folder / f"{feature.name}.parquet"
    try:
        found = pq.read_metadata(path).num_rows == feature.num_embeddings - feature.oov_rows and sha256_of(path)
    except PermissionError as error:
        raise DataError(f"the vocabulary {path} cannot be read: {os.strerror(errno.EACCES)}", "check who may read it") from error
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot read the vocabulary {path}: {error}", "the data set or run is damaged: make it again") from error
    if found != feature.vocabulary_sha256:
        raise DataError(f"{path} is not the vocabulary that the schema was made with", "preprocess again")
    return path
