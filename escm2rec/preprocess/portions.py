"""Raw files cut into portions: what one step of preprocess reads at a time, on any worker."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from escm2rec.config import AliccpSource, MatrixSource, Source
from escm2rec.errors import DataError
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.matrix import shape_of
from escm2rec.preprocess.tables import not_parquet

PORTION_BYTES = 64 << 20  # of text, or of Parquet as it is decoded: docs/decisions/0009
LEAST_BYTES = 4 << 20
TURN = 8  # portions at least, if they are not smaller than that: equal shares for processes, of a small input too
READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Range:
    """Consecutive rows of one file: from byte `start` to before `stop` of a text, the same in row groups of a Parquet table.

    A matrix and a CSV of an event log are one range. `rows` is how many rows there are at most, `bytes` a measure of the work.
    """

    file: RawFile
    start: int
    stop: int
    first_row: int
    rows: int
    bytes: int


Portion = tuple[Range, ...]


def portion_bytes(files: Iterable[RawFile]) -> int:
    """About how much a portion of these files is to hold; of the files alone, so that it is the same on any workers."""
    size = sum(path.stat().st_size for file in files for path in file.all_paths)
    return min(PORTION_BYTES, max(LEAST_BYTES, size // TURN))


def portions_of(ranges: Iterable[Range], limit: int) -> list[Portion]:
    """Consecutive ranges together, up to `limit` bytes; a larger one is alone."""
    portions: list[Portion] = []
    waiting: list[Range] = []
    size = 0
    for each in ranges:
        if waiting and size + each.bytes > limit:
            portions.append(tuple(waiting))
            waiting, size = [], 0
        waiting.append(each)
        size += each.bytes
    return [*portions, tuple(waiting)] if waiting else portions


def text_cuts(path: Path, limit: int) -> list[tuple[int, int]]:
    """The bytes of a text in ranges of whole lines, each of about `limit` bytes."""
    size = os.path.getsize(path)
    cuts = [0]
    with path.open("rb") as file:
        for place in range(limit, size, limit):
            file.seek(place - 1)  # a line may begin right there
            while piece := file.readline(READ_BYTES):
                if piece.endswith(b"\n"):
                    break
            if cuts[-1] < file.tell() < size:
                cuts.append(file.tell())
    cuts.append(size)
    return list(pairwise(cuts))


def count_lines(cut: tuple[Path, int, int]) -> int:
    """Lines in a range of bytes, one without newline at the end included."""
    path, start, stop = cut
    lines, last = 0, b""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop and (text := file.read(min(READ_BYTES, stop - start))):
            lines += int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord("\n")))
            start, last = start + len(text), text[-1:]
    return lines + (last not in (b"", b"\n"))


def text_ranges(file: RawFile, cuts: list[tuple[int, int]], lines: Iterator[int]) -> list[Range]:
    """The ranges of a text, given the lines in each."""
    ranges, row = [], 0
    for start, stop in cuts:
        count = next(lines)
        ranges.append(Range(file, start, stop, row, count, stop - start))
        row += count
    return ranges


def other_ranges(source: Source, file: RawFile, limit: int) -> list[Range]:
    """The ranges of a Parquet table, of up to `limit` bytes, of a matrix, or of the impressions of an event log."""
    assert not isinstance(source, AliccpSource)
    size = file.path.stat().st_size
    if isinstance(source, MatrixSource):
        shape = shape_of(file.path, must_be_rated=True)
        return [Range(file, 0, 1, 0, shape.users * shape.items, size)]
    if size == 0:
        raise DataError(f"{file.path} is empty (0 bytes)", "was the copy or the export interrupted?")
    if file.path.suffix == ".csv":  # an event log's: its outcomes are by row, not by line
        return [Range(file, 0, size, 0, count_lines((file.path, 0, size)), size)]
    try:
        metadata = pq.read_metadata(file.path)
    except (pa.ArrowException, OSError) as error:
        raise not_parquet(file.path, error) from error
    ranges: list[Range] = []
    first = row = 0
    for group in range(metadata.num_row_groups):
        done = group + 1 == metadata.num_row_groups
        rows, size = (
            sum(getattr(metadata.row_group(each), name) for each in range(first, group + 1)) for name in ("num_rows", "total_byte_size")
        )
        if done or size + metadata.row_group(group + 1).total_byte_size > limit:
            ranges.append(Range(file, first, group + 1, row, rows, size))
            first, row = group + 1, row + rows
    return ranges or [Range(file, 0, 0, 0, 0, 0)]
