"""Parquet and CSV tables with one row an impression."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from escm2rec.config import EventsSource, TableSource
from escm2rec.errors import DataError
from escm2rec.preprocess.aliccp_text import text_blocks
from escm2rec.preprocess.block import RawBlock, Request
from escm2rec.preprocess.digits import MAX_FLOAT32, MIN_FLOAT32, PAD, slices
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.outcomes import impression_columns, labels_of, read_outcomes
from escm2rec.preprocess.ragged import Bytes, Int64s
from escm2rec.preprocess.rejections import COLUMNS, LABEL, NOT_WANTED, TORN, TRUTH, WEIGHT, BadRows, Rejection, values_at
from escm2rec.preprocess.table_columns import TableColumn, numbers_of, raw_column, without_views

CSV_BLOCK_BYTES = 16 << 20
READ_BYTES = 1 << 20  # of a column of a row group at a time
SHOWN_COLUMNS = 20
EVENT_TABLES: tuple[Literal["impressions", "clicks", "conversions"], ...] = ("impressions", "clicks", "conversions")
PROBABILITY = "a probability: write numbers from 0 to 1"
LABEL_VALUES = {
    "click": "a label: write whole numbers, 0 or 1, or booleans",
    "conversion": "a label: write whole numbers, 0 or 1, or booleans",
    "weight": "the weight of a row: write numbers above 0",
    "true_propensity": PROBABILITY,
    "true_cvr": PROBABILITY,
}
"""What to do about a column of labels of another type."""


def not_parquet(path: Path, error: Exception, row_group: int | None = None) -> DataError:
    """What is said of a file that cannot be read as Parquet, or of a row group of it."""
    if row_group is not None:
        return DataError(f"{path}: row group {row_group} is damaged: {error}", "was the copy or the export cut off, or a disk at fault?")
    cut = f"was the copy or the export cut off? it has {path.stat().st_size:,} bytes"
    hint = cut if path.suffix == ".parquet" else "CSV tables must end in .csv"
    return DataError(f"{path} is not a Parquet file, or is damaged: {error}", hint)


class TableFile:
    """One Parquet or CSV file of impressions; those of an event log have their labels in `file.outcomes`."""

    def __init__(self, file: RawFile, source: TableSource | EventsSource, request: Request, block_rows: int) -> None:
        self.file = file
        self._source, self._request, self._block_rows = source, request, block_rows
        self._where = request.where
        self._is_csv = file.path.suffix == ".csv"
        self._labels = self._label_columns() if request.labels else {}

    def _label_columns(self) -> dict[str, str]:
        names = ("click", "conversion", "weight", "true_propensity", "true_cvr")
        named = {name: getattr(self._source, name, None) for name in names}  # an event log has a weight alone
        return {name: column for name, column in named.items() if column is not None}

    def names(self) -> list[str]:
        """The names of all columns."""
        return self._csv_header() if self._is_csv else list(pq.read_schema(self.file.path).names)

    def tasks(self, start: int = 0, stop: int | None = None, first_row: int = 0) -> Iterator[Callable[[], RawBlock]]:
        """One task a batch of rows, in order; each makes its columns. Of the whole file, or of some row groups of a Parquet file and their
        first row, or of some bytes of a CSV and their first line, from 0."""
        row = first_row
        for table, lines, rejections in self.batches(start, stop, first_row):
            yield self._task(table, row, lines, rejections)
            row += len(table)

    def batches(self, start: int = 0, stop: int | None = None, first_row: int = 0) -> Iterator[tuple[pa.Table, Int64s, list[Rejection]]]:
        """The columns that are wanted as they are in the file, the place of each row, and lines that are no rows."""
        if self.file.path.stat().st_size == 0:
            raise DataError(f"{self.file.path} is empty (0 bytes)", "was the copy or the export interrupted?")
        return self._csv_batches(start, stop, first_row) if self._is_csv else self._parquet_batches(start, stop, first_row)

    def _task(self, table: pa.Table, first: int, lines: Int64s, rejections: list[Rejection]) -> Callable[[], RawBlock]:
        return lambda: self._block(table, first, lines, rejections)

    def _wanted(self, available: list[str]) -> list[str]:
        wanted = {feature.column for feature in self._request.features}
        wanted |= {feature.weights_column for feature in self._request.features if feature.weights_column is not None}
        wanted |= {*self._labels.values(), *self._request.extras, *(self._where.columns if self._where is not None else ())}
        if isinstance(self._source, EventsSource) and self._request.labels:
            wanted |= {*impression_columns(self._source)}
        for column in sorted(wanted):
            if available.count(column) > 1:
                raise DataError(f"{self.file.path} has {available.count(column)} columns named {column!r}", "rename all but one")
            if column not in available:
                raise DataError(f"{self.file.path} has no column {column!r} ({self._asked_by(column)})", self._has(column, available))
        return [name for name in available if name in wanted]

    def _asked_by(self, column: str) -> str:
        """What of the config reads a column; `extras` are kept or split by, and in the tables of an event log what joins them."""
        request, source, asked = self._request, self._source, []
        for feature in (*request.features, *request.crosses):
            asked += [f"feature {feature.name!r}"] if feature.column == column or column in (feature.cross or ()) else []
            asked += [f"weights_column of feature {feature.name!r}"] if feature.weights_column == column else []
        asked += [f"data.source.{name}" for name, named in self._labels.items() if named == column]
        if isinstance(source, EventsSource):
            asked += ["data.source.key"] if column in [source.column("key", table) for table in EVENT_TABLES] else []
            asked += ["data.source.time"] if column in [source.column("time", table) for table in EVENT_TABLES] else []
            asked += ["data.source.attribution_key"] if column in source.attribution_key else []
        asked += ["--where"] if self._where is not None and column in self._where.columns else []
        return ", ".join(asked) or "keep or split"

    def _has(self, column: str, available: list[str]) -> str:
        """What there is instead of a column."""
        if not available:
            return "it has no column at all"
        separator = next((each for each in (";", "\t") if each in available[0]), None) if self._is_csv and len(available) == 1 else None
        if separator is not None:
            return f"its header is one column, {available[0][:60]!r}: separate columns by commas, not by {separator!r}"
        near = difflib.get_close_matches(column, available, n=1)
        more = f" and {len(available) - SHOWN_COLUMNS:,} more" if len(available) > SHOWN_COLUMNS else ""
        return f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(name[:40] for name in available[:SHOWN_COLUMNS])}{more}"

    def _parquet_batches(self, start: int, stop: int | None, first_row: int) -> Iterator[tuple[pa.Table, Int64s, list[Rejection]]]:
        try:
            # With pre_buffer the bytes of every row group stay until the file is closed; without a buffer a column's are read all at once.
            with pq.ParquetFile(self.file.path, pre_buffer=False, buffer_size=READ_BYTES) as parquet:
                columns = self._wanted(parquet.schema_arrow.names)
                groups = range(start, parquet.num_row_groups if stop is None else stop)
                if self._where is None:
                    yield from self._row_groups(parquet, groups, columns, first_row)
                else:
                    yield from self._selected_groups(parquet, groups, columns, first_row)
        except (pa.ArrowException, OSError) as error:
            raise not_parquet(self.file.path, error) from error

    def _row_groups(
        self, parquet: pq.ParquetFile, groups: Sequence[int], columns: list[str], first_row: int
    ) -> Iterator[tuple[pa.Table, Int64s, list[Rejection]]]:
        row = first_row + 1
        try:
            for batch in parquet.iter_batches(self._block_rows, row_groups=groups, columns=columns):
                yield pa.Table.from_batches([batch]), np.arange(row, row + len(batch), dtype=np.int64), []
                row += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise not_parquet(self.file.path, error, _damaged_group(parquet, groups, columns)) from error

    def _selected_groups(
        self, parquet: pq.ParquetFile, groups: Sequence[int], columns: list[str], first_row: int
    ) -> Iterator[tuple[pa.Table, Int64s, list[Rejection]]]:
        """The rows that are wanted. Of row groups without any, by their statistics, nothing is read."""
        assert self._where is not None
        may_hold = set(self._where.row_groups(self.file.path, parquet.schema_arrow))
        for group in groups:
            rows = parquet.metadata.row_group(group).num_rows
            if group in may_hold:
                yield from map(self._selected, self._row_groups(parquet, [group], columns, first_row))
            else:
                yield _no_rows(parquet, columns), np.empty(0, np.int64), [_left_out(self.file.path, rows)]
            first_row += rows

    def _selected(self, batch: tuple[pa.Table, Int64s, list[Rejection]]) -> tuple[pa.Table, Int64s, list[Rejection]]:
        """The rows of a batch that are wanted."""
        table, lines, rejections = batch
        if self._where is None:
            return batch
        table = pa.table({name: without_views(table[name]) for name in table.column_names})
        places = self._where.places(table, self.file.path)
        if len(places) == len(table):
            return table, lines, rejections
        mask = np.zeros(len(table), np.bool_)
        mask[places] = True
        return table.filter(pa.array(mask)), lines[places], [*rejections, _left_out(self.file.path, len(table) - len(places))]

    def _csv_batches(self, start: int, stop: int | None, first_line: int) -> Iterator[tuple[pa.Table, Int64s, list[Rejection]]]:
        header = self._csv_header()
        wanted = self._wanted(header)
        for block in text_blocks(self.file.path, CSV_BLOCK_BYTES, start, stop, first_line):
            text = block.buffer[PAD:-PAD]
            bad = BadRows(self.file.path, block.first_line + 1 + np.arange(block.lines, dtype=np.int64))
            if block.first_line == 0:
                end = int(np.argmax(text == ord("\n"))) + 1
                text, bad = text[end:], BadRows(self.file.path, bad.lines[1:])
            if len(text):
                yield self._selected(self._csv_table(text, header, wanted, bad))

    def _csv_header(self) -> list[str]:
        """The names in the first line."""
        path = self.file.path
        with path.open("rb") as file:
            line = file.readline(CSV_BLOCK_BYTES)
        if len(line) == CSV_BLOCK_BYTES:
            raise DataError(f"{path} is not a CSV table: its first line has more than {CSV_BLOCK_BYTES >> 20} MiB", "is it text at all?")
        line = line.rstrip(b"\r\n")
        if b"\r" in line:
            raise DataError(f"{path}: row 1: expected lines that end in LF or CRLF, found a CR", "write the table with LF line ends")
        self._check_utf8(np.frombuffer(line, dtype=np.uint8), np.ones(1, dtype=np.int64))
        try:
            names: list[str] = pa_csv.read_csv(pa.BufferReader(line + b"\n")).column_names
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is not a CSV table: {error}", "a header line and comma-separated columns are expected") from error
        return names

    def _csv_table(self, text: Bytes, header: list[str], wanted: list[str], bad: BadRows) -> tuple[pa.Table, Int64s, list[Rejection]]:
        """The rows of whole lines, their line numbers, and what became of the other lines: a row is one line, a blank line is none."""
        table, skipped = self._parsed(text, header, wanted, bad.lines)
        at = np.arange(len(bad.lines))  # of the lines that are parsed
        if len(table) + len(skipped) != len(at):  # rare
            text, at = _without_blank_lines(text)
            table, skipped = self._parsed(text, header, wanted, bad.lines[at])
        if len(table) + len(skipped) != len(at) or _has_lone_cr(text):
            # A quoted cell goes on in the next line, or a CR ends a row: both at once would even out.
            text, at = _without_torn_lines(text, at, bad)
            table, skipped = self._parsed(text, header, wanted, bad.lines[at])
        if len(table) + len(skipped) != len(at):
            raise DataError(
                f"{self.file.path}: rows {bad.lines[0]} to {bad.lines[-1]}: expected {TORN.expected}, found other quotes and line ends",
                "mend them, or write the table as Parquet",
            )
        if skipped:
            faults = {int(at[place]): fault for place, fault in skipped}
            where = np.zeros(len(bad.lines), dtype=np.bool_)
            where[list(faults)] = True
            bad.mark(where, COLUMNS, "", lambda rows: [faults[row] for row in rows.tolist()])
            at = np.delete(at, [place for place, _ in skipped])
        return table, bad.lines[at], bad.found

    def _parsed(self, text: Bytes, header: list[str], wanted: list[str], numbers: Int64s) -> tuple[pa.Table, list[tuple[int, str]]]:
        """The wanted columns, and place and fault of the lines with a wrong number of columns."""
        if not len(text):
            return pa.table({name: pa.array([], pa.string()) for name in wanted}), []
        skipped: list[tuple[int, str]] = []

        def invalid(row: pa_csv.InvalidRow) -> str:
            fault = f"{row.actual_columns} columns instead of {row.expected_columns} in {row.text[:60]!r}"
            skipped.append((row.number - 1, fault))
            return "skip"

        try:
            table = pa_csv.read_csv(
                pa.BufferReader(pa.py_buffer(text)),
                pa_csv.ReadOptions(use_threads=False, block_size=len(text) + 1, column_names=header),
                pa_csv.ParseOptions(invalid_row_handler=invalid),
                pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted, null_values=[""], strings_can_be_null=True
                ),
            )
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            self._check_utf8(text, numbers)
            raise DataError(
                f"{self.file.path}: rows {numbers[0]} to {numbers[-1]}: expected comma-separated columns, found: {error}",
                "a header line and comma-separated columns are expected",
            ) from error
        return table, skipped

    def _check_utf8(self, text: Bytes, numbers: Int64s) -> None:
        """DataError at the first of these lines that is no UTF-8, if there is one."""
        raw = text.tobytes()
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start)
            seen = raw.split(b"\n")[line].decode("latin-1")
            raise DataError(
                f"{self.file.path}: row {numbers[line]}: expected text in UTF-8, found {seen[:80]!r} (read as Latin-1)",
                "convert the file to UTF-8; is it compressed, or no text at all?",
            ) from error

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
        # Lines of a CSV that are no rows count too, so that a row's place does not depend on where the file was cut.
        rows = lines - 2 if self._is_csv else lines - 1
        block = RawBlock(self.file, rows, lines, features, extras, labels, None, [*rejections, *bad.found])
        return block.take(bad.good)

    def _label(self, name: str, column: TableColumn, bad: BadRows) -> Any:
        values = numbers_of(column, f"data.source.{name} is {LABEL_VALUES[name]}")
        seen = values_at(column.array)
        if name in ("click", "conversion"):
            bad.mark((values != 0) & (values != 1), LABEL, column.name, seen)
            return np.nan_to_num(values).astype(np.uint8)
        if name == "weight":
            good, reason = (values >= MIN_FLOAT32) & (values <= MAX_FLOAT32), WEIGHT
        else:
            good, reason = (values >= 0) & (values <= 1), TRUTH
        bad.mark(~good, reason, column.name, seen)
        return np.where(good, values, 1).astype(np.float32)


def _damaged_group(parquet: pq.ParquetFile, groups: Sequence[int], columns: list[str]) -> int | None:
    """The first of these row groups that cannot be read, once one could not: batches go over the ends of groups."""
    for group in groups:
        try:
            for _ in parquet.iter_batches(row_groups=[group], columns=columns):
                pass
        except (pa.ArrowException, OSError):
            return group
    return None


def _no_rows(parquet: pq.ParquetFile, columns: list[str]) -> pa.Table:
    return pa.schema([parquet.schema_arrow.field(name) for name in columns]).empty_table()


def _left_out(path: Path, rows: int) -> Rejection:
    """Rows that --where does not select."""
    return Rejection(NOT_WANTED, str(path), "", rows, [], [])


def _lines_of(text: Bytes) -> tuple[Int64s, Int64s]:
    """Start of each line, and where the next one starts."""
    ends = np.flatnonzero(text == ord("\n")) + 1
    return np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]), ends


def _has_lone_cr(text: Bytes) -> bool:
    """Whether a CR is not before a LF."""
    at = np.flatnonzero(text == ord("\r"))  # a text ends with LF
    return bool((text[at + 1] != ord("\n")).any())


def _without_blank_lines(text: Bytes) -> tuple[Bytes, Int64s]:
    """The other lines, and their places."""
    starts, ends = _lines_of(text)
    lengths = ends - starts
    held = (lengths > 2) | ((lengths == 2) & (text[starts] != ord("\r")))
    return text[np.repeat(held, lengths)], np.flatnonzero(held)


def _without_torn_lines(text: Bytes, at: Int64s, bad: BadRows) -> tuple[Bytes, Int64s]:
    """The text without the lines whose quotes do not pair or that a CR cuts, which are marked bad, and the places of the others."""
    starts, ends = _lines_of(text)
    cuts = (text == ord("\r")) & (np.append(text[1:], ord("\n")) != ord("\n"))
    torn = np.add.reduceat((text == ord('"')).astype(np.int64), starts) % 2 == 1
    torn |= np.add.reduceat(cuts.astype(np.int64), starts) > 0
    where = np.zeros(len(bad.lines), dtype=np.bool_)
    where[at[torn]] = True

    def seen(rows: Int64s) -> list[str]:
        places = np.searchsorted(at, rows)
        return [repr(line) for line in slices(text, starts[places], ends[places] - 1).to_pylist()]

    bad.mark(where, TORN, "", seen)
    return text[np.repeat(~torn, ends - starts)], at[~torn]
