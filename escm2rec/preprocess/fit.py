"""The first pass: counts and moments of the training impressions, and the schema that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from escm2rec.config import AliccpSource, DataConfig, EventsSource, FeatureConfig, TableSource
from escm2rec.errors import DataError
from escm2rec.folder import sha256_of
from escm2rec.preprocess.block import RawBlock, RawColumn
from escm2rec.preprocess.common import CommonRecords
from escm2rec.preprocess.encoder import CHUNK_ROWS, slice_rows
from escm2rec.preprocess.labels import apply_click_rule
from escm2rec.preprocess.negatives import keep_negatives
from escm2rec.preprocess.parallel import ordered_map
from escm2rec.preprocess.ragged import Int64s, Ragged
from escm2rec.preprocess.rejections import Rejected, Rejection
from escm2rec.preprocess.sources import OpenFile, common_of
from escm2rec.preprocess.splits import TRAIN, split_numbers
from escm2rec.preprocess.value_counts import ValueCounter, count_values
from escm2rec.preprocess.vocabulary import fit_vocabulary
from escm2rec.progress import Progress
from escm2rec.schema import Feature, Schema


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of a numeric feature, merged as by Chan et al. (1979)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, numbers: Any, times: Any) -> Moments:
        """Moments of the numbers that are there, each counting `times`."""
        held = ~np.isnan(numbers)
        numbers, times = numbers[held], times[held].astype(np.float64)
        count = float(times.sum())
        if not count:
            return cls()
        mean = float((numbers * times).sum() / count)
        return cls(count, mean, float((times * (numbers - mean) ** 2).sum()))

    def add(self, other: Moments) -> None:
        """Merge the moments of other numbers."""
        if not other.count:
            return
        count, delta = self.count + other.count, other.mean - self.mean
        self.squares += other.squares + delta**2 * self.count * other.count / count
        self.mean += delta * other.count / count
        self.count = count

    @property
    def std(self) -> float:
        """Population standard deviation; 1 when all numbers are equal, or there are none."""
        std = float(np.sqrt(self.squares / self.count)) if self.count else 0.0
        return std if std > 1e-12 * max(1.0, abs(self.mean)) else 1.0


@dataclass(frozen=True)
class _Counts:
    """What one block adds."""

    features: dict[str, pl.DataFrame | Moments]
    rows: int
    records: Int64s | None  # common records that its training rows point at, repeats included
    rejections: list[Rejection]
    refusals: list[Rejection]


class Fitter:
    """Counts training impressions of any number of files.

    Of unclicked ones that `negative_keep_rate` leaves out nothing is counted, and no weight is: a vocabulary has the values that training
    meets, `min_count` is of rows that train, and moments are of the numbers that the model reads.

    Counts take an eighth of `memory_bytes` (a merge of them three times that), and go to `folder` beyond.
    """

    def __init__(self, config: DataConfig, progress: Progress, folder: Path, memory_bytes: int) -> None:
        self._config, self._progress = config, progress
        self._memory_bytes = memory_bytes
        self._counters = {f.name: ValueCounter(f.name, folder) for f in config.features if f.kind != "numeric" and f.hash_size is None}
        self._moments = {f.name: Moments() for f in config.features if f.kind == "numeric"}
        self._types: dict[str, Any] = {}
        self.rows = 0

    def add_file(self, opened: OpenFile, workers: int) -> None:
        """Count the training rows of a file; bad rows are refused as configured, and counted by the second pass only."""
        common = common_of(opened)
        times = np.zeros(common.count, dtype=np.int64) if common is not None else None
        rejected = Rejected(self._config.bad_rows == "refuse")
        for counts in ordered_map((self._task(task) for task in opened.tasks()), workers):
            rejected.add(counts.rejections, counts.refusals)
            self.rows += counts.rows
            self._progress.add(counts.rows, opened.file.name)
            self._merge(counts.features, str(opened.file.path))
            if times is not None and counts.records is not None:
                times += np.bincount(counts.records, minlength=len(times))
        if common is not None and times is not None:
            self._add_common(common, times, workers)

    def _task(self, task: Callable[[], RawBlock]) -> Callable[[], _Counts]:
        return lambda: self._count(task())

    def _count(self, block: RawBlock) -> _Counts:
        block, _, refusals = apply_click_rule(block, self._config.conversion_without_click)
        rejections = block.rejections
        block = block.take(np.flatnonzero(split_numbers(self._config.split, block) == TRAIN))
        if self._config.negative_keep_rate < 1:
            block = keep_negatives(block, self._config.negative_keep_rate)
        features = {name: self._count_column(name, column, None) for name, column in block.features.items()}
        return _Counts(features, len(block), block.common, rejections, refusals)

    def _count_column(self, name: str, column: RawColumn, times: Int64s | None) -> pl.DataFrame | Moments:
        """Counts or moments of a column, each row counting `times`."""
        if not isinstance(column, Ragged):
            log1p = next(feature.log1p for feature in self._config.features if feature.name == name)
            return Moments.of(np.log1p(column) if log1p else column, np.ones(len(column)) if times is None else times)
        if name not in self._counters:
            return count_values(column.values[:1])  # hashed: only the type of its values is wanted
        return count_values(column.values, None if times is None else np.repeat(times, column.lengths))

    def _merge(self, features: dict[str, pl.DataFrame | Moments], where: str) -> None:
        for name, part in features.items():
            if isinstance(part, Moments):
                self._moments[name].add(part)
                continue
            if not len(part):
                continue
            kind = part.schema["value"]
            known = self._types.setdefault(name, kind)
            if kind != known:
                raise DataError(
                    f"{where}: feature {name!r} holds {kind} values, in earlier files it holds {known}", "use one type in all files"
                )
            if name in self._counters:
                self._counters[name].add(part)
        if sum(counter.bytes for counter in self._counters.values()) > self._memory_bytes // 8:
            self._spill()

    def _spill(self) -> None:
        """Move the largest counters to disk, until half of what they may take is free."""
        held = sum(counter.bytes for counter in self._counters.values())
        for counter in sorted(self._counters.values(), key=lambda counter: -counter.bytes):
            if held <= self._memory_bytes // 16:
                return
            held -= counter.bytes
            counter.spill()

    def _add_common(self, common: CommonRecords, times: Int64s, workers: int) -> None:
        """Count the values of common records as many times as training rows refer to them."""

        def task(start: int) -> Callable[[], dict[str, pl.DataFrame | Moments]]:
            stop = start + CHUNK_ROWS
            return lambda: {
                name: self._count_column(name, slice_rows(column, start, stop), times[start:stop])
                for name, column in common.features.items()
            }

        for features in ordered_map((task(start) for start in range(0, common.count, CHUNK_ROWS)), workers):
            self._merge(features, "common records")

    def finish(self, vocabulary: Path) -> Schema:
        """Write the vocabularies and return the schema."""
        vocabulary.mkdir()
        for counter in self._counters.values():
            counter.spill()
        config = self._config
        features = tuple(self._fitted(feature, vocabulary) for feature in config.features)
        source = config.source
        if isinstance(source, TableSource):
            has_weight, has_truth = source.weight is not None, None not in (source.true_propensity, source.true_cvr)
        else:
            has_weight = isinstance(source, EventsSource) and source.weight is not None
            has_truth = isinstance(source, AliccpSource) and source.truth is not None
        has_weight = has_weight or config.negative_keep_rate < 1
        return Schema(source=source, features=features, keep=tuple(config.keep), has_weight=has_weight, has_truth=has_truth)

    def _fitted(self, feature: FeatureConfig, vocabulary: Path) -> Feature:
        drafted = draft(feature)
        if feature.kind == "numeric":
            moments = self._moments[feature.name]
            return drafted.model_copy(update={"mean": moments.mean, "std": moments.std})
        value_type = "string" if self._types.get(feature.name) == pl.String else "int64"
        if feature.hash_size is not None:
            return drafted.model_copy(update={"value_type": value_type, "encoding": "hash", "num_embeddings": feature.hash_size})
        path = vocabulary / f"{feature.name}.parquet"
        size = fit_vocabulary(feature, self._counters[feature.name], path, self._memory_bytes // 2)
        return drafted.model_copy(
            update={
                "value_type": value_type,
                "encoding": "vocabulary",
                "num_embeddings": feature.oov_rows + size,
                "oov_rows": feature.oov_rows,
                "vocabulary_sha256": sha256_of(path),
            }
        )


def draft(feature: FeatureConfig) -> Feature:
    """A feature as configured, before anything is fitted."""
    return Feature(
        name=feature.name,
        kind=feature.kind,
        column=feature.column,
        weights_column=feature.weights_column,
        pooling=feature.pooling,
        log1p=feature.log1p,
    )


def fit(config: DataConfig, opened: Iterable[OpenFile], vocabulary: Path, workspace: Path, memory_bytes: int, workers: int) -> Schema:
    """Count the training rows of these files and fit the schema; DataError when there are none."""
    with Progress("count", None) as progress:
        fitter = Fitter(config, progress, workspace, memory_bytes)
        for file in opened:
            fitter.add_file(file, workers)
    if not fitter.rows:
        raise DataError(
            "no row belongs to the training split",
            "has the input rows? then check data.split, and the rejected rows if data.bad_rows is count",
        )
    return fitter.finish(vocabulary)
