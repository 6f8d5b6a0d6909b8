"""Which split each row belongs to."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from escm2rec.config import SPLITS, ColumnSplit, FileSplit, HashSplit, Split, TimeSplit, moment
from escm2rec.errors import ConfigError, DataError
from escm2rec.preprocess.block import RawBlock
from escm2rec.preprocess.digits import parse_decimals
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.ragged import Bools, Int64s
from escm2rec.preprocess.rejections import plain, values_at
from escm2rec.preprocess.stable_hash import hash64, row_hash, split_points
from escm2rec.preprocess.times import MICROSECONDS, TEXT_TIMES, is_number, is_text, iso_text, microseconds

NO_SPLIT = -1
TRAIN, VALIDATION, TEST = 0, 1, 2
FEW = 5  # values that are shown
YEAR_1971 = moment("1971-01-01")
AnySplit = FileSplit | ColumnSplit | HashSplit | TimeSplit
Numbers = npt.NDArray[np.int8]


def split_column(split: AnySplit) -> str | None:
    """The raw column that the split reads, if any."""
    return None if isinstance(split, FileSplit) else split.column


def asked_splits(split: AnySplit) -> list[Split]:
    """Which of validation and test a config gives rows to."""
    asks: dict[Split, tuple[str, ...]] = {
        "validation": ("validation", "validation_share", "validation_from"),
        "test": ("test", "test_from"),
    }
    return [name for name, keys in asks.items() if any(getattr(split, key, None) for key in keys)]


@dataclass
class Seen:
    """What the rows of one portion, or of a whole input, hold in the column that they are split by; as JSON by `asdict`.

    compared    how many have a time or number that the boundaries of a split by time can be compared with
    fault       message and hint on the first block with values none of which could be, which is an error where none of the input is
    least, most of the times or numbers that could be compared, as they are and as people read them
    named       the values of a split by column that there are
    strays      the first few values of rows that belong to no split, and where each comes first; of a split by file the files
    """

    compared: int = 0
    fault: tuple[str, str] | None = None
    least: tuple[float, str] | None = None
    most: tuple[float, str] | None = None
    named: list[str] = field(default_factory=list)
    strays: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_all(cls, portions: Iterable[dict[str, Any]]) -> Self:
        """What these portions saw together, in their order."""
        whole = cls()
        for portion in portions:
            whole.compared += portion["compared"]
            whole.fault = whole.fault or portion["fault"]
            whole.add_range(portion["least"], portion["most"])
            whole.named = list(dict.fromkeys([*whole.named, *portion["named"]]))
            whole.add_strays(portion["strays"])
        return whole

    def add_range(self, least: tuple[float, str] | None, most: tuple[float, str] | None) -> None:
        """Take these in."""
        self.least = min((each for each in (self.least, least) if each is not None), key=lambda each: each[0], default=None)
        self.most = max((each for each in (self.most, most) if each is not None), key=lambda each: each[0], default=None)

    def told(self, split: AnySplit) -> str:
        """What the column of a split by column or time holds, as people read it; nothing of another split, or of nulls."""
        if isinstance(split, TimeSplit) and self.least is not None and self.most is not None:
            return f"column {split.column!r} goes from {self.least[1]} to {self.most[1]}"
        values = [*map(repr, self.named[:FEW]), *self.strays]
        return f"column {split.column!r} has {', '.join(values)}" if isinstance(split, ColumnSplit) and values else ""

    def add_strays(self, strays: dict[str, str]) -> None:
        """Keep those that come first."""
        new = {value: place for value, place in strays.items() if value not in self.strays}
        self.strays |= dict(list(new.items())[: FEW - len(self.strays)])

    def refuse_what_cannot_be_compared(self) -> None:
        """DataError where there are values, and none of a split by time could be compared; single ones belong to no split."""
        if self.fault is not None and not self.compared:
            raise DataError(*self.fault)


class Splitter:
    """Splits the rows of one portion, block by block; `seen` says what they hold."""

    def __init__(self, split: AnySplit) -> None:
        self.seen = Seen()
        self._split = split

    def numbers(self, block: RawBlock) -> Numbers:
        """Position in SPLITS of each row's split, -1 for none.

        Hash: splitmix64(base ^ fnv1a64(salt)) as a number in [0, 1), cut by the shares in order; base is the hash of the column's value, or
        of file name and row. A null in the column belongs to no split. `validation_share` takes its rows of training files the same way,
        without a salt. Time: train before validation_from, validation before test_from, test from there on; what has no time belongs to no
        split.
        """
        split, seen = self._split, self.seen
        if isinstance(split, FileSplit):
            numbers = _by_file(split, block)
        elif isinstance(split, ColumnSplit):
            numbers = _by_column(split, block, seen)
        else:
            numbers = _by_time(split, block, seen) if isinstance(split, TimeSplit) else _by_hash(split, block)
        left_out = np.flatnonzero(numbers == NO_SPLIT)
        if len(left_out) and len(seen.strays) < FEW:
            seen.add_strays(_strays(split_column(split), block, left_out))
        return numbers


def _by_file(split: FileSplit, block: RawBlock) -> Numbers:
    number = _number_of(split, block.file)
    numbers = np.full(len(block), number, dtype=np.int8)
    if number == TRAIN and split.validation_share:
        points = split_points(row_hash(block.file.name, block.rows), salt="")
        numbers[points < split.validation_share] = VALIDATION
    return numbers


def _by_column(split: ColumnSplit, block: RawBlock, seen: Seen) -> Numbers:
    names = [name for value in SPLITS for name in getattr(split, value)]
    places = pc.index_in(_cast(block, split.column, pa.string()), pa.array(names, pa.string()))
    found = pc.fill_null(places, -1).to_numpy(zero_copy_only=False)
    seen.named = list(dict.fromkeys([*seen.named, *(names[place] for place in np.unique(found) if place >= 0)]))
    of_each = [SPLITS.index(value) for value in SPLITS for _ in getattr(split, value)]
    numbers: Numbers = np.array([*of_each, NO_SPLIT], dtype=np.int8)[found]  # -1 is the last
    return numbers


def _strays(column: str | None, block: RawBlock, rows: Int64s) -> dict[str, str]:
    """The first different values of these rows, and where each is."""
    if column is None:
        return {str(block.file.path): ""}
    array = block.extras[column]
    codes = array.take(pa.array(rows)).dictionary_encode(null_encoding="encode").indices.to_numpy()
    first = rows[np.sort(np.unique(codes, return_index=True)[1])[:FEW]]
    values = values_at(array)(first)
    return {value[:80]: f"{block.file.path}: row {line}" for value, line in zip(values, block.lines[first], strict=True)}


def refuse_doubled_files(split: AnySplit, files: Iterable[RawFile]) -> None:
    """ConfigError at the first file that more than one pattern of a split by file takes."""
    if not isinstance(split, FileSplit):
        return
    for file in files:
        patterns = [(name, getattr(split, name)) for name in SPLITS if fnmatch.fnmatchcase(file.name, getattr(split, name))]
        if len(patterns) > 1:
            told = " and ".join(f"{name} {pattern!r}" for name, pattern in patterns)
            raise ConfigError(
                f"{file.path} belongs to one split, and matches {len(patterns)} patterns of data.split: {told}",
                "give patterns of which each file matches one, such as train*.parquet and test*.parquet",
            )


def _number_of(split: FileSplit, file: RawFile) -> int:
    for number, name in enumerate(SPLITS):
        if fnmatch.fnmatchcase(file.name, getattr(split, name)):
            return number
    return NO_SPLIT


def _cast(block: RawBlock, column: str, kind: pa.DataType) -> pa.Array:
    """A column to split by; DataError where its values have no such form."""
    array = block.extras[column]
    try:
        return array.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"{block.file.path}: column {column!r} of type {array.type} cannot split: {error}", "split by a column of whole numbers or text"
        ) from error


def _by_hash(split: HashSplit, block: RawBlock) -> Numbers:
    if split.column is None:
        base = row_hash(block.file.name, block.rows)
        held: Any = np.ones(len(block), dtype=np.bool_)
    else:
        array = block.extras[split.column]
        held = array.is_valid().to_numpy(zero_copy_only=False)
        if pa.types.is_integer(array.type):
            base = hash64(pc.fill_null(_cast(block, split.column, pa.int64()), 0).to_numpy(zero_copy_only=False))
        else:
            base = hash64(pc.fill_null(_cast(block, split.column, pa.large_string()), ""))
    edges = np.cumsum([split.train, split.validation])
    edges[edges > 1 - 1e-9] = 2.0  # rounding must not leave a sliver to a split whose share is 0
    numbers = np.searchsorted(edges, split_points(base, split.salt), side="right").astype(np.int8)
    return np.where(held, numbers, np.int8(NO_SPLIT))


def _by_time(split: TimeSplit, block: RawBlock, seen: Seen) -> Numbers:
    array = block.extras[split.column]
    edges = [moment(edge) for edge in (split.validation_from, split.test_from) if edge is not None]
    fault, as_numbers = None, False
    if isinstance(split.test_from, str):
        times, held = _times(split, block)
        if is_number(array.type) or is_text(array.type):
            plausible: Bools = held & (times >= YEAR_1971)
            fault = None if plausible.any() else _no_time(split, block, times, held)
            held = plausible
    elif is_number(array.type) or is_text(array.type):
        (times, held), as_numbers = _plain_numbers(array), True
        if is_text(array.type) and not held.any():
            fault = _no_number(split, block)
    else:
        times, held = _times(split, block)
        edges = [edge * MICROSECONDS[split.unit] for edge in edges]
    seen.compared += int(held.sum())
    seen.fault = seen.fault or fault
    if held.any():
        text = _number_text if as_numbers else iso_text
        ends = [times[held].min().item(), times[held].max().item()]
        seen.add_range(*[(end, text(end)) for end in ends])
    numbers = np.searchsorted(edges, times, side="right").astype(np.int8)
    if len(edges) == 1:
        numbers *= TEST
    return np.where(held, numbers, np.int8(NO_SPLIT))


def _times(split: TimeSplit, block: RawBlock) -> tuple[Int64s, Bools]:
    try:
        return microseconds(block.extras[split.column], split.unit)
    except TypeError as error:
        raise DataError(
            f"{block.file.path}: column {split.column!r} cannot split by time: {error}", "set data.split.column to a column of times"
        ) from error


def _number_text(number: float) -> str:
    return f"{number:.15g}" if isinstance(number, float) else str(number)


def _plain_numbers(array: pa.Array) -> tuple[Any, Bools]:
    """Numbers as they are, and which there are."""
    if is_text(array.type):
        floats = parse_decimals(array)
        return floats, np.isfinite(floats)
    held = array.is_valid().to_numpy(zero_copy_only=False)
    whole = array.cast(pa.float64()) if pa.types.is_decimal(array.type) else array
    numbers = pc.fill_null(whole, pa.scalar(0).cast(whole.type)).to_numpy(zero_copy_only=False)
    return numbers, held & np.isfinite(numbers)


def _no_time(split: TimeSplit, block: RawBlock, times: Int64s, held: Bools) -> tuple[str, str] | None:
    """On a block without a time of a log: a number before 1971 stands for none, or counts something else than `unit`. None where all is
    null."""
    first = _first(split, block)
    if first is None:
        return None
    row, place, seen = first
    if isinstance(seen, str | bytes) and not held[row]:
        return f"{place}: no row has a time: expected timestamps, numbers or ISO text, found {seen!r}", TEXT_TIMES
    read = f", read as {iso_text(int(times[row]))}" if held[row] else ""
    return (
        f"{place}: no row has a time from 1971 to 2200 by data.split.unit {split.unit!r}: found {seen!r}{read}",
        "set data.split.unit to what the numbers count, or give test_from as such a number",
    )


def _no_number(split: TimeSplit, block: RawBlock) -> tuple[str, str] | None:
    """On a block of texts none of which is a number, where all are to be compared with one. None where all is null."""
    first = _first(split, block)
    if first is None:
        return None
    return (
        f"{first.place}: no row has a number to compare with data.split.test_from {split.test_from}: found {first.seen!r}",
        f"give test_from (and validation_from) as an ISO date, such as '2026-01-31', and {TEXT_TIMES}",
    )


class _First(NamedTuple):
    """The first row of a block that has a value to split by."""

    row: int
    place: str
    seen: Any


def _first(split: TimeSplit, block: RawBlock) -> _First | None:
    valid = np.flatnonzero(block.extras[split.column].is_valid().to_numpy(zero_copy_only=False))
    if not len(valid):
        return None
    row = int(valid[0])
    return _First(row, f"{block.file.path}: row {block.lines[row]}, column {split.column}", plain(block.extras[split.column][row]))
