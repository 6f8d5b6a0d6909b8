"""One pass over the encoded columns: list lengths, rows of hashed tables, a sample of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from escm2rec.cells import read_lists
from escm2rec.config import SPLITS, Split
from escm2rec.errors import DataError
from escm2rec.parallel import default_workers, ordered_map
from escm2rec.paths import not_read, open_parquet
from escm2rec.preprocess.ragged import Float32s, Int64s
from escm2rec.progress import Progress
from escm2rec.reader.dataset import Dataset, RowGroup
from escm2rec.schema import Feature, Schema

SAMPLE_ROWS = 1_000_000
"""At most so many impressions of a split are looked at for the numbers of a feature."""
MAX_COUNTED_ROWS = 1 << 27
"""Up to so many rows of a table are counted one by one: 8 bytes a row."""


@dataclass
class Held:
    """What one split holds of each feature, by name.

    lengths  of lists: how many impressions have 0, 1, 2, ... values
    counts   how often each of the first `counted_rows` of a table is met, where there are any
    numbers  of features without a table: encoded numbers of every k-th impression, without those that were missing in the log
    """

    lengths: dict[str, Int64s] = field(default_factory=dict)
    counts: dict[str, Int64s] = field(default_factory=dict)
    numbers: dict[str, Float32s] = field(default_factory=dict)


@dataclass(frozen=True)
class _Piece:
    rows: int
    lengths: dict[str, Int64s]
    met: dict[str, tuple[Int64s, Int64s]]  # rows of the table, and how often each
    numbers: dict[str, Float32s]  # of every k-th row
    zeros: dict[str, int]  # of all rows


def held_by(dataset: Dataset) -> dict[Split, Held]:
    """Of every split with rows, in one pass over the columns that need one; DataError where a part cannot be read.

    Memory: 8 bytes a counted row of each table, 4 a sampled number, and a row group a thread.
    """
    groups = {split: dataset.row_groups(split) for split in SPLITS}
    found: dict[Split, Held] = {}
    with Progress("inspect", sum(group.num_rows for of_split in groups.values() for group in of_split)) as progress:
        for split, of_split in groups.items():
            if not of_split:
                continue
            found[split] = Held()
            step = sample_step(sum(group.num_rows for group in of_split))
            sampled: list[_Piece] = []
            for piece in ordered_map(_tasks(dataset.schema, of_split, step), default_workers()):
                _add(found[split], piece, dataset.schema)
                sampled.append(replace(piece, lengths={}, met={}))
                progress.add(piece.rows, split)
            found[split].numbers = _numbers_there(dataset, split, sampled)
    return found


def sample_step(rows: int) -> int:
    """Every how many-th impression of a split of so many is looked at for numbers."""
    return -(-rows // SAMPLE_ROWS)


def counted_rows(feature: Feature) -> int:
    """How many of the first rows of its table are counted in the pass: all where values are hashed or in buckets, unless they are too many;
    of a vocabulary those that values share, if more than one: of the others, and of a single one, it is known. None of a managed table,
    whose rows are given to values in training."""
    if feature.encoding == "vocabulary":
        return feature.oov_rows if 1 < feature.oov_rows <= MAX_COUNTED_ROWS else 0
    if feature.is_managed:
        return 0
    return feature.num_embeddings if feature.num_embeddings <= MAX_COUNTED_ROWS else 0  # none of a number without a table


def _tasks(schema: Schema, groups: list[RowGroup], step: int) -> Iterator[Callable[[], _Piece]]:
    wanted = [feature for feature in schema.features if feature.is_list or not feature.is_table or counted_rows(feature)]

    def task(group: RowGroup) -> Callable[[], _Piece]:
        return lambda: _piece(group, wanted, step)

    return (task(group) for group in groups)


def _piece(group: RowGroup, features: list[Feature], step: int) -> _Piece:
    where = f"{group.path}, row group {group.index}"
    try:
        with open_parquet(group.path) as file:
            table = file.read_row_group(group.index, columns=[feature.name for feature in features], use_threads=False)
            table = table.combine_chunks()
    except (OSError, pa.ArrowInvalid) as error:
        raise not_read(where, error) from error
    piece = _Piece(group.num_rows, {}, {}, {}, {})
    for feature in features:
        if feature.name not in table.column_names:
            raise DataError(f"{where}: no column {feature.name!r}", "the data set is damaged or of another schema: preprocess again")
        column = table[feature.name]
        if not feature.is_table:
            numbers = column.to_numpy()
            piece.numbers[feature.name] = numbers[-group.start % step :: step].copy()
            piece.zeros[feature.name] = int(np.count_nonzero(numbers == 0))
            continue
        if feature.is_list:
            flat, offsets = read_lists(column.chunk(0), feature.name, feature.id_type, str(group.path), group.first_row)
            piece.lengths[feature.name] = np.bincount(np.diff(offsets))
        if counted := counted_rows(feature):
            rows = (flat if feature.is_list else column.drop_null()).to_numpy()
            piece.met[feature.name] = _distinct(rows[rows < counted] if feature.encoding == "vocabulary" else rows, feature, where)
    return piece


def _distinct(rows: Int64s, feature: Feature, where: str) -> tuple[Int64s, Int64s]:
    met, counts = np.unique(rows, return_counts=True)
    if len(met) and (met[0] < 0 or met[-1] >= feature.num_embeddings):
        worst = met[0] if met[0] < 0 else met[-1]
        raise DataError(
            f"{where}, column {feature.name}: id {worst} is out of range, its table has rows 0 to {feature.num_embeddings - 1}",
            "the data set was changed after it was written, or belongs to another schema: preprocess again",
        )
    return met, counts


def _add(held: Held, piece: _Piece, schema: Schema) -> None:
    for feature in schema.features:
        name = feature.name
        if name in piece.lengths:
            before, now = held.lengths.get(name, np.zeros(0, np.int64)), piece.lengths[name]
            total = np.zeros(max(len(before), len(now)), np.int64)
            total[: len(before)] += before
            total[: len(now)] += now
            held.lengths[name] = total
        if name in piece.met:
            met, counts = piece.met[name]
            held.counts.setdefault(name, np.zeros(counted_rows(feature), np.int64))[met] += counts


def _numbers_there(dataset: Dataset, split: Split, pieces: list[_Piece]) -> dict[str, Float32s]:
    found: dict[str, Float32s] = {}
    for feature in dataset.schema.features:
        if not feature.is_table:
            share = dataset.manifest["features"][feature.name]["missing"][split]
            numbers = np.concatenate([piece.numbers[feature.name] for piece in pieces])
            zeros = sum(piece.zeros[feature.name] for piece in pieces)
            found[feature.name] = without_missing(numbers, zeros, round(share * sum(piece.rows for piece in pieces)))
    return found


def without_missing(sample: Float32s, zeros: int, missing: int) -> Float32s:
    """Encoded numbers without those that stand for none; of all from which `sample` is taken, `zeros` are 0 and `missing` were missing.

    A missing number is encoded as 0, and so is one that equals the training mean: of the zeros in the sample, as large a share stays as
    equals the mean of all.
    """
    places = np.flatnonzero(sample == 0)
    stay = round(len(places) * max(zeros - missing, 0) / max(zeros, 1))
    return np.delete(sample, places[stay:])
