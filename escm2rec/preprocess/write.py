"""The steps that write: common records encoded once, and the Parquet parts of the splits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from escm2rec.config import KEPT_PREFIX, SPLITS, Split
from escm2rec.folder import sha256_of
from escm2rec.preprocess.encoder import Encoder, Rows, encode
from escm2rec.preprocess.files import PART_MARK
from escm2rec.preprocess.merge import rows_of, sorted_rows
from escm2rec.preprocess.ragged import Int64s, offsets_of
from escm2rec.preprocess.read import LABEL, records_of
from escm2rec.preprocess.records import encode_records
from escm2rec.preprocess.spill import MappedBatch, holds, one_batch, read_batch, write_batch
from escm2rec.preprocess.spilled import read_rows
from escm2rec.preprocess.steps import Job
from escm2rec.preprocess.vocabulary import open_lookup
from escm2rec.schema import Schema

COUNTS = ("rows", "clicks", "conversions")

FOUR_BYTES = (pa.int32(), pa.float32())


def layout_of(schema: pa.Schema) -> dict[str, Any]:
    """How parts are written, by measurement (docs/decisions/0010): plain values and lz4, numbers with their bytes apart."""
    numbers = [field.name for field in schema if field.type in FOUR_BYTES]
    return {"compression": "lz4", "use_dictionary": False, "write_statistics": False, "use_byte_stream_split": numbers or False}


def encode_common(job: Job, number: int) -> dict[str, Any]:
    """Encode feature `number` of all common records; crosses are not of records."""
    feature = Schema.load(job.folder / "schema.json").features[number]
    if feature.cross is not None:
        return {}

    def make(folder: Path) -> dict[str, Any]:
        lookup = open_lookup(feature, job.work) if feature.is_table else None
        encode_records(records_of(job), feature, lambda raw: encode(feature, raw, lookup), folder / f"common-{feature.name}")
        return {}

    return job.once(f"encode-{feature.name}", make)


def kept_types(job: Job) -> pa.Schema:
    """The kept columns with the type of their values, after `merge`.

    Files of the input may differ in it where a column holds no value, null being a type of its own; so may buckets, parts of one split must
    not. A column without any value takes another type than null if it has one anywhere.
    """

    if not job.config.keep:
        return pa.schema([])

    def make(folder: Path) -> dict[str, Any]:
        left = [KEPT_PREFIX + name for name in job.config.keep]
        types = dict.fromkeys(left, pa.null())
        for path in (path for rows in sorted_rows(job, 0, job.buckets - 1) for path in rows.batches):
            if not left:  # as a rule after the first
                break
            batch = read_batch(path)
            types |= {name: batch[name].type for name in left if pa.types.is_null(types[name]) or holds(name, batch[name])}
            left = [name for name in left if not holds(name, batch[name])]
        write_batch(folder / "kept.arrow", pa.RecordBatch.from_pylist([], pa.schema(types)))
        return {}

    job.once("kept", make)
    return read_batch(job.work / "kept.arrow").schema


class Part(NamedTuple):
    """Rows `first` to before `last` of a split, in its order: one file."""

    split: Split
    number: int
    first: int
    last: int


def parts_of(job: Job) -> list[Part]:
    """The files to write: `rows_per_file` rows each, the last of a split what is left."""
    size = job.config.rows_per_file
    return [
        Part(split, number, first, min(first + size, rows))
        for split, rows in zip(SPLITS, rows_of(job).sum(axis=1).tolist(), strict=True)
        for number, first in enumerate(range(0, rows, size))
    ]


def write(job: Job, part: Part) -> dict[str, Any]:
    """Write one part: its counts as the manifest has them, the sums of its `weights` if any, and what its features `held`."""
    name = f"part-{part.number:05d}"
    return job.once(f"write-{part.split}-{name}", lambda folder: _write(job, part, folder / f"{name}.parquet"), job.folder / part.split)


def _write(job: Job, part: Part, path: Path) -> dict[str, Any]:
    schema = Schema.load(job.folder / "schema.json")
    encoder, kept = Encoder(schema, job.work), kept_types(job)
    common = {feature.name: read_rows(job.work / f"common-{feature.name}") for feature in job.request.features} if records_of(job) else {}
    writer = _PartWriter(path, job.config.rows_per_group)
    for batch, places in _buckets(job, part):
        rows = _rows(encoder, batch, kept)
        for start in range(0, len(places), job.config.rows_per_group):
            writer.add(*encoder.table(rows, places[start : start + job.config.rows_per_group], common))
    return {"path": f"{part.split}/{path.name}", **writer.close(), "bytes": path.stat().st_size, "sha256": sha256_of(path), **writer.told}


def _buckets(job: Job, part: Part) -> Iterator[tuple[pa.RecordBatch, Int64s]]:
    """The buckets that hold rows of a part, and the places of these in order."""
    split = SPLITS.index(part.split)
    starts = offsets_of(rows_of(job)[split])
    first_bucket, last_bucket = (int(np.searchsorted(starts, row, side="right")) - 1 for row in (part.first, part.last - 1))
    for rows in sorted_rows(job, first_bucket, last_bucket):
        mapped = [MappedBatch(path) for path in rows.batches]
        for bucket in range(max(rows.first, first_bucket), min(rows.last, last_bucket + 1)):
            low, high = starts[bucket : bucket + 2].tolist()
            if low == high:
                continue
            cuts = zip(mapped, rows.cuts(split, bucket), strict=True)
            batch = one_batch([each.copy(start, stop) for each, (start, stop) in cuts if stop > start])
            order = np.argsort(batch["key"].to_numpy().view(np.uint64), kind="stable")
            yield batch, order[max(part.first, low) - low : min(part.last, high) - low]


def _rows(encoder: Encoder, batch: pa.RecordBatch, kept_types: pa.Schema) -> Rows:
    """Encoded rows of a bucket."""
    names = batch.schema.names
    features = encoder.stored(batch)
    labels = {name.removeprefix(LABEL): batch[name].to_numpy() for name in names if name.startswith(LABEL)}
    found = {field.name: batch[field.name] for field in kept_types}
    found |= {field.name: pa.nulls(len(batch), field.type) for field in kept_types if found[field.name].type != field.type}
    kept = {name.removeprefix(KEPT_PREFIX): column for name, column in found.items()}
    return Rows(features, labels, kept, batch["record"].to_numpy() if "record" in names else None)


class _PartWriter:
    """Writes tables as row groups of `rows_per_group` rows; the last has what is left."""

    def __init__(self, path: Path, rows_per_group: int) -> None:
        self._path, self._rows_per_group = path, rows_per_group
        self._waiting: list[pa.Table] = []
        self._rows_waiting = 0
        self._writer: pq.ParquetWriter | None = None
        self._counts = dict.fromkeys(COUNTS, 0)
        self._weights: dict[str, float] | None = None
        self._held: dict[str, Int64s] = {}

    def add(self, table: pa.Table, held: dict[str, Int64s]) -> None:
        """Take rows, and what is held in them; whole row groups are written at once."""
        for name, counts in held.items():
            self._held[name] = self._held.get(name, 0) + counts
        self._waiting.append(table)
        self._rows_waiting += len(table)
        while self._rows_waiting >= self._rows_per_group:
            self._write(self._rows_per_group)

    def _write(self, rows: int) -> None:
        waiting = pa.concat_tables(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        table = waiting.slice(0, rows)
        self._waiting, self._rows_waiting = [waiting.slice(rows)], len(waiting) - rows
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, **layout_of(table.schema))
        self._writer.write_table(table, row_group_size=rows)
        for name, count in zip(COUNTS, (rows, pc.sum(table["click"]).as_py(), pc.sum(table["conversion"]).as_py()), strict=True):
            self._counts[name] += count
        if "weight" in table.column_names:
            self._weigh(table)

    def _weigh(self, table: pa.Table) -> None:
        weight = table["weight"].to_numpy().astype(np.float64)
        click, conversion = table["click"].to_numpy(), table["conversion"].to_numpy()
        weights = self._weights or dict.fromkeys(COUNTS, 0.0)
        for name, counted in zip(COUNTS, (weight, weight * click, weight * click * conversion), strict=True):
            weights[name] += float(counted.sum())
        self._weights = weights

    def close(self) -> dict[str, int]:
        """Write what waits; rows, clicks and conversions."""
        if self._rows_waiting:
            self._write(self._rows_waiting)
        assert self._writer is not None
        self._writer.add_key_value_metadata(PART_MARK)
        self._writer.close()
        return self._counts

    @property
    def told(self) -> dict[str, Any]:
        """What the manifest has of the split as a whole."""
        return {"weights": self._weights, "held": {name: counts.tolist() for name, counts in self._held.items()}}
