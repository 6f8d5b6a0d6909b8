"""Which row of a table of one data set stands for the same as which row of a table of another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from escm2rec.preprocess.external import database
from escm2rec.preprocess.vocabulary import check_vocabulary
from escm2rec.schema import Feature

JOIN_BYTES = 1 << 30  # what a join takes before it goes to disk
ROWS = pa.schema([pa.field("row", pa.int32(), nullable=False), pa.field("from_row", pa.int32())])
ROW_GROUP = 1 << 20
EVERY = "SELECT range::INTEGER AS row, range::INTEGER AS from_row FROM range({rows})"
BY_VALUE = """
SELECT range::INTEGER AS row, {shared}::INTEGER AS from_row FROM range({oov_rows})
UNION ALL SELECT now.row, before.row FROM now LEFT JOIN before ON now.value = before.value
ORDER BY row
"""


def why_not(before: Feature | None, now: Feature) -> str | None:
    """Why no row of the one table stands for what a row of the other stands for; None where some may.

    Features are the same by name. A row of a vocabulary stands for its value, the rows before it for the values that are hashed to them, a
    hashed row for those that are hashed to it (for ever the same), a bucket for the numbers between two boundaries.
    """
    if before is None or not before.is_table:
        return "the source has no such table"
    for name in ("encoding", "value_type", "cross"):
        was, is_now = getattr(before, name), getattr(now, name)
        if was != is_now:
            return f"{name} was {_told(was)}, is {_told(is_now)}"
    if now.encoding == "hash" and before.num_embeddings != now.num_embeddings:
        return f"hash_size was {before.num_embeddings}, is {now.num_embeddings}: values have other rows"
    if now.encoding == "buckets" and before.boundaries != now.boundaries:
        return "its buckets have other boundaries"
    return None


def write_matches(before: Feature, old: Path, now: Feature, new: Path, path: Path) -> int:
    """Write the columns row (all of the new table, in order) and from_row (of the old one, null where there is none). How many there are.

    `old` and `new` hold the vocabularies. Rows that out-of-vocabulary values share match where their number is equal. Of tables that
    `why_not` lets pass; DataError where a vocabulary is not what its schema was made with.
    """
    by_value = now.encoding == "vocabulary"
    shared = "range" if before.oov_rows == now.oov_rows else "NULL"
    sql = BY_VALUE.format(shared=shared, oov_rows=now.oov_rows) if by_value else EVERY.format(rows=now.num_embeddings)
    scratch, matched = path.with_name(f".{path.stem}.join"), 0
    with (
        database(scratch, JOIN_BYTES, hint="give max_size to the feature") as connection,
        pq.ParquetWriter(path, ROWS, compression="zstd") as writer,
    ):
        for name, feature, folder in (("now", now, new), ("before", before, old)):
            if by_value:
                connection.register(name, ds.dataset(check_vocabulary(feature, folder), format="parquet"))
        for batch in connection.sql(sql).to_arrow_reader(ROW_GROUP):
            writer.write_table(pa.Table.from_batches([batch]).cast(ROWS))
            matched += len(batch) - batch["from_row"].null_count
    shutil.rmtree(scratch, ignore_errors=True)
    return matched


def read_matches(path: Path, first: int, count: int) -> Any:
    """from_row of `count` rows from `first` on, [count], int32; -1 where there is none."""
    rows = pq.read_table(path, columns=["from_row"], filters=[("row", ">=", first), ("row", "<", first + count)])
    return pc.fill_null(rows["from_row"], -1).to_numpy()


def _told(value: Any) -> str:
    return " x ".join(value) if isinstance(value, tuple) else str(value)
