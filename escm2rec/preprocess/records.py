"""The common records of Ali-CCP: parsed once into columns on disk, found by index, encoded once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from escm2rec.preprocess.aliccp_columns import AliccpColumns, SideColumns, common_keys, present
from escm2rec.preprocess.aliccp_text import BLOCK_BYTES, Lines, TextBlock, text_blocks
from escm2rec.preprocess.block import RawColumn
from escm2rec.preprocess.ragged import Bools, Int64s, Ragged
from escm2rec.preprocess.rejections import DUPLICATE_COMMON, FIRST_OFFENDERS, Rejection
from escm2rec.preprocess.spill import from_arrow, narrow, one_batch, read_batch, to_arrow, write_batch
from escm2rec.preprocess.spilled import RowsWriter
from escm2rec.schema import Feature

HEADER = 2  # common_feature_index, feature_num
CHUNK_ROWS = 16_384  # records counted or encoded at a time
SPILL_BYTES = 128 << 20  # of raw columns in memory


@dataclass(frozen=True)
class CommonBlock:
    """Consecutive usable records of a common file."""

    keys: Int64s
    lines: Int64s
    spans: Int64s  # [records, 2]: start and end of each line in the file
    columns: SideColumns
    rejections: list[Rejection]


def common_tasks(
    path: Path, columns: AliccpColumns, start: int = 0, stop: int | None = None, row: int = 0
) -> Iterator[Callable[[], CommonBlock]]:
    """One task a block of text, in order; each parses it. `row` is the first one of the range of bytes."""
    for block in text_blocks(path, BLOCK_BYTES, start, stop, row):
        yield _task(block, columns)


def _task(block: TextBlock, columns: AliccpColumns) -> Callable[[], CommonBlock]:
    return lambda: _parse(block, columns)


def _parse(block: TextBlock, columns: AliccpColumns) -> CommonBlock:
    lines = Lines(block, HEADER)
    keys = common_keys(lines, 0)
    side = columns.read(lines)
    good = lines.bad.good
    spans = lines.byte_spans(block.first_byte)
    numbers = lines.bad.lines
    if len(good) < lines.count:
        side = side.take(good)
        keys, numbers, spans = keys[good], numbers[good], spans[good]
    return CommonBlock(keys, numbers, spans, side, lines.bad.found)


class RecordWriter:
    """Writes blocks of records as Arrow files in a folder: `NAME-0.arrow`, ..."""

    def __init__(self, folder: Path, name: str, columns: AliccpColumns) -> None:
        self.files: list[Path] = []
        self._folder, self._name, self._columns = folder, name, columns
        self._waiting: list[dict[str, pa.Array]] = []
        self._bytes = 0

    def add(self, block: CommonBlock) -> None:
        """Take a block; what waits is written when it grows large."""
        columns = to_arrow(self._columns.request.features, block.columns.features)
        columns |= {f"extra.{name}": pa.array(ids) for name, ids in block.columns.extras.items()}
        starts, ends = np.ascontiguousarray(block.spans.T)
        columns |= {
            name: pa.array(numbers) for name, numbers in (("key", block.keys), ("line", block.lines), ("start", starts), ("end", ends))
        }
        self._waiting.append(columns)
        self._bytes += sum(array.nbytes for array in columns.values())
        if self._bytes > SPILL_BYTES:
            self.finish()

    def finish(self) -> list[Path]:
        """Write what waits; all files."""
        if self._waiting:
            batch = one_batch(self._waiting)
            path = self._folder / f"{self._name}-{len(self.files)}.arrow"
            write_batch(path, pa.RecordBatch.from_arrays([narrow(column) for column in batch.columns], names=batch.schema.names))
            self.files.append(path)
            self._waiting, self._bytes = [], 0
        return self.files


@dataclass(frozen=True)
class CommonRecords:
    """Records of one common file by position, and how to find them.

    `held` says which have a value of a feature that is single-valued; `files` hold the raw columns, in the order of the positions.
    """

    keys: Int64s  # sorted
    positions: Int64s  # of the record of each key
    held: dict[str, Bools]
    extras: dict[str, Int64s]
    count: int
    files: tuple[Path, ...]

    def find(self, keys: Int64s) -> Int64s:
        """Position of each key's record, -1 when there is none. Runs of equal keys, as in grouped skeletons, are looked up once."""
        if not len(keys) or not len(self.keys):
            return np.full(len(keys), -1, dtype=np.int64)
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        wanted = keys[begins]
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        found = np.where(self.keys[places] == wanted, self.positions[places], -1)
        return np.repeat(found, np.diff(np.append(begins, len(keys))))

    def raw(self, feature: Feature) -> Iterator[RawColumn]:
        """The raw column of a feature, so many records at a time."""
        for file in self.files:
            batch = read_batch(file)
            for start in range(0, len(batch), CHUNK_ROWS):
                yield from_arrow(feature, batch.slice(start, CHUNK_ROWS))


def index_records(path: Path, files: Sequence[Path], columns: AliccpColumns, folder: Path, name: str) -> Rejection | None:
    """Write `NAME-keys.arrow` and `NAME-held.arrow`, from which `open_records` opens the records of a common file; what was left out.

    Equal repeats of an index are harmless; the first of differing ones stays. Memory: 40 bytes a record.
    """
    batches = [read_batch(file) for file in files]
    keys, lines, starts, ends = (_numbers(batches, column) for column in ("key", "line", "start", "end"))
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    again = np.concatenate([[False], ordered[1:] == ordered[:-1]]) if len(keys) else np.zeros(0, np.bool_)
    rejection = _differing(path, order, again, lines, starts, ends) if again.any() else None
    held = {}
    for feature in columns.request.features:
        if feature.kind in ("categorical", "numeric"):
            held[feature.name] = pa.array(
                np.concatenate([present(from_arrow(feature, batch)) for batch in batches] or [np.zeros(0, np.bool_)])
            )
    held |= {f"extra.{extra}": pa.array(_numbers(batches, f"extra.{extra}")) for extra in columns.extra_fields}
    held["line"] = pa.array(lines)  # a column that is always there: it says how many records there are
    write_batch(folder / f"{name}-held.arrow", pa.RecordBatch.from_arrays(list(held.values()), names=list(held)))
    found = pa.RecordBatch.from_arrays([pa.array(ordered[~again]), pa.array(order[~again])], names=["key", "position"])
    write_batch(folder / f"{name}-keys.arrow", found)
    return rejection


def open_records(folder: Path, name: str, columns: AliccpColumns, files: Sequence[Path]) -> CommonRecords:
    """The records of a common file, read in place."""
    found, held = (read_batch(folder / f"{name}-{what}.arrow") for what in ("keys", "held"))
    return CommonRecords(
        found["key"].to_numpy(),
        found["position"].to_numpy(),
        {
            feature.name: held[feature.name].to_numpy(zero_copy_only=False)
            for feature in columns.request.features
            if feature.kind in ("categorical", "numeric")
        },
        {extra: held[f"extra.{extra}"].to_numpy() for extra in columns.extra_fields},
        len(held),
        tuple(files),
    )


def _numbers(batches: list[pa.RecordBatch], column: str) -> Int64s:
    return np.concatenate([batch[column].to_numpy() for batch in batches] or [np.zeros(0)]).astype(np.int64)


def _differing(path: Path, order: Int64s, again: Any, lines: Int64s, starts: Int64s, ends: Int64s) -> Rejection | None:
    """Repeats that differ from the first record of their index. Compares the text, on disk."""
    heads = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    differing: list[tuple[int, str]] = []
    with path.open("rb") as file:

        def text(record: int) -> bytes:
            file.seek(int(starts[record]))
            return file.read(int(ends[record] - starts[record]))

        for place in np.flatnonzero(again):
            record, head = int(order[place]), int(order[heads[place]])
            if text(record) != text(head):
                differing.append((int(lines[record]), f"the index of row {lines[head]} with other features"))
    if not differing:
        return None
    differing.sort()
    first = differing[:FIRST_OFFENDERS]
    return Rejection(
        DUPLICATE_COMMON, str(path), "common_feature_index", len(differing), [row for row, _ in first], [seen for _, seen in first]
    )


def encode_records(records: Iterable[CommonRecords], feature: Feature, encode: Callable[[RawColumn], Any], stem: Path) -> None:
    """Write the encoded column of a feature, file after file (`spilled.read_rows` reads it in place)."""
    writer = RowsWriter(stem)
    for raw in chain.from_iterable(each.raw(feature) for each in records):
        writer.append(encode(raw))
    writer.finish(encode(_nothing(feature)))


def _nothing(feature: Feature) -> RawColumn:
    if feature.kind == "numeric":
        return np.zeros(0)
    weights = np.zeros(0, np.float32) if feature.kind == "weighted_list" else None
    return Ragged(np.zeros(0, np.int64), np.zeros(1, np.int64), weights)
