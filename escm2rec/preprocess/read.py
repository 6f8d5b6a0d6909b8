"""The step that reads: a portion of raw impressions, parsed once, checked, counted, and laid out by the order that rows will have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from escm2rec.config import KEPT_PREFIX, SPLITS, AliccpSource
from escm2rec.errors import DataError
from escm2rec.preprocess.aliccp_columns import AliccpColumns
from escm2rec.preprocess.block import RawBlock
from escm2rec.preprocess.buckets import count_numbers
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.labels import apply_click_rule
from escm2rec.preprocess.moments import Moments
from escm2rec.preprocess.negatives import keep_negatives
from escm2rec.preprocess.portions import Range
from escm2rec.preprocess.ragged import Int64s, Ragged, UInt64s, offsets_of
from escm2rec.preprocess.records import SPILL_BYTES, CommonRecords, RecordWriter, common_tasks, index_records, open_records
from escm2rec.preprocess.rejections import NO_SPLIT, Rejected, Rejection, plain
from escm2rec.preprocess.sources import Opener
from escm2rec.preprocess.spill import hashed, holds, narrow, numbered, one_batch, take, to_arrow, values_of, write_batch
from escm2rec.preprocess.splits import TRAIN, Splitter, split_column
from escm2rec.preprocess.stable_hash import fnv1a64, row_hash, splitmix64
from escm2rec.preprocess.steps import Job
from escm2rec.preprocess.transforms import add_crosses
from escm2rec.preprocess.value_counts import ValueCounter, count_values, spill_largest
from escm2rec.preprocess.vocabulary import value_type_of

LABEL = "label."
ORDER_SALT = "order of rows"


def read_common(job: Job, number: int) -> dict[str, Any]:
    """Parse one portion of common records: `files` by common file, and what was `rejected`."""
    return job.once(f"common-{number:05d}", lambda folder: _read_common(job, number, folder))


def _read_common(job: Job, number: int, folder: Path) -> dict[str, Any]:
    columns = AliccpColumns(job.request)
    rejected = Rejected(job.config.bad_rows == "refuse")
    files: dict[str, list[str]] = {}
    for place, each in enumerate(job.common[number]):
        path = each.file.common
        assert path is not None
        writer = RecordWriter(folder, f"common-{number:05d}-{place}", columns)
        for task in common_tasks(path, columns, each.start, each.stop, each.first_row):
            block = task()
            rejected.add(block.rejections)
            writer.add(block)
        files.setdefault(str(path), []).extend(file.name for file in writer.finish())
    return {"rejected": rejected.reasons, "files": files}


def index_common(job: Job, number: int) -> dict[str, Any]:
    """Index the common records of file `number`: how many there are, their `files`, and what was `rejected`."""
    return job.once(f"index-{number:05d}", lambda folder: _index_common(job, number, folder))


def _index_common(job: Job, number: int, folder: Path) -> dict[str, Any]:
    path = job.files[number].common
    assert path is not None
    files = [name for portion in range(len(job.common)) for name in read_common(job, portion)["files"].get(str(path), [])]
    columns = AliccpColumns(job.request)
    rejected = Rejected(job.config.bad_rows == "refuse")
    paths = [job.work / name for name in files]
    rejection = index_records(path, paths, columns, folder, f"index-{number:05d}")
    rejected.add([rejection] if rejection is not None else [])
    return {"rejected": rejected.reasons, "files": files}


def records_of(job: Job) -> list[CommonRecords]:
    """The common records of every file of the job, in order; none where the source has none."""
    if not isinstance(job.config.source, AliccpSource):
        return []
    columns = AliccpColumns(job.request)
    indexed = [index_common(job, number)["files"] for number in range(len(job.files))]
    return [
        open_records(job.work, f"index-{number:05d}", columns, [job.work / name for name in files]) for number, files in enumerate(indexed)
    ]


def first_records(records: Sequence[CommonRecords]) -> Int64s:
    """The place of each file's first record among all, and how many there are."""
    return offsets_of(np.array([each.count for each in records], dtype=np.int64))


def read(job: Job, number: int) -> dict[str, Any]:
    """Read one portion of impressions: what `_Reader.told` says."""
    return job.once(f"read-{number:05d}", lambda folder: _Reader(job, number, folder).read())


def spill_names(job: Job) -> list[str]:
    """Of all that `read` spilled, in the order of the input. Files that are not told of are of a run that was killed, with other memory."""
    return [f"{portion:05d}-{spill}" for portion in range(len(job.portions)) for spill in range(read(job, portion)["spills"])]


class _Reader:
    """Reads one portion into `rows-*.arrow`: raw columns of usable rows, sorted by split and bucket, whose bounds are in `bounds-*.npy`."""

    def __init__(self, job: Job, number: int, folder: Path) -> None:
        self._job, self._number, self._folder = job, number, folder
        self._config, self._features = job.config, (*job.request.features, *job.request.crosses)
        self._rejected = Rejected(job.config.bad_rows == "refuse")
        self._splitter = Splitter(job.config.split)
        self._rows = self._training_rows = self._without_click = self._left_out = self._spills = 0
        self._types: dict[str, dict[str, str]] = {}
        self._kept_types: dict[str, dict[str, str]] = {}
        self._waiting: list[dict[str, pa.Array]] = []
        self._bytes = 0
        self._moments = {feature.name: Moments() for feature in job.config.features if not feature.is_table}
        counted = [feature.name for feature in job.config.features if feature.is_fitted]
        self._counters = {name: ValueCounter(f"count-{number:05d}-{name}", folder) for name in counted}
        self._records = dict(zip(job.files, records_of(job), strict=False))
        self._first_record = dict(zip(job.files, first_records(list(self._records.values())).tolist(), strict=False))

    def read(self) -> dict[str, Any]:
        """Read, and tell."""
        opener = Opener(self._config.source, self._job.request)
        for each in self._job.portions[self._number]:
            opened = opener.open(each.file, self._records.get(each.file))
            for task in opened.tasks(each.start, each.stop, each.first_row):
                self._add(each, add_crosses(task(), self._job.request.crosses))
        self._spill()
        for counter in self._counters.values():
            counter.spill()
        return {
            "rows": self._rows,
            "training_rows": self._training_rows,
            "rejected": self._rejected.reasons,
            "seen": asdict(self._splitter.seen),
            "without_click": self._without_click,
            "negatives_left_out": self._left_out,
            "types": self._types,
            "kept_types": self._kept_types,
            "moments": {name: asdict(moments) for name, moments in self._moments.items()},
            "runs": {name: [run.name for run in counter.runs] for name, counter in self._counters.items()},
            "spills": self._spills,
        }

    def _add(self, place: Range, block: RawBlock) -> None:
        """Check a block, and keep its usable rows until the next spill."""
        config, rejections = self._config, block.rejections
        block, without_click, refusals = apply_click_rule(block, config.conversion_without_click)
        self._rejected.add(rejections, refusals)
        if without_click is not None:
            self._without_click += without_click.count
            if config.conversion_without_click == "drop":
                self._rejected.count(without_click)
        numbers = self._splitter.numbers(block)
        if (numbers < 0).any():
            self._rejected.count(_no_split(split_column(config.split), block, np.flatnonzero(numbers < 0)))
        block = replace(block, labels={**block.labels, "split": numbers}).take(np.flatnonzero(numbers >= 0))
        if config.negative_keep_rate < 1:
            before = len(block)
            block = keep_negatives(block, config.negative_keep_rate, block.labels["split"] == TRAIN)
            self._left_out += before - len(block)
        if not len(block):
            return
        self._check_types(place.file, block)
        columns = self._columns(block)
        self._add_moments(block)
        self._rows += len(block)
        self._waiting.append(columns)
        self._bytes += sum(array.nbytes for array in columns.values())
        if self._bytes > min(SPILL_BYTES, self._job.memory_bytes // 4):
            self._spill()

    def _add_moments(self, block: RawBlock) -> None:
        """Block by block: sums of floats depend on their order, which memory must not change."""
        training = block.labels["split"] == TRAIN
        for feature in self._features:
            if feature.name in self._moments:
                column = block.features[feature.name]
                assert isinstance(column, np.ndarray)
                self._moments[feature.name].add(Moments.of_column(column[training], feature.log1p))

    def _check_types(self, file: RawFile, block: RawBlock) -> None:
        for name, column in block.features.items():
            if isinstance(column, Ragged) and len(column.values):
                kind = value_type_of(column.values)
                check_type(name, {"type": kind, "file": str(file.path)}, self._types)
        for name in self._config.keep:
            array = block.extras[name]
            found = {"type": str(array.type), "file": str(file.path)}
            if self._kept_types.get(name, {}).get("type") != found["type"] and holds(KEPT_PREFIX + name, array):
                check_kept_type(name, found, self._kept_types)

    def _columns(self, block: RawBlock) -> dict[str, pa.Array]:
        columns = to_arrow(self._features, block.features)
        columns |= {LABEL + name: pa.array(values) for name, values in block.labels.items()}
        columns |= {KEPT_PREFIX + name: block.extras[name] for name in self._config.keep}
        if block.common is None:
            places = row_hash(block.file.name, block.rows)
        else:
            assert block.file.common is not None
            columns["record"] = pa.array(block.common + self._first_record[block.file])
            places = row_hash(block.file.common.name, block.common)
        columns["key"] = pa.array(order_of(places).view(np.int64))
        return columns

    def _spill(self) -> None:
        """Count what waits, sort it into buckets, and write it."""
        if not self._waiting:
            return
        batch = one_batch(self._waiting)
        self._waiting, self._bytes = [], 0
        places = self._places(batch)
        order = np.argsort(places, kind="stable")
        name, training = f"{self._number:05d}-{self._spills}", int((places < self._job.buckets).sum())
        columns: dict[str, pa.Array] = {}
        for column in batch.schema.names:
            columns[column] = self._ordered(column, batch[column], order, training)
        self._training_rows += training
        self._count_records(columns, training, name)
        write_batch(self._folder / f"rows-{name}.arrow", pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns)))
        np.save(self._folder / f"bounds-{name}.npy", offsets_of(np.bincount(places, minlength=len(SPLITS) * self._job.buckets)))
        self._spills += 1
        spill_largest(self._counters.values(), self._job.memory_bytes // 8)

    def _ordered(self, name: str, array: pa.Array, order: Int64s, training: int) -> pa.Array:
        """A column in the order of its rows; those of training, which come first, counted."""
        if name.startswith(KEPT_PREFIX):
            return take(name, array, order)
        numbers, words = numbered(array)
        ordered = take(name, narrow(numbers), order)
        if name in self._counters:
            self._counters[name].add(_counted(ordered.slice(0, training), words))
        return ordered if words is None else hashed(ordered, words)

    def _places(self, batch: pa.RecordBatch) -> Any:
        """Split and bucket of each row, in one number: the buckets of training come first."""
        keys, splits = batch["key"].to_numpy().view(np.uint64), batch[LABEL + "split"].to_numpy()
        places = bucket_of(keys, self._job.buckets) + splits.astype(np.int64) * self._job.buckets
        return places.astype(np.uint16) if len(SPLITS) * self._job.buckets < 1 << 16 else places  # sorted by radix

    def _count_records(self, columns: dict[str, pa.Array], training: int, name: str) -> None:
        """How often training rows, which come first, point at each common record."""
        if "record" in columns:
            records, times = np.unique(columns["record"].slice(0, training).to_numpy(), return_counts=True)
            np.save(self._folder / f"times-{name}.npy", np.stack([records.astype(np.int64), times.astype(np.int64)]))


def _counted(array: pa.Array, words: pa.Array | None) -> pl.DataFrame:
    """How often each value of a column occurs: a number, or the word at a place."""
    if pa.types.is_floating(array.type):  # to go into buckets
        return count_numbers(array.to_numpy())
    counts = count_values(values_of(array))
    if words is None:
        return counts
    return counts.with_columns(pl.Series("value", words.take(counts["value"].to_arrow())))


def check_type(name: str, found: dict[str, str], known: dict[str, dict[str, str]]) -> None:
    """DataError when a feature holds values of another type than in an earlier file."""
    _check_type(f"feature {name!r}", found, known.setdefault(name, found), "use one type in all files")


def check_kept_type(name: str, found: dict[str, str], known: dict[str, dict[str, str]]) -> None:
    """The same of a kept column."""
    _check_type(f"kept column {name!r}", found, known.setdefault(name, found), "use one type in all files, or do not keep the column")


def _check_type(what: str, found: dict[str, str], earlier: dict[str, str], hint: str) -> None:
    if found["type"] != earlier["type"]:
        raise DataError(f"{found['file']}: {what} holds {found['type']} values, in {earlier['file']} it holds {earlier['type']}", hint)


def order_of(places: UInt64s) -> UInt64s:
    """A row's place in the order of its split, as a number from 0 to 2^64: by a hash of where it comes from (`row_hash`)."""
    return splitmix64(places ^ fnv1a64(pa.array([ORDER_SALT]))[0])


def bucket_of(keys: UInt64s, buckets: int) -> Int64s:
    """Which of so many equal parts of that range a key is in."""
    numbers: Int64s = ((keys >> np.uint64(11)).astype(np.float64) * 2.0**-53 * buckets).astype(np.int64)
    return numbers


def _no_split(column: str | None, block: RawBlock, rows: Int64s) -> Rejection:
    lines = block.lines[rows[:5]].tolist()
    seen = [block.file.name] * len(lines)
    if column:
        seen = [str(plain(value)) for value in block.extras[column].take(pa.array(rows[:5]))]
    return Rejection(NO_SPLIT, str(block.file.path), column or "", len(rows), lines, seen)
