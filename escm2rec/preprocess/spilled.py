"""Numpy columns that are written to disk and then read in place: memory does not grow with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from escm2rec.preprocess.ragged import Array, Ragged


class ColumnFile:
    """A column that is appended to on disk and then read in place."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path = path
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb")

    def append(self, values: Array) -> None:
        """Write values at the end."""
        np.ascontiguousarray(values, dtype=self._dtype).tofile(self._file)

    def finish(self) -> Any:
        """Close the file and map it."""
        self._file.close()
        return read_column(self.path, self._dtype)


def read_column(path: Path, dtype: Any) -> Any:
    """A finished column, in place."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class RowsWriter:
    """Appends encoded rows to files: `STEM.values.TYPE`, and of ragged rows `STEM.offsets.int64` and `STEM.weights.float32`."""

    def __init__(self, stem: Path) -> None:
        self._stem = stem
        self._files: dict[str, ColumnFile] = {}
        self._end = 0

    def append(self, column: Any) -> None:
        """Write rows at the end."""
        if not isinstance(column, Ragged):
            self._file("values", column.dtype).append(column)
            return
        self._file("values", column.values.dtype).append(column.values)
        first = "offsets" not in self._files
        offsets = self._file("offsets", np.int64)
        if first:
            offsets.append(np.zeros(1, np.int64))
        offsets.append(column.offsets[1:] + self._end)
        self._end += len(column.values)
        if column.weights is not None:
            self._file("weights", np.float32).append(column.weights)

    def _file(self, what: str, dtype: Any) -> ColumnFile:
        if what not in self._files:
            self._files[what] = ColumnFile(self._stem.with_name(f"{self._stem.name}.{what}.{np.dtype(dtype).name}"), dtype)
        return self._files[what]

    def finish(self, nothing: Any) -> None:
        """Close the files; `nothing` is a column without rows, which says what files there are when nothing was appended."""
        if not self._files:
            self.append(nothing)
        for file in self._files.values():
            file.finish()


def read_rows(stem: Path) -> Any:
    """The rows that a RowsWriter wrote, in place."""
    parts: dict[str, Any] = {}
    for path in stem.parent.glob(f"{stem.name}.*"):
        what, kind = path.name.removeprefix(f"{stem.name}.").split(".")
        parts[what] = read_column(path, kind)
    return Ragged(parts["values"], parts["offsets"], parts.get("weights")) if "offsets" in parts else parts["values"]
