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
LOAD = 0.4  # of the slots of hashes that are taken: 40 bytes a value, for which three of four are in their own slot
SLOT = np.complex128  # numpy's type of 16 bytes: a slot is taken in one piece
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
    _write_slots(path, stem, memory_bytes)


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
            held = np.asarray(read_column(folder / f"{feature.name}.slots", SLOT))
            self._num_slots, self._slots = int(held[:1].view(np.int64)[0]), held[1:]

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
        """The row of each hash: it stands in its own slot, or further on, before one that is free."""
        slot = _home(hashes, self._num_slots)
        held = self._slots.take(slot).view(np.int64).reshape(-1, 2)
        rows = held[:, 1].astype(np.int32)
        other = np.flatnonzero(held[:, 0] != hashes)
        left = other[rows[other] >= 0]
        rows[other] = -1
        slot = slot[left]
        while len(left):
            slot += 1
            held = self._slots.take(slot).view(np.int64).reshape(-1, 2)
            found = held[:, 0] == hashes[left]
            rows[left[found]] = held[found, 1]
            more = ~found & (held[:, 1] >= 0)
            left, slot = left[more], slot[more]
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


def _write_slots(path: Path, stem: Path, memory_bytes: int) -> None:
    """Slots of hashes, by which a row is found; of equal hashes the first row counts."""
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
    slots = _Slots(stem.with_name(f"{stem.name}.slots"), count)
    for table in ordered:
        slots.add(table["key"].to_numpy(), table["row"].to_numpy())
    slots.finish()


class _Slots:
    """Writes hashes, as they come in order, to slots: each to its own (`_home`) or the first free one after it.

    A slot is two int64: the hash, and the row, which is -1 of one that is free. The first says how many there are; the last is free.
    """

    def __init__(self, path: Path, count: int) -> None:
        self._slots = min(int(count / LOAD) + 1, (1 << 32) - 1)
        self._file, self._free = ColumnFile(path, np.int64), 0
        self._file.append(np.array([self._slots, -1]))

    def add(self, hashes: Int64s, rows: Int32s) -> None:
        """Write the next hashes."""
        if not len(hashes):
            return
        # Each place is at least its home, and one more than the place before: p - i is the running maximum of home - i.
        order = np.arange(len(hashes))
        places = np.maximum(np.maximum.accumulate(_home(hashes, self._slots) - order), self._free) + order
        self._write(int(places[-1]) + 1, places, hashes, rows)

    def finish(self) -> None:
        """Write what is free after the last hash."""
        self._write(max(self._slots, self._free) + 1, [], [], [])
        self._file.finish()

    def _write(self, end: int, places: Any, hashes: Any, rows: Any) -> None:
        for start in range(self._free, end, TABLE_ROWS):  # of what is free there may be much
            block = np.zeros((min(TABLE_ROWS, end - start), 2), np.int64)
            block[:, 1] = -1
            first, last = np.searchsorted(places, [start, start + len(block)])
            here = np.asarray(places[first:last], np.int64) - start
            block[here, 0], block[here, 1] = hashes[first:last], rows[first:last]
            self._file.append(block)
        self._free = end


def _home(hashes: Int64s, slots: int) -> Int64s:
    """The slot of each hash, from 0; in the order of the hashes: their upper 32 bits, as a share of the slots."""
    upper = hashes.view(np.uint64) >> np.uint64(32)
    upper ^= np.uint64(1 << 31)  # as the order of signed numbers has it
    upper *= np.uint64(slots)
    upper >>= np.uint64(32)
    return upper.view(np.int64)


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
