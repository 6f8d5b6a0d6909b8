"""Rows of a candidate log that follow one another and share what they hold of the user: looked up and computed once.

Which features those are is seen in the data: those that seldom change from row to row. Their part of the first layers is a sum of its own,
W [u, v] = W_u u + W_v v, so W_u u is computed once for the rows that share u. Where a backbone does more with its inputs than such layers,
the look-ups alone are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from escm2rec.preprocess.ragged import Bools, Int64s, Ragged
from escm2rec.reader.columns import Columns, JaggedColumn, Slice
from escm2rec.schema import Feature, Schema

SAMPLE_ROWS = 2_048
LEAST_SAME = 0.75  # of the rows, as the row before, for a feature to be shared
MOST_GROUPS = 0.5  # of the rows; with more it does not pay


@dataclass(frozen=True)
class Repeats:
    """Rows of a block in groups, and its features in two: `once` has the shared ones, a row a group; `each` the others, a row a row."""

    starts: Int64s  # the first row of each group, and the number of rows
    once: Columns
    once_schema: Schema
    each: Columns
    each_schema: Schema

    def slices(self, start: int, stop: int) -> tuple[Slice, Slice, Tensor]:
        """Of rows [start, stop): their groups, the rows, and the group of each row, counted from the first."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        end = int(np.searchsorted(self.starts, stop, side="left"))
        cuts = np.clip(self.starts[first : end + 1], start, stop)
        of_row = torch.from_numpy(np.repeat(np.arange(end - first), np.diff(cuts)))
        return Slice(self.once, first, end), Slice(self.each, start, stop), of_row


def find_repeats(columns: Columns, schema: Schema) -> Repeats | None:
    """The groups of a block; None where too little is shared. A sample is looked at first: a log without repeats costs next to nothing."""
    rows = min(columns.num_rows, SAMPLE_ROWS)
    shared = [feature for feature in schema.features if _same(columns, schema, feature, rows).mean() >= LEAST_SAME] if rows > 1 else []
    if not shared:
        return None
    same = np.logical_and.reduce([_same(columns, schema, feature, columns.num_rows) for feature in shared])
    starts = np.concatenate([[0], np.flatnonzero(~same) + 1, [columns.num_rows]])
    if len(starts) - 1 > MOST_GROUPS * columns.num_rows:
        return None
    once_schema, each_schema = _part(schema, shared), _part(schema, [each for each in schema.features if each not in shared])
    return Repeats(
        starts, _rows_of(columns, schema, once_schema, starts[:-1]), once_schema, _rows_of(columns, schema, each_schema), each_schema
    )


def _part(schema: Schema, features: Sequence[Feature]) -> Schema:
    return schema.model_copy(update={"features": tuple(features)})


def _rows_of(columns: Columns, schema: Schema, part: Schema, rows: Int64s | None = None) -> Columns:
    """The columns of some features, at some rows."""
    jagged = {feature.name: columns.jagged[feature.name] for feature in part.tables}
    names = [feature.name for feature in schema.numeric]
    numeric = columns.numeric[:, [names.index(feature.name) for feature in part.numeric]]
    if rows is None:
        return Columns(columns.num_rows, jagged, numeric, {}, columns.extra)
    return Columns(len(rows), {name: _take(column, rows) for name, column in jagged.items()}, numeric[rows], {}, columns.extra)


def _take(column: JaggedColumn, rows: Int64s) -> JaggedColumn:
    if column.offsets is None:
        return JaggedColumn(column.values[rows], None)
    taken = Ragged(column.values, np.asarray(column.offsets, np.int64), column.weights).take(rows)
    return JaggedColumn(taken.values, taken.offsets, taken.weights)


def _same(columns: Columns, schema: Schema, feature: Feature, rows: int) -> Bools:
    """Of the first rows but the first: whether each holds what the row before it does."""
    if not feature.is_table:
        values = columns.numeric[:rows, [each.name for each in schema.numeric].index(feature.name)]
        return np.asarray(values[1:] == values[:-1])
    column = columns.jagged[feature.name]
    if column.offsets is None:
        return np.asarray(column.values[1:rows] == column.values[: rows - 1])
    offsets = np.asarray(column.offsets[: rows + 1], np.int64)
    lengths = np.diff(offsets)
    # Each value and the one at its place in the row before, if rows are as long; of others it does not matter.
    here = np.arange(offsets[1], offsets[-1])
    there = here - np.repeat(lengths[1:], lengths[1:])
    differs = column.values[here] != column.values[there]
    if column.weights is not None:
        differs |= column.weights[here] != column.weights[there]
    before = np.concatenate([[0], np.cumsum(differs)])
    at = offsets[1:] - offsets[1]
    return np.asarray((lengths[1:] == lengths[:-1]) & (before[at[1:]] == before[at[:-1]]))


class Split:
    """Which inputs of the head are shared, and the weights of its first layers, cut accordingly."""

    def __init__(self, schema: Schema, once: Schema, dim: int) -> None:
        places: dict[str, list[int]] = {}
        end = 0
        for feature in (*schema.tables, *schema.numeric):
            width = dim if feature.is_table else 1
            places[feature.name] = list(range(end, end + width))
            end += width
        shared = {feature.name for feature in once.features}
        ordered = [feature.name for feature in (*schema.tables, *schema.numeric)]
        self.once = torch.tensor([place for name in ordered if name in shared for place in places[name]])
        self.each = torch.tensor([place for name in ordered if name not in shared for place in places[name]], dtype=torch.int64)
        self._weights: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def weights(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Its columns for the inputs that are shared, and for the others."""
        if id(weight) not in self._weights:
            self._weights[id(weight)] = (weight, weight[:, self.once].contiguous(), weight[:, self.each].contiguous())
        return self._weights[id(weight)][1:]


class SharedInputs:
    """Inputs [B, K] of which some columns are given once a group of rows. A linear layer uses that; anything else gets all of them."""

    def __init__(self, once: Tensor, each: Tensor, of_row: Tensor, split: Split) -> None:
        """`once` [G, K_u], `each` [B, K - K_u], `of_row` [B] the group of each row."""
        self._once, self._each, self._of_row, self._split = once, each, of_row, split
        self._whole: Tensor | None = None

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What torch calls for any function of these inputs."""
        if function is nn.functional.linear and isinstance(args[0], cls) and not kwargs:
            return args[0].linear(*args[1:])
        args, kwargs = tree_map(lambda value: value.whole() if isinstance(value, cls) else value, (args, kwargs or {}))
        return function(*args, **kwargs)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + b of each row."""
        for_once, for_each = self._split.weights(weight)
        shared = nn.functional.linear(self._once, for_once, bias).index_select(0, self._of_row)
        return shared.add_(nn.functional.linear(self._each, for_each)) if self._each.shape[1] else shared

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self._each.device

    def detach(self) -> SharedInputs:
        """Themselves: nothing here has a gradient."""
        return self

    def whole(self) -> Tensor:
        """The inputs as one tensor."""
        if self._whole is None:
            self._whole = self._each.new_empty((len(self._of_row), self._once.shape[1] + self._each.shape[1]))
            self._whole[:, self._split.once] = self._once.index_select(0, self._of_row)
            self._whole[:, self._split.each] = self._each
        return self._whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole(), name)
