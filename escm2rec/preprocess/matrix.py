"""Dense user x item matrices of ratings in text: one row a user, one number an item, 0 where there is no rating.

Of the training matrix every pair is an impression: rated is the click, a rating from `conversion_at` the conversion. Of the test matrix,
whose items were shown at random, the rated pairs are: each was seen, so each is a click. Pairs that are rated in both are
left out of the test. Users and items are counted from 1, as rows and columns of the files are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from escm2rec.config import MatrixSource
from escm2rec.errors import DataError
from escm2rec.preprocess.block import RawBlock, Request, take_rows
from escm2rec.preprocess.digits import parse_decimals
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.matrix_columns import SideColumns, cells_of, open_text
from escm2rec.preprocess.ragged import Float64s, Int64s
from escm2rec.preprocess.rejections import RATED_TWICE, RATING, BadRows


class Shape(NamedTuple):
    """Rows and columns of a matrix."""

    users: int
    items: int

    def __str__(self) -> str:
        return f"{self.users} rows of {self.items} columns"


class MatrixFile:
    """One matrix of ratings; `file.train` tells a test matrix from a training one."""

    def __init__(self, file: RawFile, source: MatrixSource, request: Request, block_rows: int) -> None:
        self.file = file
        self._source, self._request = source, request
        self._shape = shape_of(file.path, must_be_rated=request.labels)
        if file.train is not None and (expected := shape_of(file.train, must_be_rated=False)) != self._shape:
            raise DataError(
                f"{file.path} has {self._shape}, {file.train} has {expected}",
                "both matrices need a row for every user and a column for every item, in one order",
            )
        self._users = SideColumns("user", file.user_features, self._shape.users)
        self._items = SideColumns("item", file.item_features, self._shape.items)
        self._features = {
            feature.name: (side, side.feature(feature)) for feature in request.features for side in [self._side(feature.column)]
        }
        self._extras = {name: (side, side.extra(name)) for name in request.extras for side in [self._side(name)]}
        self._block_users = max(1, block_rows // self._shape.items)

    def _side(self, column: str) -> SideColumns:
        for side in (self._users, self._items):
            if column in side.names:
                return side
        names = [*self._users.names, *self._items.names]
        for side in (self._users, self._items):
            if side.path is None and column.startswith(f"{side.name}_feature"):
                raise DataError(f"no file holds column {column!r}", f"set data.source.{side.name}_features to the one that does")
        near = difflib.get_close_matches(column, names, n=1)
        said = f"did you mean {near[0]!r}?" if near else f"they have: {', '.join(names)}"
        raise DataError(f"the rating matrices have no column {column!r}", said)

    def tasks(self, start: int = 0, stop: int | None = None, first_row: int = 0) -> Iterator[Callable[[], RawBlock]]:
        """One task so many users, in order, of the whole file. Without labels every pair is asked for, and no rating is read."""
        if not self._request.labels:
            for first in range(0, self._shape.users, self._block_users):
                yield self._unlabelled(first, min(self._block_users, self._shape.users - first))
            return
        with open_text(self.file.path) as ratings, open_text(self.file.train or self.file.path) as train:
            for first in range(0, self._shape.users, self._block_users):
                lines = list(islice(ratings, self._block_users))
                yield self._labelled(first, lines, None if self.file.train is None else list(islice(train, self._block_users)))

    def _unlabelled(self, first: int, users: int) -> Callable[[], RawBlock]:
        def block() -> RawBlock:
            pairs = np.arange(users * self._shape.items, dtype=np.int64)
            return self._block(first, pairs, {}, [])

        return block

    def _labelled(self, first: int, lines: list[str], train_lines: list[str] | None) -> Callable[[], RawBlock]:
        def block() -> RawBlock:
            bad = BadRows(self.file.path, np.repeat(first + 1 + np.arange(len(lines), dtype=np.int64), self._shape.items))
            ratings, texts = self._ratings(self.file.path, first, lines)
            bad.mark(~(np.isfinite(ratings) & (ratings >= 0)), RATING, "", self._seen(texts))
            if train_lines is None:
                pairs = bad.good
                click = ratings[pairs] > 0
            else:
                assert self.file.train is not None
                train_ratings, train_texts = self._ratings(self.file.train, first, train_lines)
                bad.mark((ratings > 0) & (train_ratings != 0), RATED_TWICE, "", self._seen(texts, train_texts))
                pairs = np.flatnonzero((ratings > 0) & ~bad.mask)
                click = np.ones(len(pairs), dtype=np.bool_)
            conversion = ratings[pairs] >= self._source.conversion_at
            return self._block(first, pairs, {"click": click.astype(np.uint8), "conversion": conversion.astype(np.uint8)}, bad.found)

        return block

    def _ratings(self, path: Path, first: int, lines: list[str]) -> tuple[Float64s, pa.Array]:
        """The cells of these rows as numbers, NaN for what is none, and as texts."""
        texts = cells_of(path, first, lines, self._shape.items)
        return parse_decimals(texts), texts

    def _seen(self, *texts: pa.Array) -> Callable[[Int64s], list[str]]:
        """`seen` for BadRows.mark: what the cells hold, and where."""
        return lambda rows: [
            f"{' and '.join(repr(text[row].as_py()) for text in texts)} in column {row % self._shape.items + 1}" for row in rows.tolist()
        ]

    def _block(self, first: int, pairs: Int64s, labels: dict[str, Any], rejections: list[Any]) -> RawBlock:
        """The pairs at these places of the rows that begin with user `first`."""
        users, items = first + pairs // self._shape.items, pairs % self._shape.items

        def places(side: SideColumns) -> Int64s:
            return users if side is self._users else items

        features = {name: take_rows(column, places(side)) for name, (side, column) in self._features.items()}
        extras = {name: column.take(pa.array(places(side))) for name, (side, column) in self._extras.items()}
        return RawBlock(self.file, first * self._shape.items + pairs, users + 1, features, extras, labels, None, rejections)


def shape_of(path: Path, must_be_rated: bool) -> Shape:
    """Rows of a matrix, and columns of its first one; DataError where there are none, or no rating."""
    users = items = 0
    rated = False
    with open_text(path) as file:
        for line in file:
            items = items if users else len(line.split())
            users += 1
            rated = rated or bool(line.strip("0. \t\r\n"))
    if not items:
        raise DataError(f"{path} is empty, or begins with an empty line", "a row of numbers a user is expected, separated by spaces")
    if must_be_rated and not rated:
        raise DataError(f"{path} holds no rating: all of its {users} x {items} cells are 0", "is it the right file?")
    return Shape(users, items)
