"""Parquet and CSV tables with one row an impression."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from escm2rec.config import EventsSource, TableSource
from escm2rec.errors import DataError
from escm2rec.preprocess.block import RawBlock, Request
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.outcomes import impression_columns, labels_of, read_outcomes
from escm2rec.preprocess.ragged import Int64s
from escm2rec.preprocess.rejections import COLUMNS, FIRST_OFFENDERS, LABEL, TRUTH, WEIGHT, BadRows, Rejection, values_at
from escm2rec.preprocess.table_columns import TableColumn, numbers_of, raw_column

CSV_BLOCK_BYTES = 16 << 20


def not_parquet(path: Path, error: Exception) -> DataError:
    """What is said of a file that cannot be read as Parquet."""
    cut = f"was the copy or the export cut off? it has {path.stat().st_size:,} bytes"
    hint = cut if path.suffix == ".parquet" else "CSV tables must end in .csv"
    return DataError(f"{path} is not a Parquet file, or is damaged: {error}", hint)


class TableFile:
    """One Parquet or CSV file of impressions; those of an event log have their labels in `file.outcomes`."""

    def __init__(self, file: RawFile, source: TableSource | EventsSource, request: Request, block_rows: int) -> None:
        self.file = file
        self._source, self._request, self._block_rows = source, request, block_rows
        self._is_csv = file.path.suffix == ".csv"
        self._labels = self._label_columns() if request.labels else {}

    def _label_columns(self) -> dict[str, str]:
        names = ("click", "conversion", "weight", "true_propensity", "true_cvr")
        named = {name: getattr(self._source, name, None) for name in names}  # an event log has a weight alone
        return {name: column for name, column in named.items() if column is not None}

    def tasks(self, start: int = 0, stop: int | None = None, first_row: int = 0) -> Iterator[Callable[[], RawBlock]]:
        """One task a batch of rows, in order; each makes its columns. Of the whole file, or of some row groups of a Parquet file and their
        first row."""
        row = first_row
        for table, lines, rejections in self.batches(start, stop, first_row):
            yield self._task(table, row, lines, rejections)
            row += len(table)

    def batches(self, start: int = 0, stop: int | None = None, first_row: int = 0) -> Iterator[tuple[pa.Table, Int64s, list[Rejection]]]:
        """The columns that are wanted as they are in the file, the place of each row, and lines that are no rows."""
        if self.file.path.stat().st_size == 0:
            raise DataError(f"{self.file.path} is empty (0 bytes)", "was the copy or the export interrupted?")
        return self._csv_batches() if self._is_csv else self._parquet_batches(start, stop, first_row)

    def _task(self, table: pa.Table, first: int, lines: Int64s, rejections: list[Rejection]) -> Callable[[], RawBlock]:
        return lambda: self._block(table, first, lines, rejections)

    def _wanted(self, available: list[str]) -> list[str]:
        wanted = {feature.column for feature in self._request.features}
        wanted |= {feature.weights_column for feature in self._request.features if feature.weights_column is not None}
        wanted |= {*self._labels.values(), *self._request.extras}
        if isinstance(self._source, EventsSource) and self._request.labels:
            wanted |= {*impression_columns(self._source)}
        for column in sorted(wanted):
            if available.count(column) > 1:
                raise DataError(f"{self.file.path} has {available.count(column)} columns named {column!r}", "rename all but one")
            if column not in available:
                near = difflib.get_close_matches(column, available, n=1)
                raise DataError(
                    f"{self.file.path} has no column {column!r}",
                    f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(available[:20])}",
                )
        return [name for name in available if name in wanted]

    def _parquet_batches(self, start: int, stop: int | None, first_row: int) -> Iterator[tuple[pa.Table, Int64s, list[Rejection]]]:
        try:
            # With pre_buffer the bytes of every row group stay until the file is closed.
            with pq.ParquetFile(self.file.path, pre_buffer=False) as parquet:
                columns = self._wanted(parquet.schema_arrow.names)
                row, groups = first_row + 1, range(start, parquet.num_row_groups if stop is None else stop)
                for batch in parquet.iter_batches(self._block_rows, row_groups=groups, columns=columns):
                    yield pa.Table.from_batches([batch]), np.arange(row, row + len(batch), dtype=np.int64), []
                    row += len(batch)
        except (pa.ArrowInvalid, OSError) as error:
            raise not_parquet(self.file.path, error) from error

    def _csv_batches(self) -> Iterator[tuple[pa.Table, Int64s, list[Rejection]]]:
        path = self.file.path
        skipped: list[tuple[int, str]] = []

        def invalid(row: pa_csv.InvalidRow) -> str:
            skipped.append((row.number, f"{row.actual_columns} columns instead of {row.expected_columns} in {row.text!r}"))
            return "skip"

        try:
            header = pa_csv.open_csv(path, parse_options=pa_csv.ParseOptions(invalid_row_handler=lambda row: "skip")).schema.names
            wanted = self._wanted(header)
            convert = pa_csv.ConvertOptions(
                column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted, null_values=[""], strings_can_be_null=True
            )
            reader = pa_csv.open_csv(
                path,
                pa_csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
                pa_csv.ParseOptions(invalid_row_handler=invalid),
                convert,
            )
            line = 2
            for batch in reader:
                lines, rejections = self._csv_lines(line, len(batch), skipped)
                line += len(batch) + len(skipped)
                skipped.clear()
                yield pa.Table.from_batches([batch]), lines, rejections
            if skipped:
                yield pa.table({name: pa.array([], pa.string()) for name in wanted}), *self._csv_lines(line, 0, skipped)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is not a CSV table: {error}", "a header line and comma-separated columns are expected") from error

    def _csv_lines(self, line: int, count: int, skipped: list[tuple[int, str]]) -> tuple[Int64s, list[Rejection]]:
        """Line numbers of the rows of a batch that begins at `line`, lines with a wrong number of columns passed over."""
        if not skipped:
            return np.arange(line, line + count, dtype=np.int64), []
        numbers = [number for number, _ in skipped]
        lines = np.setdiff1d(np.arange(line, line + count + len(skipped), dtype=np.int64), numbers)[:count]
        first = skipped[:FIRST_OFFENDERS]
        rows, seen = [row for row, _ in first], [text[:120] for _, text in first]
        return lines, [Rejection(COLUMNS, str(self.file.path), "", len(skipped), rows, seen)]

    def _block(self, table: pa.Table, first: int, lines: Int64s, rejections: list[Rejection]) -> RawBlock:
        bad = BadRows(self.file.path, lines)
        columns = TableColumn.of(table, self.file.path, self._is_csv, bad)
        labels = {}
        if isinstance(self._source, EventsSource) and self._request.labels:
            assert self.file.outcomes is not None
            labels = labels_of(read_outcomes(self.file.outcomes)[first : first + len(table)], columns, self._source, bad)
        labels |= {name: self._label(name, columns(column), bad) for name, column in self._labels.items()}
        features = {feature.name: raw_column(feature, columns, self._source) for feature in self._request.features}
        extras = {name: columns(name).array for name in self._request.extras}
        rows = first + np.arange(len(table), dtype=np.int64)
        block = RawBlock(self.file, rows, lines, features, extras, labels, None, [*rejections, *bad.found])
        return block.take(bad.good)

    def _label(self, name: str, column: TableColumn, bad: BadRows) -> Any:
        values = numbers_of(column)
        seen = values_at(column.array)
        if name in ("click", "conversion"):
            bad.mark((values != 0) & (values != 1), LABEL, column.name, seen)
            return np.nan_to_num(values).astype(np.uint8)
        if name == "weight":
            bad.mark(~(np.isfinite(values) & (values > 0)), WEIGHT, column.name, seen)
        else:
            bad.mark(~((values >= 0) & (values <= 1)), TRUTH, column.name, seen)
        return values.astype(np.float32)
