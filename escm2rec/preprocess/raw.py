"""Raw logs encoded by the schema of a data set, for scoring: the same parsing and the same encoders as preprocess."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from escm2rec.errors import DataError
from escm2rec.preprocess.block import Request
from escm2rec.preprocess.encoder import Encoder
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.parallel import default_workers, ordered_map
from escm2rec.preprocess.rejections import Rejected, Rejection
from escm2rec.preprocess.sources import Opener, common_of
from escm2rec.schema import Schema

MEMORY_BYTES = 1 << 30
"""For sorting a vocabulary, once, before the first row."""


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
    request = Request(schema.features, tuple(dict.fromkeys(keep)), labels)
    workers = default_workers()
    rejected = Rejected(refuse=True)
    with tempfile.TemporaryDirectory(prefix="escm2rec-") as workspace:
        encoder = Encoder(schema, vocabulary_dir, Path(workspace) / "vocabulary", MEMORY_BYTES, keep)
        for number, file in enumerate(inputs):
            folder = Path(workspace) / str(number)
            opened = Opener(schema.source, request, folder, rejected, workers, block_rows).open(file)
            records = common_of(opened)
            common = encoder.common(records, folder / "encoded") if records is not None else None
            for block in ordered_map(opened.tasks(), workers):
                _refuse(rejected, block.rejections)
                for table, _ in encoder.tables(block, common, block_rows):
                    yield EncodedBlock(file.path, table)
            shutil.rmtree(folder, ignore_errors=True)  # a table makes none


def _refuse(rejected: Rejected, rejections: list[Rejection]) -> None:
    try:
        rejected.add(rejections)
    except DataError as error:
        raise DataError(error.message, "mend the input: every row gets a score, or none") from error
