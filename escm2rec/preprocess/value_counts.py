"""How often each value of a feature occurs: in memory while it fits, in runs on disk beyond."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pds
import pyarrow.parquet as pq

from escm2rec.preprocess.external import query
from escm2rec.preprocess.ragged import Int64s

MERGE_ROWS = 1 << 20  # partial counts held before they are merged
TABLE_ROWS = 1 << 20  # of what is read back


def count_values(values: Any, times: Int64s | None = None) -> pl.DataFrame:
    """Distinct values and how often each occurs, an occurrence counting `times`."""
    if times is not None:
        held = np.flatnonzero(times)
        values, times = values[held], times[held]
    if not len(values):
        return pl.DataFrame(schema={"value": pl.String if isinstance(values, pa.Array) else pl.Int64, "count": pl.Int64})
    if isinstance(values, pa.Array):
        counted = pc.value_counts(values)
        return pl.DataFrame({"value": pl.from_arrow(counted.field("values")), "count": pl.from_arrow(counted.field("counts"))})
    low, high = int(values.min()), int(values.max())
    if high - low < max(1024, 4 * len(values)):
        counts = np.bincount(values - low, weights=times)
        held = np.flatnonzero(counts)
        return pl.DataFrame({"value": held + low, "count": counts[held].astype(np.int64)})
    frame = pl.DataFrame({"value": values, "count": np.ones(len(values), dtype=np.int64) if times is None else times})
    return frame.group_by("value").agg(pl.col("count").sum())


class ValueCounter:
    """Adds up partial counts of one feature. `spill` moves them to disk, so that what is in memory is what its owner allows."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._parts: list[pl.DataFrame] = []
        self._merged = self._waiting = 0  # rows of the first part, and of those after it
        self._runs: list[Path] = []
        self.bytes = 0

    def add(self, counts: pl.DataFrame) -> None:
        """Add what `count_values` gave."""
        self._parts.append(counts)
        self._waiting += len(counts)
        self.bytes += int(counts.estimated_size())
        if self._waiting > max(MERGE_ROWS, self._merged):
            self._merge()

    def _merge(self) -> None:
        total = pl.concat(self._parts).group_by("value").agg(pl.col("count").sum())
        self._parts, self._merged, self._waiting = [total], len(total), 0
        self.bytes = int(total.estimated_size())

    def spill(self) -> None:
        """Move what is in memory to disk."""
        if not self._parts:
            return
        self._merge()
        run = self._folder / f"{self._name}-{len(self._runs)}.parquet"
        self._parts[0].write_parquet(run, compression="lz4", use_pyarrow=True)
        self._runs.append(run)
        self._parts, self._merged, self.bytes = [], 0, 0

    def by_count(self, min_count: int, max_size: int | None, memory_bytes: int) -> Iterator[pa.Table]:
        """Columns value and count of the values that occur `min_count` times: the most frequent first, then by value (strings by their
        bytes), at most `max_size`. The counter is empty afterwards."""
        self.spill()
        if not self._runs:
            return
        runs = pds.dataset(self._runs, schema=_schema(self._runs[0]), format="parquet")
        limit = "" if max_size is None else f"LIMIT {max_size}"
        sql = f"""SELECT value, CAST(sum("count") AS BIGINT) AS "count" FROM rows
                  GROUP BY value HAVING sum("count") >= {min_count} ORDER BY "count" DESC, value {limit}"""
        reader = runs.scanner(batch_readahead=1, fragment_readahead=1).to_reader()
        yield from query(sql, reader, self._folder / f"{self._name}.sort", memory_bytes, TABLE_ROWS)
        for run in self._runs:
            run.unlink()
        self._runs = []


def _schema(run: Path) -> pa.Schema:
    """Strings as 64-bit offsets, which a run of any size fits."""
    schema: pa.Schema = pq.read_schema(run)
    kind = pa.int64() if schema.field("value").type == pa.int64() else pa.large_string()
    return pa.schema([("value", kind), ("count", pa.int64())])
