"""Columns of rating matrices: the id of each user or item, and what its row of a feature file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from escm2rec.errors import DataError
from escm2rec.preprocess.block import RawColumn
from escm2rec.preprocess.digits import MAX_FLOAT32, parse_decimals
from escm2rec.preprocess.ragged import Array, Bools, Float64s, Ragged, offsets_of
from escm2rec.preprocess.transforms import clipped, cut
from escm2rec.schema import Feature


class SideColumns:
    """Raw columns with a row for each user, or each item, of a matrix (`name`), read whole from its feature file if there is one.

    user             the id, from 1
    user_features    with a file: the columns of the user's row that are not 0, from 1, and their numbers as weights
    user_feature_2   with a file: the number in column 2
    """

    def __init__(self, name: Literal["user", "item"], path: Path | None, rows: int) -> None:
        self.name, self.path, self._rows = name, path, rows
        self._numbers = np.empty((rows, 0)) if path is None else _read(path, rows, name)
        self._single = {f"{name}_feature_{column + 1}": column for column in range(self._numbers.shape[1])}

    @property
    def names(self) -> list[str]:
        """The columns that there are."""
        return [self.name, *([] if self.path is None else [f"{self.name}_features"]), *self._single]

    def feature(self, feature: Feature) -> RawColumn:
        """The column of a feature; DataError where its kind does not fit."""
        if feature.column == self.name:
            self._check_kind(feature, ("categorical",))
            return _one_each(np.arange(1, self._rows + 1, dtype=np.int64))
        if feature.column == f"{self.name}_features":
            self._check_kind(feature, ("list", "weighted_list"))
            rows, columns = np.nonzero(self._numbers)
            weights = self._numbers[rows, columns] if feature.kind == "weighted_list" else None
            return cut(feature, Ragged(columns + 1, offsets_of(np.bincount(rows, minlength=self._rows)), weights))
        self._check_kind(feature, ("numeric", "categorical"))
        numbers = self._numbers[:, self._single[feature.column]]
        if feature.kind == "numeric":
            numbers = clipped(feature, numbers)
            self._check(feature, (numbers > -1) | (not feature.log1p), numbers, "a number above -1, for log1p")
            return numbers
        self._check(feature, numbers == np.trunc(numbers), numbers, "a whole number, for kind categorical")
        return _one_each(numbers.astype(np.int64))

    def extra(self, name: str) -> pa.Array:
        """A single-valued column, to be kept; whole numbers as int64."""
        if name == self.name:
            return pa.array(np.arange(1, self._rows + 1, dtype=np.int64))
        if name not in self._single:
            raise DataError(f"column {name!r} holds a whole row, it cannot be kept", f"name single columns, {name[:-1]}_1 and so on")
        numbers = self._numbers[:, self._single[name]]
        return pa.array(numbers.astype(np.int64) if (numbers == np.trunc(numbers)).all() else numbers)

    def _check_kind(self, feature: Feature, kinds: tuple[str, ...]) -> None:
        if feature.kind not in kinds:
            raise DataError(
                f"feature {feature.name!r} of kind {feature.kind} cannot be read from column {feature.column!r}",
                f"that column takes kind {' or '.join(kinds)}",
            )

    def _check(self, feature: Feature, good: Bools, numbers: Float64s, expected: str) -> None:
        wrong = np.flatnonzero(~good)
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{self.path}: row {row + 1}, column {self._single[feature.column] + 1}: expected {expected}, found {numbers[row]:g}",
                f"mend the file, or the feature {feature.name!r}",
            )


def open_text(path: Path) -> TextIO:
    """Opened as text; bytes that are no UTF-8 become characters that are no number."""
    return path.open(encoding="utf-8-sig", errors="replace")


def cells_of(path: Path, first: int, lines: list[str], columns: int) -> pa.Array:
    """The texts of the cells of these lines, row by row; DataError at the first line with another number of cells.

    `first` is the place of the first line in its file, from 0.
    """
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pa.array(lines, pa.large_string())))
    wrong = np.flatnonzero(pc.list_value_length(words).to_numpy(zero_copy_only=False) != columns)
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{path}: row {first + row + 1} has {len(lines[row].split())} columns, row 1 has {columns}",
            "a row of numbers, separated by spaces, is expected for each; mend the row",
        )
    return words.flatten()


def _read(path: Path, rows: int, of: str) -> Float64s:
    """A feature file as [rows, columns]; DataError where it is not rectangular, has other rows, or holds what is no number."""
    with open_text(path) as file:
        lines = list(file)
    if len(lines) != rows:
        raise DataError(f"{path} has {len(lines)} rows, the rating matrix has {rows} {of}s", f"one row for each {of} is expected")
    columns = max(len(lines[0].split()), 1)
    texts = cells_of(path, 0, lines, columns)
    numbers = parse_decimals(texts)
    wrong = np.flatnonzero(~(np.abs(numbers) <= MAX_FLOAT32))
    if len(wrong):
        row, column = divmod(int(wrong[0]), columns)
        raise DataError(
            f"{path}: row {row + 1}, column {column + 1}: expected a number that fits float32, found {texts[int(wrong[0])].as_py()!r}",
            "mend the file; a missing number can be given as 0",
        )
    return numbers.reshape(rows, columns)


def _one_each(values: Array) -> Ragged:
    return Ragged(values, np.arange(len(values) + 1, dtype=np.int64))
