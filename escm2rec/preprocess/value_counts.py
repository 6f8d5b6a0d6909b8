"""How often each value of a feature occurs: in memory while it fits, in runs on disk beyond."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
IN_MEMORY_ROWS = 1 << 20  # of partial counts; of more, on disk


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
        counts = np.bincount(values - np.int64(low), weights=times)
        held = np.flatnonzero(counts)
        return pl.DataFrame({"value": held + low, "count": counts[held].astype(np.int64)})
    frame = pl.DataFrame(
        {"value": values.astype(np.int64, copy=False), "count": np.ones(len(values), dtype=np.int64) if times is None else times}
    )
    return frame.group_by("value").agg(pl.col("count").sum())


class ValueCounter:
    """Adds up partial counts of one feature. `spill` moves them to disk, so that what is in memory is what its owner allows."""

    def __init__(self, name: str, folder: Path, runs: Iterable[Path] = ()) -> None:
        """`runs` are what other counters of the feature spilled."""
        self._name, self._folder = name, folder
        self._parts: list[pl.DataFrame] = []
        self._merged = self._waiting = 0  # rows of the first part, and of those after it
        self.runs = list(runs)
        self.bytes = 0

    def add(self, counts: pl.DataFrame) -> None:
        """Add what `count_values` gave."""
        self._parts.append(counts)
        self._waiting += len(counts)
        self.bytes += int(counts.estimated_size())
        if self._waiting > max(MERGE_ROWS, self._merged):
            self._merge()

    def _merge(self) -> None:
        total = _summed(self._parts)
        self._parts, self._merged, self._waiting = [total], len(total), 0
        self.bytes = int(total.estimated_size())

    def spill(self) -> None:
        """Move what is in memory to disk."""
        if not self._parts:
            return
        self._merge()
        run = self._folder / f"{self._name}-{len(self.runs)}.parquet"
        self._parts[0].write_parquet(run, compression="lz4", use_pyarrow=True)
        self.runs.append(run)
        self._parts, self._merged, self.bytes = [], 0, 0

    def by_count(self, min_count: int, max_size: int | None, memory_bytes: int) -> Iterator[pa.Table]:
        """Columns value and count of the values that occur `min_count` times: the most frequent first, then by value (strings by their
        bytes), at most `max_size`."""
        self.spill()
        if self._is_small():
            total = self._total().filter(pl.col("count") >= min_count)
            ordered = total.sort(["count", "value"], descending=[True, False])
            yield from self._tables(ordered.head(len(ordered) if max_size is None else max_size))
            return
        limit = "" if max_size is None else f"LIMIT {max_size}"
        yield from self._query(f'HAVING sum("count") >= {min_count} ORDER BY "count" DESC, value {limit}', memory_bytes)

    def by_value(self, memory_bytes: int) -> Iterator[pa.Table]:
        """Columns value and count of all values, in the order of the values."""
        self.spill()
        if self._is_small():
            yield from self._tables(self._total().sort("value"))
            return
        yield from self._query("ORDER BY value", memory_bytes)

    def occurrences(self) -> int:
        """How many there are of all values together."""
        self.spill()
        return sum(pc.sum(batch["count"]).as_py() or 0 for run in self.runs for batch in pq.ParquetFile(run).iter_batches(TABLE_ROWS))

    def _is_small(self) -> bool:
        return sum(int(pq.read_metadata(run).num_rows) for run in self.runs) <= IN_MEMORY_ROWS

    def _total(self) -> pl.DataFrame:
        parts = [pl.DataFrame(pl.from_arrow(pq.read_table(run))) for run in self.runs]
        return _summed(parts or [pl.DataFrame(schema={"value": pl.Int64, "count": pl.Int64})])

    def _tables(self, counts: pl.DataFrame) -> Iterator[pa.Table]:
        if len(counts):
            yield counts.to_arrow().cast(_schema(self.runs[0]))

    def _query(self, order: str, memory_bytes: int) -> Iterator[pa.Table]:
        runs = pds.dataset(self.runs, schema=_schema(self.runs[0]), format="parquet")
        sql = f'SELECT value, CAST(sum("count") AS BIGINT) AS "count" FROM rows GROUP BY value {order}'
        reader = runs.scanner(batch_readahead=1, fragment_readahead=1).to_reader()
        for table in query(sql, reader, self._folder / f"{self._name}.sort", memory_bytes, TABLE_ROWS):
            yield table.cast(runs.schema)


def _summed(parts: list[pl.DataFrame]) -> pl.DataFrame:
    """Counts, each of distinct values, added up."""
    return pl.concat(parts).group_by("value").agg(pl.col("count").sum()) if len(parts) > 1 else parts[0]


def spill_largest(counters: Iterable[ValueCounter], limit: int) -> None:
    """When the counters take more than `limit` bytes, move the largest to disk, until they take half of it."""
    counters = sorted(counters, key=lambda counter: -counter.bytes)
    held = sum(counter.bytes for counter in counters)
    if held <= limit:
        return
    for counter in counters:
        if held <= limit // 2:
            return
        held -= counter.bytes
        counter.spill()


def _schema(run: Path) -> pa.Schema:
    """Strings as 64-bit offsets, which a run of any size fits."""
    schema: pa.Schema = pq.read_schema(run)
    kind = pa.int64() if schema.field("value").type == pa.int64() else pa.large_string()
    return pa.schema([("value", kind), ("count", pa.int64())])
