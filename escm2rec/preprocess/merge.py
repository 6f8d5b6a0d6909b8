"""The step that merges spills: of many, so that a part is written from few files, however large the job."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from escm2rec.config import SPLITS
from escm2rec.preprocess.ragged import Int64s, offsets_of
from escm2rec.preprocess.read import spill_names
from escm2rec.preprocess.spill import MappedBatch, one_batch, take, write_batch
from escm2rec.preprocess.steps import Job

MERGED = 256
"""Spills that one task merges, and the files that it makes of them, each as large as a spill: docs/decisions/0009."""


class Sorted(NamedTuple):
    """Files of rows of buckets `first` to before `last` of every split, in the order of the input, each sorted by split and bucket.

    `bounds` says where each begins [files, splits x buckets + 1].
    """

    first: int
    last: int
    batches: list[Path]
    bounds: Int64s

    def cuts(self, split: int, bucket: int) -> list[tuple[int, int]]:
        """The rows of a bucket in each file."""
        place = split * (self.last - self.first) + bucket - self.first
        return [(start, stop) for start, stop in self.bounds[:, place : place + 2].tolist()]


def index_rows(job: Job) -> dict[str, Any]:
    """What `read` spilled: `spills`, names in the order of the input, of which `at_once` are merged by a task.

    How many rows each split has in each bucket is kept for `rows_of`.
    """

    def make(folder: Path) -> dict[str, Any]:
        names = spill_names(job)
        rows = np.zeros(len(SPLITS) * job.buckets, np.int64)
        for name in names:
            rows += np.diff(np.load(job.work / f"bounds-{name}.npy"))
        np.save(folder / "rows.npy", rows.reshape(len(SPLITS), job.buckets))
        return {"spills": names, "at_once": MERGED}

    return job.once("rows", make)


def rows_of(job: Job) -> Int64s:
    """Rows of each split in each bucket [splits, buckets], after `index_rows`."""
    rows: Int64s = np.load(job.work / "rows.npy")
    return rows


def merges(job: Job) -> range:
    """The numbers of the tasks of `merge`: none where spills are few enough to be read as they are."""
    spills, at_once = len(index_rows(job)["spills"]), index_rows(job)["at_once"]
    return range(-(-spills // at_once) if spills > at_once else 0)


def _stretches(job: Job) -> list[tuple[int, int]]:
    """The buckets, first and before last, that lie together in files."""
    cuts = np.linspace(0, job.buckets, min(index_rows(job)["at_once"], job.buckets) + 1).astype(int) if merges(job) else [0, job.buckets]
    return [(int(first), int(last)) for first, last in pairwise(cuts)]


def merge(job: Job, number: int) -> dict[str, Any]:
    """Merge the spills of task `number`, which are removed: `files`, names by stretch of buckets, None of one without rows."""
    told = _merged(job, number)
    for name in _spills(job, number):
        (job.work / f"rows-{name}.arrow").unlink(missing_ok=True)
        (job.work / f"bounds-{name}.npy").unlink(missing_ok=True)
    return told


def _spills(job: Job, number: int) -> list[str]:
    told = index_rows(job)
    return list(told["spills"][number * told["at_once"] :][: told["at_once"]])


def _merged(job: Job, number: int) -> dict[str, Any]:
    name = f"merge-{number:05d}"
    try:
        return job.once(name, lambda folder: {"files": _merge(job, number, folder)})
    except FileNotFoundError:
        if not (job.work / f"{name}.json").exists():
            raise
        return _merged(job, number)  # another run of the task, such as one thought lost, has ended meanwhile and removed the spills


def _merge(job: Job, number: int, folder: Path) -> list[str | None]:
    spills = _spills(job, number)
    mapped = [MappedBatch(job.work / f"rows-{name}.arrow") for name in spills]
    bounds = [np.load(job.work / f"bounds-{name}.npy").astype(np.int32) for name in spills]
    files: list[str | None] = []
    for first, last in _stretches(job):
        name = f"merged-{number:05d}-{first}"
        wanted = [slice(split * job.buckets + first, split * job.buckets + last + 1) for split in range(len(SPLITS))]
        files.append(name if _merge_stretch(mapped, bounds, wanted, folder, name) else None)
    return files


def _merge_stretch(mapped: list[MappedBatch], bounds: list[Any], wanted: list[slice], folder: Path, name: str) -> bool:
    """Write the rows of the places between some bounds, sorted by place; rows of one place keep their order. Whether there are any."""
    pieces: list[dict[str, pa.Array]] = []
    places: list[Int64s] = []
    done = 0
    for between in wanted:
        for each, bound in zip(mapped, bounds, strict=True):
            cuts = np.asarray(bound[between])
            if cuts[-1] > cuts[0]:
                pieces.append(each.copy(int(cuts[0]), int(cuts[-1])))
                places.append(np.repeat(np.arange(done, done + len(cuts) - 1), np.diff(cuts)))
        done += between.stop - between.start - 1
    if not pieces:
        return False
    batch, place = one_batch(pieces), np.concatenate(places)
    del pieces
    order = np.argsort(place, kind="stable")
    columns = [take(column, array, order) for column, array in zip(batch.schema.names, batch.columns, strict=True)]
    write_batch(folder / f"rows-{name}.arrow", pa.RecordBatch.from_arrays(columns, names=batch.schema.names))
    np.save(folder / f"bounds-{name}.npy", offsets_of(np.bincount(place, minlength=done)))
    return True


def sorted_rows(job: Job, first_bucket: int, last_bucket: int) -> Iterator[Sorted]:
    """The files that have the rows of these buckets, the last one included, after `index_rows` and all of `merge`."""
    for number, (first, last) in enumerate(_stretches(job)):
        if first <= last_bucket and first_bucket < last:
            names = [name for name in _names(job, number) if name is not None]
            bounds = np.array([np.load(job.work / f"bounds-{name}.npy") for name in names], np.int64)
            width = len(SPLITS) * (last - first) + 1
            yield Sorted(first, last, [job.work / f"rows-{name}.arrow" for name in names], bounds.reshape(len(names), width))


def _names(job: Job, stretch: int) -> list[str | None]:
    numbers = merges(job)
    if not numbers:
        return list(index_rows(job)["spills"])
    return [_merged(job, number)["files"][stretch] for number in numbers]
