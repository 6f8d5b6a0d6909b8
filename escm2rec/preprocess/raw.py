"""Raw logs encoded by the schema of a data set, for scoring: the same parsing and the same encoders as preprocess."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from escm2rec.disk import telling_of_disk
from escm2rec.errors import DataError
from escm2rec.parallel import default_workers, ordered_map
from escm2rec.preprocess.block import Request
from escm2rec.preprocess.encoder import Encoded, Encoder, Rows
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.records import CommonRecords, RecordWriter, common_tasks, encode_records, index_records, open_records
from escm2rec.preprocess.rejections import Rejected, Rejection
from escm2rec.preprocess.sources import Opener
from escm2rec.preprocess.spilled import read_rows
from escm2rec.preprocess.transforms import add_crosses
from escm2rec.preprocess.vocabulary import check_vocabulary, write_lookup
from escm2rec.schema import Schema

MEMORY_BYTES = 1 << 30
"""For sorting a vocabulary, once, before the first row."""
NO_ROOM = "run the same command again, or set TMPDIR to a folder with more room"


@dataclass(frozen=True)
class EncodedBlock:
    """Consecutive rows of one raw file, encoded."""

    file: Path
    table: pa.Table


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
    request = Request.of(schema.features, keep, labels)
    opener = Opener(schema.source, request, block_rows)
    workers = default_workers()
    with tempfile.TemporaryDirectory(prefix="escm2rec-") as workspace, telling_of_disk(Path(workspace), NO_ROOM):
        lookups = Path(workspace) / "lookups"
        lookups.mkdir()
        for feature in schema.tables:
            if feature.encoding == "vocabulary":
                write_lookup(check_vocabulary(feature, vocabulary_dir), feature, lookups, MEMORY_BYTES)
        encoder = Encoder(schema, lookups, keep)
        for number, file in enumerate(inputs):
            folder = Path(workspace) / str(number)
            folder.mkdir()
            records, common = _common(opener, encoder, file, folder, workers)
            for block in ordered_map(opener.open(file, records).tasks(), workers):
                _refuse(block.rejections)
                features = add_crosses(block, request.crosses).features
                rows = Rows(encoder.columns(features, str(file.path)), block.labels, block.extras, block.common)
                for start in range(0, len(block), block_rows):
                    places = np.arange(start, min(start + block_rows, len(block)))
                    yield EncodedBlock(file.path, encoder.table(rows, places, common)[0])
            shutil.rmtree(folder)


def _common(opener: Opener, encoder: Encoder, file: RawFile, folder: Path, workers: int) -> tuple[CommonRecords | None, dict[str, Encoded]]:
    """The common records of a file, raw and encoded, on disk in `folder`; nothing for other sources."""
    columns = opener.columns
    if columns is None or file.common is None:
        return None, {}
    writer = RecordWriter(folder, "records", columns)
    for block in ordered_map(common_tasks(file.common, columns), workers):
        _refuse(block.rejections)
        writer.add(block)
    rejection = index_records(file.common, writer.finish(), columns, folder, "index")
    _refuse([rejection] if rejection is not None else [])
    records = open_records(folder, "index", columns, writer.files)
    features = columns.request.features
    for feature in features:
        encode_records([records], feature, partial(encoder.encode, feature), folder / feature.name)
    return records, {feature.name: read_rows(folder / feature.name) for feature in features}


def _refuse(rejections: list[Rejection]) -> None:
    try:
        Rejected(refuse=True).add(rejections)
    except DataError as error:
        raise DataError(error.message, "mend the input: every row gets a score, or none") from error
