"""The Parquet parts of a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from escm2rec.errors import DataError
from escm2rec.folder import sha256_of

COUNTS = ("rows", "clicks", "conversions")

# Measured on grouped Ali-CCP rows (docs/decisions/0001-columnar-engine.md): plain values are written and read twice as fast as
# dictionaries, and are smaller, because neighbouring impressions of a user repeat the same lists.
PARQUET: dict[str, Any] = {"compression": "lz4", "use_dictionary": False, "write_statistics": False}


class SplitWriter:
    """Writes tables as `part-00000.parquet`, ...: `rows_per_file` rows a part, `rows_per_group` rows a row group."""

    def __init__(self, folder: Path, rows_per_file: int, rows_per_group: int) -> None:
        folder.mkdir()
        self.files: list[dict[str, Any]] = []
        self._folder, self._rows_per_file, self._rows_per_group = folder, rows_per_file, rows_per_group
        self._waiting: list[pa.Table] = []
        self._rows_waiting = 0
        self._writer: pq.ParquetWriter | None = None
        self._rows = self._clicks = self._conversions = 0
        self._weights = dict.fromkeys(COUNTS, 0.0)  # of the whole split
        self._has_weights = False

    def add(self, table: pa.Table) -> None:
        """Take rows; whole row groups are written at once. DataError when a kept column changes its type."""
        if self._waiting and (first := self._waiting[0].schema) != table.schema:
            for field in table.schema:
                if field != first.field(field.name):
                    raise DataError(
                        f"column {field.name!r} is of type {field.type}, in earlier rows it is of type {first.field(field.name).type}",
                        "use one type in all files, or do not keep the column",
                    )
        self._waiting.append(table)
        self._rows_waiting += len(table)
        while self._rows_waiting >= (group := self._next_group()):
            self._write(group)

    def _next_group(self) -> int:
        return min(self._rows_per_group, self._rows_per_file - self._rows)

    def _write(self, rows: int) -> None:
        waiting = pa.concat_tables(self._waiting)
        table = waiting.slice(0, rows)
        self._waiting, self._rows_waiting = [waiting.slice(rows)], len(waiting) - rows
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, **PARQUET)
        self._writer.write_table(table, row_group_size=rows)
        self._rows += rows
        self._clicks += pc.sum(table["click"]).as_py()
        self._conversions += pc.sum(table["conversion"]).as_py()
        if "weight" in table.column_names:
            self._has_weights = True
            weight = table["weight"].to_numpy().astype(np.float64)
            click, conversion = table["click"].to_numpy(), table["conversion"].to_numpy()
            for name, counted in zip(COUNTS, (weight, weight * click, weight * click * conversion), strict=True):
                self._weights[name] += float(counted.sum())
        if self._rows == self._rows_per_file:
            self._finish_part()

    @property
    def _path(self) -> Path:
        return self._folder / f"part-{len(self.files):05d}.parquet"

    def _finish_part(self) -> None:
        assert self._writer is not None
        self._writer.close()
        path = self._path
        counts = {"rows": self._rows, "clicks": self._clicks, "conversions": self._conversions}
        name = f"{self._folder.name}/{path.name}"
        self.files.append({"path": name, **counts, "bytes": path.stat().st_size, "sha256": sha256_of(path)})
        self._writer = None
        self._rows = self._clicks = self._conversions = 0

    def close(self) -> dict[str, Any]:
        """Write what waits; rows, clicks, conversions and files of the split, and the `weights` of the three where rows have them."""
        if self._rows_waiting:
            self._write(self._rows_waiting)
        if self._writer is not None:
            self._finish_part()
        totals = {name: sum(file[name] for file in self.files) for name in COUNTS}
        return {**totals, **({"weights": self._weights} if self._has_weights else {}), "files": self.files}
