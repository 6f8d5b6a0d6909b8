"""What every source yields: blocks of raw impressions, by column."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import pyarrow as pa

from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.ragged import Float64s, Int64s, Ragged
from escm2rec.preprocess.rejections import Rejection
from escm2rec.preprocess.where import Where
from escm2rec.schema import Feature

RawColumn = Ragged | Float64s  # numeric features are floats, NaN when missing; all others are ragged ids or strings


@dataclass(frozen=True)
class Request:
    """What is wanted of a source: features, single-valued raw columns, whether labels are read, and of a table which rows.

    `crosses` are made of such columns (`transforms.add_crosses`), sources do not read them.
    """

    features: tuple[Feature, ...]
    extras: tuple[str, ...] = ()
    labels: bool = True
    crosses: tuple[Feature, ...] = ()
    where: Where | None = None

    @classmethod
    def of(cls, features: Iterable[Feature], extras: Iterable[str], labels: bool = True, where: Where | None = None) -> Self:
        """What these features need, those that are crossed included."""
        features = tuple(features)
        crosses = tuple(feature for feature in features if feature.cross is not None)
        parts = [part for feature in crosses for part in feature.cross or ()]
        read = tuple(feature for feature in features if feature.cross is None)
        return cls(read, tuple(dict.fromkeys([*extras, *parts])), labels, crosses, where)


@dataclass(frozen=True)
class RawBlock:
    """Consecutive usable rows of one file.

    For Ali-CCP, `features` and `extras` hold what the skeleton lines say, and `common` is the position of each row's common record.
    """

    file: RawFile
    rows: Int64s  # place in the file, from 0
    lines: Int64s  # the same as people count: lines of a text (its header is line 1), rows of a Parquet file, from 1
    features: dict[str, RawColumn]
    extras: dict[str, pa.Array] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)  # numpy columns, by their reserved names
    common: Int64s | None = None
    rejections: list[Rejection] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int64s) -> RawBlock:
        """The rows at these positions; all rows in order are the block itself."""
        if len(rows) == len(self.rows):
            return self
        picked = pa.array(rows)
        return replace(
            self,
            rows=self.rows[rows],
            lines=self.lines[rows],
            features={name: take_rows(column, rows) for name, column in self.features.items()},
            extras={name: column.take(picked) for name, column in self.extras.items()},
            labels={name: column[rows] for name, column in self.labels.items()},
            common=None if self.common is None else self.common[rows],
        )


def take_rows(column: RawColumn, rows: Int64s) -> RawColumn:
    """The rows of a raw column at these positions."""
    return column.take(rows) if isinstance(column, Ragged) else column[rows]
