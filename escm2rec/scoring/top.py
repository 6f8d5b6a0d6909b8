"""The best rows of each user, of all inputs together.

While an input is scored, its best rows alone are kept, with SCORE; when all are, the best of all inputs are found, on disk beyond
memory, and each part is written once more with these rows and their `rank`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from escm2rec.errors import ConfigError
from escm2rec.preprocess.external import query
from escm2rec.preprocess.ragged import Int64s
from escm2rec.scoring.options import Layout
from escm2rec.scoring.output import PREDICTIONS, RANK, OutputColumn, PartWriter, Record
from escm2rec.scoring.parts import BEST

SCORE, BY = "\0score", "\0by"  # columns of what is kept meanwhile: what ranks a row, and its user where that is not written
MOST_ROWS = 1 << 20  # of an input's best ones, in memory
SORT_BYTES = 1 << 30
FOUND_ROWS = 1 << 20


@dataclass(frozen=True)
class Top:
    """`k` rows for each value of the column `by`, those of the greatest `score`; of equal ones those that come first in the input."""

    k: int
    by: str
    score: str = "p_ctcvr"

    @classmethod
    def of(cls, k: int | None, by: str | None, score: str | None, columns: Sequence[OutputColumn]) -> Top | None:
        """What the options say; ConfigError where they do not go together."""
        if k is None:
            if by is not None or score is not None:
                raise ConfigError(
                    f"{'--by' if by is not None else '--score'} goes with --top-k", "say how many rows each is to have: --top-k 10"
                )
            return None
        if by is None:
            raise ConfigError("--top-k needs --by", "name the column of the user: --by user_id")
        if score is not None and score not in PREDICTIONS:
            raise ConfigError(f"--score {score!r} is no prediction", f"these there are: {', '.join(PREDICTIONS)}")
        if RANK in [column.name for column in columns]:
            raise ConfigError(
                f"a column is to be written as {RANK!r}, and --top-k writes one", "give it another name: --columns NAME=COLUMN"
            )
        return cls(k, by, score or "p_ctcvr")


class BestRows:
    """The best rows of one input so far; memory is bounded, and then some that are not among the best are kept too."""

    def __init__(self, top: Top, by: str, writer: PartWriter) -> None:
        """`by` is the name of the column in the tables that are added."""
        self._top, self._by, self._writer = top, by, writer
        self._held: list[pa.Table] = []
        self._rows = 0

    def write(self, table: pa.Table) -> None:
        """Take rows, with SCORE."""
        self._held.append(table)
        self._rows += len(table)
        if self._rows > MOST_ROWS:
            self._shrink()
            if self._rows > MOST_ROWS // 2:
                self.flush()

    def flush(self) -> None:
        """Hand on the best ones."""
        self._shrink()
        for table in self._held:
            self._writer.write(table)
        self._held, self._rows = [], 0

    def _shrink(self) -> None:
        if self._held:
            table = pa.concat_tables(self._held)
            best = table.take(pa.array(_best(table, self._by, self._top.k)))
            self._held, self._rows = [best], len(best)


def _best(table: pa.Table, by: str, k: int) -> Int64s:
    """Places of the best rows, in order."""
    keys = pl.from_arrow(table.select([by, SCORE]).rename_columns(["by", "score"]))
    assert isinstance(keys, pl.DataFrame)
    best = keys.with_row_index("at").sort("score", descending=True, maintain_order=True).group_by("by", maintain_order=True).head(k)
    return np.sort(best["at"].to_numpy().astype(np.int64))


def check_key(column: pa.ChunkedArray, name: str) -> str | None:
    """What is wrong with a column to rank by, if anything: users are told apart by whole numbers or texts, which any file writes alike."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return None
    return f"--by {name}: the column is of type {column.type}; whole numbers or texts tell users apart"


def write_best(folder: Path, records: Sequence[Record], top: Top, by: str, columns: Sequence[str], layout: Layout) -> list[Record]:
    """Write the final parts from those in `folder/BEST`: `columns` of the best rows, in the order of the input, and their RANK.

    The same records, with the parts as they are now. What was written before, by a job that was killed here, is written anew.
    """
    for part in folder.glob("part-*.parquet"):
        part.unlink()
    best = folder / BEST
    ranks = _ranks(best, records, top, by, folder / "sorting")
    told, waiting = [], next(ranks, None)
    for number, record in enumerate(records):
        writer = PartWriter(folder, number, layout)
        first = 0
        for name in (part["path"] for part in record["parts"]):
            with pq.ParquetFile(best / name) as file:
                for batch in file.iter_batches(FOUND_ROWS):
                    at, rank, last = [], [], first + len(batch)
                    while waiting is not None and (waiting[0], waiting[1][0]) < (number, last):
                        inside = int(np.searchsorted(waiting[1], last))
                        at.append(waiting[1][:inside] - first)
                        rank.append(waiting[2][:inside])
                        waiting = (number, waiting[1][inside:], waiting[2][inside:]) if inside < len(waiting[1]) else next(ranks, None)
                    if at:
                        table = pa.Table.from_batches([batch]).select(columns).take(pa.array(np.concatenate(at)))
                        writer.write(table.append_column(RANK, pa.array(np.concatenate(rank), pa.int32())))
                    first = last
        told.append({**record, "parts": writer.finish(), BEST: record["parts"]})
    assert waiting is None
    shutil.rmtree(folder / "sorting", ignore_errors=True)
    return told


def _ranks(best: Path, records: Sequence[Record], top: Top, by: str, scratch: Path) -> Iterator[tuple[int, Int64s, Int64s]]:
    """Number of an input, places of the best rows among those that it has in `best`, in order, and their ranks."""
    batches = _keys(best, records, by)
    first = next(batches, None)
    if first is None:
        return
    reader = pa.RecordBatchReader.from_batches(first.schema, _then(first, batches))
    best_of_all = "SELECT input, place, row_number() OVER (PARTITION BY key ORDER BY score DESC, input, place) AS rank FROM rows"
    sql = f"SELECT * FROM ({best_of_all}) WHERE rank <= {top.k} ORDER BY input, place"
    for table in query(sql, reader, scratch, SORT_BYTES, FOUND_ROWS):
        inputs, at, rank = (table[name].to_numpy() for name in ("input", "place", "rank"))
        for number in np.unique(inputs).tolist():
            of_input = inputs == number
            yield number, at[of_input], rank[of_input]


def _then(first: pa.RecordBatch, others: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from others


def _keys(best: Path, records: Sequence[Record], by: str) -> Iterator[pa.RecordBatch]:
    """Of each row that is kept: its user as text, its score, its input and its place."""
    for number, record in enumerate(records):
        first = 0
        for name in (part["path"] for part in record["parts"]):
            with pq.ParquetFile(best / name) as file:
                for batch in file.iter_batches(FOUND_ROWS, columns=[by, SCORE]):
                    user = batch[by].dictionary_decode() if pa.types.is_dictionary(batch[by].type) else batch[by]
                    place = pa.array(np.arange(first, first + len(batch)))
                    text, inputs = user.cast(pa.large_string()), pa.array(np.full(len(batch), number))
                    yield pa.RecordBatch.from_pydict({"key": text, "score": batch[SCORE], "input": inputs, "place": place})
                    first += len(batch)
