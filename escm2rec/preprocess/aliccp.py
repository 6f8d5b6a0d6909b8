"""Ali-CCP skeleton files: blocks of impressions that point at their common records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from escm2rec.errors import DataError
from escm2rec.preprocess.aliccp_columns import ABSENT, INDEX_BYTES, AliccpColumns, SideColumns, common_keys, key_text, present
from escm2rec.preprocess.aliccp_text import BLOCK_BYTES, Lines, TextBlock, text_blocks
from escm2rec.preprocess.block import RawBlock
from escm2rec.preprocess.digits import whole_numbers
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.ragged import Array, Bools, Float64s, Int64s
from escm2rec.preprocess.records import CommonRecords
from escm2rec.preprocess.rejections import IDENTIFIER, LABEL, MISSING_COMMON, SEVERAL, TRUTH, values_at

HEADER = 5  # sample_id, click, buy, common_feature_index, feature_num
TRUTH_COLUMNS = ("sample_id", "true_propensity", "true_cvr")


class SkeletonFile:
    """One skeleton file with its common records."""

    def __init__(self, file: RawFile, columns: AliccpColumns, common: CommonRecords) -> None:
        self.file = file
        self.common = common
        self._columns = columns
        self._read_truth = file.truth is not None and columns.request.labels

    def tasks(self, start: int = 0, stop: int | None = None, first_row: int = 0) -> Iterator[Callable[[], RawBlock]]:
        """One task a block of text, in order; each parses it. Of the whole file, or of a range of bytes and its first row."""
        truth = _TruthRows(self.file, first_row) if self._read_truth else None
        for block in text_blocks(self.file.path, BLOCK_BYTES, start, stop, first_row):
            yield self._task(block, truth.take(block.lines) if truth is not None else None)
        if truth is not None and stop is None:
            truth.finish()

    def _task(self, block: TextBlock, truth: pa.Table | None) -> Callable[[], RawBlock]:
        return lambda: self._parse(block, truth)

    def _parse(self, block: TextBlock, truth: pa.Table | None) -> RawBlock:
        lines = Lines(block, HEADER)
        keys = common_keys(lines, 3)
        records = self.common.find(keys)
        lines.bad.mark(records < 0, MISSING_COMMON, "common_feature_index", lines.column_text(3))
        side = self._columns.read(lines)
        self._mark_several(lines, side, records)
        labels = self._labels(lines) if self._columns.request.labels else {}
        samples = self._sample_ids(lines, truth is not None)
        if truth is not None:
            labels |= _truth_labels(self.file, lines, samples, truth)
        extras = self._extras(side, keys, records, samples)
        rows = block.first_line + np.arange(lines.count, dtype=np.int64)
        whole = RawBlock(self.file, rows, lines.bad.lines, dict(side.features), extras, labels, records, lines.bad.found)
        return whole.take(lines.bad.good)

    def _labels(self, lines: Lines) -> dict[str, Any]:
        labels: dict[str, Any] = {}
        for number, (name, column) in enumerate((("click", "click"), ("conversion", "buy")), start=1):
            starts, ends = lines.span(number)
            label = lines.buffer[starts] - np.uint8(ord("0"))
            lines.bad.mark((ends - starts != 1) | (label > 1), LABEL, column, lines.column_text(number))
            labels[name] = label
        return labels

    def _sample_ids(self, lines: Lines, needed: bool) -> Int64s:
        if not needed and "sample_id" not in self._columns.request.extras:
            return np.empty(0, dtype=np.int64)
        samples, good = whole_numbers(lines.words, *lines.span(0))
        lines.bad.mark(~good, IDENTIFIER, "sample_id", lines.column_text(0))
        return samples.view(np.int64)

    def _mark_several(self, lines: Lines, side: SideColumns, records: Int64s) -> None:
        """A single-valued field must not be on both sides of an impression."""

        def mark(column: str, here: Bools, there: Array, absent: int) -> None:
            both = here & (records >= 0)
            if both.any():
                both[both] = there[records[both]] != absent
                lines.bad.mark(both, SEVERAL, column, lambda rows: ["one here and one in the common record"] * len(rows))

        for feature in self._columns.request.features:
            if feature.kind in ("categorical", "numeric"):
                mark(feature.column, present(side.features[feature.name]), self.common.held[feature.name], False)
        for name in self._columns.extra_fields:
            mark(name, side.extras[name] != ABSENT, self.common.extras[name], ABSENT)

    def _extras(self, side: SideColumns, keys: Int64s, records: Int64s, samples: Int64s) -> dict[str, pa.Array]:
        extras: dict[str, pa.Array] = {}
        for name in self._columns.request.extras:
            if name == "sample_id":
                extras[name] = pa.array(samples)
            elif name == "common_feature_index":
                extras[name] = _fixed_strings(*key_text(keys), len(keys))
            else:
                ids = side.extras[name]
                ids = np.where(ids == ABSENT, self.common.extras[name][records], ids) if self.common.count else ids
                extras[name] = pa.array(ids, mask=ids == ABSENT)
        return extras


def _fixed_strings(data: bytes, width: int, count: int) -> pa.Array:
    assert width == INDEX_BYTES
    offsets = np.arange(count + 1, dtype=np.int32) * width
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(data))


def check_truth(file: RawFile, lines: int) -> None:
    """DataError when the truth file beside a skeleton has not as many rows as that has lines."""
    rows = _open_truth(file).metadata.num_rows
    if rows != lines:
        more = "fewer" if rows < lines else "more"
        raise DataError(f"{file.truth} has {more} rows than {file.path}: {rows} and {lines}", "truth goes row by row with the skeleton")


def _open_truth(file: RawFile) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(file.truth)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error
    missing = [name for name in TRUTH_COLUMNS if name not in parquet.schema_arrow.names]
    if missing:
        raise DataError(f"{file.truth} has no column {missing[0]!r}", f"a truth file has {', '.join(TRUTH_COLUMNS)}")
    for name in TRUTH_COLUMNS:
        kind = parquet.schema_arrow.field(name).type
        whole = name == "sample_id"
        if not (pt.is_integer(kind) or (not whole and pt.is_floating(kind))):
            expected = "a whole number" if whole else "a number"
            raise DataError(f"{file.truth}: column {name!r}: expected {expected}, found type {kind}", "fetch or simulate it again")
    return parquet


def _damaged(file: RawFile, error: Exception) -> DataError:
    return DataError(f"{file.truth} is not a Parquet file, or is damaged: {error}", "fetch or simulate it again")


class _TruthRows:
    """Reads the truth file beside a skeleton from a row on, so many rows at a time."""

    def __init__(self, file: RawFile, first: int) -> None:
        parquet = _open_truth(file)
        self._file, group = file, 0
        while group < parquet.num_row_groups and (rows := parquet.metadata.row_group(group).num_rows) <= first:
            group, first = group + 1, first - rows
        self._batches = parquet.iter_batches(row_groups=range(group, parquet.num_row_groups), columns=list(TRUTH_COLUMNS))
        self._rest = pa.table({name: [] for name in TRUTH_COLUMNS}, schema=parquet.schema_arrow.empty_table().select(TRUTH_COLUMNS).schema)
        self.take(first)

    def _next(self) -> pa.RecordBatch | None:
        try:
            return next(self._batches, None)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self._file, error) from error

    def finish(self) -> None:
        """DataError when rows are left."""
        if len(self._rest) or self._next() is not None:
            raise DataError(f"{self._file.truth} has more rows than {self._file.path}", "truth goes row by row with the skeleton")

    def take(self, rows: int) -> pa.Table:
        """The next rows; DataError when there are fewer."""
        parts = [self._rest]
        while sum(len(part) for part in parts) < rows:
            batch = self._next()
            if batch is None:
                raise DataError(f"{self._file.truth} has fewer rows than {self._file.path}", "truth goes row by row with the skeleton")
            parts.append(pa.Table.from_batches([batch]))
        table = pa.concat_tables(parts)
        self._rest = table.slice(rows)
        return table.slice(0, rows)


def _truth_labels(file: RawFile, lines: Lines, samples: Int64s, truth: pa.Table) -> dict[str, Any]:
    said = truth["sample_id"].combine_chunks()
    equal = pc.fill_null(pc.equal(said.cast(pa.int64(), safe=False), pa.array(samples)), False).to_numpy(zero_copy_only=False)
    differ = np.flatnonzero(~equal & ~lines.bad.mask)
    if len(differ):
        row, found = int(differ[0]), values_at(said)(differ[:1])[0]
        raise DataError(
            f"{file.truth}: row {lines.bad.lines[row]}: expected sample_id {samples[row]} as in {file.path}, found {found}",
            "truth goes row by row with the skeleton",
        )
    labels: dict[str, Any] = {}
    for name in TRUTH_COLUMNS[1:]:
        column = truth[name].combine_chunks()
        values: Float64s = pc.fill_null(column.cast(pa.float64()), float("nan")).to_numpy(zero_copy_only=False)
        lines.bad.mark(~((values >= 0) & (values <= 1)), TRUTH, name, values_at(column))
        labels[name] = values.astype(np.float32)
    return labels
