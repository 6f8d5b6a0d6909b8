"""Raw logs encoded by the schema of a data set, for scoring: the same parsing and the same encoders as preprocess."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from escm2rec.config import EventsSource, TableSource
from escm2rec.disk import telling_of_disk
from escm2rec.errors import ConfigError, DataError
from escm2rec.parallel import default_workers, ordered_map
from escm2rec.preprocess.block import Request
from escm2rec.preprocess.encoder import Encoded, Encoder, Rows
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.ragged import Int64s
from escm2rec.preprocess.records import CommonRecords, RecordWriter, common_tasks, encode_records, index_records, open_records
from escm2rec.preprocess.rejections import Rejected, Rejection
from escm2rec.preprocess.sources import Opener
from escm2rec.preprocess.spilled import read_rows
from escm2rec.preprocess.transforms import add_crosses
from escm2rec.preprocess.vocabulary import check_vocabulary, write_lookup
from escm2rec.preprocess.where import Where
from escm2rec.schema import Schema

MEMORY_BYTES = 1 << 30
"""For sorting a vocabulary, once, before the first row."""
NO_ROOM = "run the same command again, or set TMPDIR to a folder with more room"


@dataclass(frozen=True)
class EncodedBlock:
    """Consecutive rows of one raw file, encoded; and what `shares.held` counts of each feature."""

    file: Path
    table: pa.Table
    held: dict[str, Int64s]


def write_lookups(schema: Schema, vocabulary_dir: Path, folder: Path) -> None:
    """Make `folder`, and in it of all vocabularies what a RawEncoder reads in place. DataError for one that is not the schema's."""
    folder.mkdir()
    for feature in schema.tables:
        if feature.encoding == "vocabulary":
            write_lookup(check_vocabulary(feature, vocabulary_dir), feature, folder, MEMORY_BYTES)


class RawEncoder:
    """Encodes raw files by a schema, one after the other; memory and open files do not grow with their number or size."""

    def __init__(
        self,
        schema: Schema,
        lookups: Path,
        keep: Sequence[str],
        block_rows: int,
        labels: bool = False,
        where: Where | None = None,
        workers: int | None = None,
    ) -> None:
        """`lookups` is what `write_lookups` made. A block has at most `block_rows` rows, and is made on one of `workers` threads, by
        default one a processor. ConfigError where `where` is asked of no table."""
        if where is not None and not isinstance(schema.source, TableSource | EventsSource):
            raise ConfigError(f"--where is for tables, and this model reads {schema.source.kind}", "leave it out")
        self._request = Request.of(schema.features, keep, labels, where)
        self._opener = Opener(schema.source, self._request, block_rows)
        self._encoder = Encoder(schema, lookups, keep)
        self._block_rows, self._workers = block_rows, workers or default_workers()

    def blocks(self, file: RawFile, rejected: Rejected) -> Iterator[EncodedBlock]:
        """Every usable row of a file (from `raw_files`), in order, as the encoded columns of the schema and `kept.<column>` of each column
        to keep. A file without rows gives no block. Others are counted in `rejected`, or refused as it says: DataError."""
        with tempfile.TemporaryDirectory(prefix="escm2rec-") as folder, telling_of_disk(Path(folder), NO_ROOM):
            records, common = self._common(file, Path(folder), rejected)
            for block in ordered_map(self._opener.open(file, records).tasks(), self._workers):
                _add(rejected, block.rejections)
                features = add_crosses(block, self._request.crosses).features
                rows = Rows(self._encoder.columns(features, str(file.path)), block.labels, block.extras, block.common)
                for start in range(0, len(block), self._block_rows):
                    stop = min(start + self._block_rows, len(block))
                    places = None if stop - start == len(block) else np.arange(start, stop)
                    yield EncodedBlock(file.path, *self._encoder.table(rows, places, common))

    def _common(self, file: RawFile, folder: Path, rejected: Rejected) -> tuple[CommonRecords | None, dict[str, Encoded]]:
        """The common records of a file, raw and encoded, on disk in `folder`; nothing for other sources."""
        columns = self._opener.columns
        if columns is None or file.common is None:
            return None, {}
        writer = RecordWriter(folder, "records", columns)
        for block in ordered_map(common_tasks(file.common, columns), self._workers):
            _add(rejected, block.rejections)
            writer.add(block)
        rejection = index_records(file.common, writer.finish(), columns, folder, "index")
        _add(rejected, [rejection] if rejection is not None else [])
        records = open_records(folder, "index", columns, writer.files)
        features = columns.request.features
        for feature in features:
            encode_records([records], feature, partial(self._encoder.encode, feature), folder / feature.name)
        return records, {feature.name: read_rows(folder / feature.name) for feature in features}


def encode_raw(
    schema: Schema,
    vocabulary_dir: Path,
    inputs: Sequence[RawFile],
    keep: Sequence[str],
    block_rows: int = 65_536,
    labels: bool = False,
) -> Iterator[EncodedBlock]:
    """Every row of the files (from `raw_files`), in their order, as the encoded columns of `schema` and `kept.<column>` for each of `keep`.

    A block has at most `block_rows` rows of one file; a file without rows gives no block. Labels, weights and truth are read only with
    `labels`, and then as they are in the file. A bad row is a DataError: a score for every row, or none.
    """
    with tempfile.TemporaryDirectory(prefix="escm2rec-") as workspace, telling_of_disk(Path(workspace), NO_ROOM):
        write_lookups(schema, vocabulary_dir, Path(workspace) / "lookups")
        encoder = RawEncoder(schema, Path(workspace) / "lookups", keep, block_rows, labels)
        for file in inputs:
            yield from encoder.blocks(file, Rejected(refuse=True))


def _add(rejected: Rejected, rejections: list[Rejection]) -> None:
    try:
        rejected.add(rejections)
    except DataError as error:
        raise DataError(error.message, "mend the input, or leave such rows out and have them counted: --bad-rows count") from error
