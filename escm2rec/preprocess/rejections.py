"""Rows that cannot be used: refused with their place, or left out and counted by reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from escm2rec.errors import DataError
from escm2rec.preprocess.ragged import Bools, Int64s
from escm2rec.preprocess.times import TEXT_TIMES, is_text

FIRST_OFFENDERS = 5


@dataclass(frozen=True)
class Reason:
    """Why a row cannot be used: its name in the manifest, what was expected, and what to do.

    A row of an `only_counted` reason is not wrong, and never refused.
    """

    name: str
    expected: str
    hint: str = "mend the input, or set data.bad_rows to count to leave such rows out"
    only_counted: bool = False


MALFORMED = Reason("malformed line", "comma-separated columns, then field\\x02id\\x03value joined by \\x01")
TRUNCATED = Reason(
    "truncated line", "a line that ends with a newline", "the file was cut off: fetch it again, or set data.bad_rows to count"
)
FEATURE_NUM = Reason("feature_num", "the number of features in the list")
LABEL = Reason("label", "0 or 1")
IDENTIFIER = Reason("id", "a whole number from 0 to 9223372036854775807")
INT64 = Reason("id", "a whole number that fits int64")
NUMBER = Reason("number", "a number that fits float32 (above -1 with log1p)")
COMMON_INDEX = Reason("common_feature_index", "16 hexadecimal digits in lower case")
MISSING_COMMON = Reason("missing common record", "an index that the common file holds", "are skeleton and common file of the same set?")
DUPLICATE_COMMON = Reason("duplicate common record", "one record for each index, or equal ones")
SEVERAL = Reason("several values", "at most one value", "declare the feature with kind: list or weighted_list")
UNEQUAL = Reason("unequal lists", "as many weights as values")
NULL_IN_LIST = Reason("null in a list", "values and weights without null")
PAIR = Reason("weighted value", "a value, the weight separator, and a weight that fits float32")
TRUTH = Reason("truth", "a probability from 0 to 1")
WEIGHT = Reason("weight", "a finite number above 0 that fits float32")
RATING = Reason("rating", "a number from 0, 0 where there is no rating")
RATED_TWICE = Reason("rated in train and test", "a test rating of a pair that is not in the training matrix", only_counted=True)
COLUMNS = Reason("number of columns", "as many columns as the header names")
TEXT = Reason("text", "text in UTF-8")
TORN = Reason("torn line", "one row a line: quotes that close in it, and no CR inside")
CONVERSION = Reason(
    "conversion without click",
    "no conversion where click is 0",
    "set data.conversion_without_click: drop leaves such rows out, click keeps them as clicks",
)
EVENT_KEY = Reason("event without key", "an event key that is not null, and text in UTF-8 if it is text")
EVENT_TIME = Reason(
    "event time",
    "a time from 1740 to 2200: a number, a timestamp, or ISO text",
    f"{TEXT_TIMES}; numbers count data.source.time_unit since 1970; data.bad_rows: count leaves such rows out",
)
REPEATED = Reason("repeated impression", "one row an impression key", only_counted=True)  # equal rows: sent again, nothing is lost
DIFFERING = Reason(
    "impression with the key of another",
    "one row an impression key, or equal ones",
    "mend the input, or set data.bad_rows to count to keep the first of them",
)
OPEN_WINDOW = Reason("open window", "windows that end before the log does", only_counted=True)
NOT_WANTED = Reason("not selected", "a row that --where selects", only_counted=True)
NO_SPLIT = Reason("no split", "a row that belongs to train, validation or test")


@dataclass(frozen=True)
class Rejection:
    """Rows of one file with one problem."""

    reason: Reason
    file: str
    column: str
    count: int
    lines: list[int]
    seen: list[str]

    def error(self) -> DataError:
        """The first of these rows as an error."""
        column = f", column {self.column}" if self.column else ""
        return DataError(
            f"{self.file}: row {self.lines[0]}{column}: {self.reason.name}: expected {self.reason.expected}, found {self.seen[0]}",
            self.reason.hint,
        )


class BadRows:
    """Marks the rows of one block that cannot be used; each row counts once, for its first problem."""

    def __init__(self, file: Path, lines: Int64s) -> None:
        self.file = str(file)
        self.lines = lines
        self.mask: Bools = np.zeros(len(lines), dtype=np.bool_)
        self.found: list[Rejection] = []

    def mark(self, where: Bools, reason: Reason, column: str, seen: Callable[[Int64s], list[str]]) -> None:
        """Mark the rows where `where` holds; `seen` gives the offending text of rows by position in the block."""
        if not where.any():  # as a rule
            return
        rows = np.flatnonzero(where & ~self.mask)
        if not len(rows):
            return
        self.mask[rows] = True
        first = rows[:FIRST_OFFENDERS]
        texts = [text if len(text) <= 80 else text[:77] + "..." for text in seen(first)]
        self.found.append(Rejection(reason, self.file, column, len(rows), self.lines[first].tolist(), texts))

    @property
    def good(self) -> Int64s:
        """Positions of the rows without a problem."""
        return np.flatnonzero(~self.mask)


def values_at(values: Any) -> Callable[[Int64s], list[str]]:
    """`seen` for BadRows.mark from a numpy or Arrow column with one value a row."""

    def seen(rows: Int64s) -> list[str]:
        picked = values[rows].tolist() if isinstance(values, np.ndarray) else [plain(value) for value in values.take(rows)]
        return [repr(value) if isinstance(value, str) else "null" if value is None else str(value) for value in picked]

    return seen


def plain(value: pa.Scalar) -> Any:
    """A value for Python; of a time that it has none for the number in the file, of text that is no UTF-8 the bytes."""
    try:
        return value.as_py()
    except (OverflowError, ValueError):
        if pa.types.is_temporal(value.type):
            return value.value
        return value.as_buffer().to_pybytes() if is_text(value.type) else value.type


@dataclass
class Rejected:
    """What a whole job left out, for the manifest. Refuses at the first rejection unless told to count."""

    refuse: bool
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """How many so far."""
        return sum(int(entry["rows"]) for entry in self.reasons.values())

    def add(self, rejections: list[Rejection], refusals: Sequence[Rejection] = ()) -> None:
        """Count the rejections; raise DataError for the lowest row of the refusals, and of the rejections when refusing."""
        fatal = [*refusals, *(each for each in rejections if self.refuse and not each.reason.only_counted)]
        if fatal:
            raise min(fatal, key=lambda rejection: rejection.lines[0]).error()
        for rejection in rejections:
            self.count(rejection)

    def merge(self, reasons: dict[str, dict[str, Any]]) -> None:
        """Add the `reasons` of another part of the job, which comes after this one."""
        for name, other in reasons.items():
            entry = self.reasons.setdefault(name, {"rows": 0, "first": []})
            entry["rows"] += other["rows"]
            entry["first"] += other["first"][: FIRST_OFFENDERS - len(entry["first"])]

    def count(self, rejection: Rejection) -> None:
        """Count these without refusing."""
        entry = self.reasons.setdefault(rejection.reason.name, {"rows": 0, "first": []})
        entry["rows"] += rejection.count
        for line, seen in zip(rejection.lines, rejection.seen, strict=True):
            if len(entry["first"]) < FIRST_OFFENDERS:
                entry["first"].append({"file": rejection.file, "row": line, "column": rejection.column, "value": seen})
