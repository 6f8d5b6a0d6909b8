"""The step that fits: from what the training impressions hold, the vocabulary, the buckets or the moments of each feature."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from escm2rec.config import FeatureConfig
from escm2rec.folder import sha256_of
from escm2rec.preprocess.block import RawColumn
from escm2rec.preprocess.buckets import count_numbers, fit_boundaries
from escm2rec.preprocess.moments import Moments
from escm2rec.preprocess.ragged import Int64s, Ragged
from escm2rec.preprocess.read import first_records, read, records_of, spill_names
from escm2rec.preprocess.steps import Job
from escm2rec.preprocess.value_counts import ValueCounter, count_values
from escm2rec.preprocess.vocabulary import fit_vocabulary, write_lookup
from escm2rec.schema import Feature

TIMES = "times.npy"  # how often training rows point at each common record


def add_times(job: Job) -> None:
    """Write TIMES from what was read; nothing where the source has no common records."""
    count = int(first_records(records_of(job))[-1])
    times = np.zeros(count, dtype=np.int64)
    for name in spill_names(job):
        records, part = np.load(job.work / f"times-{name}.npy")
        times[records] += part  # each record once a file
    np.save(job.work / TIMES, times)


def fit(job: Job, number: int) -> dict[str, Any]:
    """Fit feature `number`: what the schema says of it beside the config. A vocabulary and its lookup are written."""
    feature = job.config.features[number]
    if feature.buckets is not None:
        return job.once(f"fit-{feature.name}", lambda folder: _fit_buckets(job, feature, folder))
    if feature.kind == "numeric":
        return job.once(f"fit-{feature.name}", lambda folder: _fit_moments(job, feature))
    if feature.hash_size is not None:
        return {"value_type": _value_type(job, feature), "encoding": "hash", "num_embeddings": feature.hash_size}
    if feature.managed_size is not None:
        return {"value_type": _value_type(job, feature), "encoding": "managed", "num_embeddings": feature.managed_size}
    return job.once(f"fit-{feature.name}", lambda folder: _fit_vocabulary(job, feature, folder))


def _told(job: Job) -> Iterator[dict[str, Any]]:
    return (read(job, portion) for portion in range(len(job.portions)))


def _value_type(job: Job, feature: FeatureConfig) -> str:
    types = (told["types"].get(feature.name) for told in _told(job))
    return next((str(found["type"]) for found in types if found is not None), "int64")


def _fit_moments(job: Job, feature: FeatureConfig) -> dict[str, Any]:
    moments = Moments()
    for told in _told(job):
        moments.add(Moments(**told["moments"][feature.name]))
    for column, times in _common(job, feature):
        moments.add(Moments.of_column(column, feature.log1p, times))  # type: ignore[arg-type]
    return {"mean": moments.mean, "std": moments.std}


def _fit_buckets(job: Job, feature: FeatureConfig, folder: Path) -> dict[str, Any]:
    assert feature.buckets is not None
    with _counted(job, feature, folder) as counter:
        boundaries = fit_boundaries(counter, feature.buckets, job.memory_bytes // 2)
    return {"encoding": "buckets", "num_embeddings": len(boundaries) + 1, "boundaries": boundaries}


@contextmanager
def _counted(job: Job, feature: FeatureConfig, folder: Path) -> Iterator[ValueCounter]:
    """The counts of all training values of a feature."""
    runs = [job.work / run for told in _told(job) for run in told["runs"][feature.name]]
    scratch = folder / "scratch"
    scratch.mkdir()
    counter = ValueCounter(feature.name, scratch, runs)
    for column, times in _common(job, feature):
        if isinstance(column, Ragged):
            counter.add(count_values(column.values, np.repeat(times, column.lengths)))
        else:
            counter.add(count_numbers(column, times))
        if counter.bytes > job.memory_bytes // 4:
            counter.spill()
    yield counter
    shutil.rmtree(scratch)


def _fit_vocabulary(job: Job, feature: FeatureConfig, folder: Path) -> dict[str, Any]:
    path = folder / f"{feature.name}.parquet"
    with _counted(job, feature, folder) as counter:
        size = fit_vocabulary(feature, counter, path, job.memory_bytes // 2)
    fitted = {
        "value_type": _value_type(job, feature),
        "encoding": "vocabulary",
        "num_embeddings": feature.oov_rows + size,
        "oov_rows": feature.oov_rows,
    }
    write_lookup(path, Feature.of(feature).model_copy(update=fitted), folder, job.memory_bytes // 2)
    fitted["vocabulary_sha256"] = sha256_of(path)
    return fitted


def _common(job: Job, feature: FeatureConfig) -> Iterator[tuple[RawColumn, Int64s]]:
    """The raw column of common records, and how often training rows point at each; none of a cross, which is of whole impressions."""
    records = records_of(job)
    if not records or feature.cross is not None:
        return
    times, done = np.load(job.work / TIMES, mmap_mode="r"), 0
    for each in records:
        for column in each.raw(Feature.of(feature)):
            yield column, np.asarray(times[done : done + len(column)])
            done += len(column)
