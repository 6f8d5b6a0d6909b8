"""A data set on disk: its schema, manifest and the row groups of its splits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import count as count_up
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from escm2rec.config import Split
from escm2rec.errors import DataError
from escm2rec.folder import read_manifest
from escm2rec.paths import DataPath, data_path, not_read, open_parquet
from escm2rec.schema import Schema


@dataclass(frozen=True)
class RowGroup:
    """One Parquet row group: the unit that is decoded and shuffled at a time."""

    path: DataPath
    index: int  # in its file
    first_row: int  # in its file
    number: int  # in its split
    start: int  # of its first row, in its split
    num_rows: int


@dataclass(frozen=True)
class Dataset:
    """A complete data set folder. With `half` 0 or 1, only every second row group of the training split is read: for cross-fitting."""

    path: DataPath
    schema: Schema
    manifest: dict[str, Any]
    half: int | None = None

    @classmethod
    def open(cls, path: str | DataPath) -> Dataset:
        """Open a data set at a local path or fsspec URL; DataError when it is absent, incomplete, or its schema and manifest disagree."""
        path = data_path(path)
        manifest = read_manifest(path, "data set", frozenset({"schema_hash", "splits"}))
        schema = Schema.load(path / "schema.json")
        if manifest.get("schema_hash") != schema.hash():
            raise DataError(
                f"the data set at {path} mixes two runs: manifest and schema.json differ in their schema hash", "preprocess again"
            )
        if (rate := manifest.get("negative_keep_rate", 1.0)) < 1 and not schema.has_weight:
            raise DataError(
                f"the data set at {path} kept its unclicked training impressions at rate {rate:g} and has no weights to correct that",
                "preprocess again: data.negative_keep_rate gives each kept one a weight, the one correction there is",
            )
        for feature in schema.tables:
            vocabulary = path / "vocabulary" / f"{feature.name}.parquet"
            if feature.encoding == "vocabulary" and not vocabulary.is_file():
                raise DataError(f"{vocabulary} is missing, the schema names it", "the data set is damaged: preprocess again")
        return cls(path, schema, manifest)

    def identity(self, split: Split) -> str:
        """SHA-256 of what the manifest says of a split's files: equal for the same rows in the same order only."""
        rows = self.manifest["splits"].get(split, {})
        told = rows if self.half is None else [rows, self.half]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def split_counts(self, split: Split) -> dict[str, int]:
        """`rows`, `clicks` and `conversions` of a split; DataError when the split is empty."""
        counts = self.manifest["splits"].get(split, {})
        if not counts.get("rows"):
            filled = [name for name, each in self.manifest["splits"].items() if each.get("rows")]
            raise DataError(f"the data set at {self.path} has no rows in split {split!r}", f"it has rows in: {', '.join(filled) or 'none'}")
        return {name: int(counts[name]) for name in ("rows", "clicks", "conversions")}

    def weighted_counts(self, split: Split) -> dict[str, float]:
        """The same, each row counting its weight where the data set has weights."""
        counts = self.split_counts(split)
        weights = self.manifest["splits"][split].get("weights", {})
        return {name: float(weights.get(name, count)) for name, count in counts.items()}

    def row_groups(self, split: Split) -> list[RowGroup]:
        """The row groups of a split in the order of the manifest, checked against it."""
        groups: list[RowGroup] = []
        number, start = count_up(), 0
        for entry in self.manifest["splits"].get(split, {}).get("files", []):
            path = self.path / entry["path"]
            metadata = _parquet_metadata(path)
            if metadata.num_rows != entry["rows"]:
                raise DataError(
                    f"{path} has {metadata.num_rows} rows, the manifest says {entry['rows']}", "the file was changed: preprocess again"
                )
            first_row = 0
            for index in range(metadata.num_row_groups):
                rows = metadata.row_group(index).num_rows
                groups.append(RowGroup(path, index, first_row, next(number), start, rows))
                first_row, start = first_row + rows, start + rows
        filled = [group for group in groups if group.num_rows]
        return filled if self.half is None or split != "train" else filled[self.half :: 2]


def _parquet_metadata(path: DataPath) -> pq.FileMetaData:
    try:
        with open_parquet(path) as file:
            return file.metadata
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing, the manifest names it", "the data set is damaged: preprocess again") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise not_read(str(path), error, "is not a Parquet file") from error
