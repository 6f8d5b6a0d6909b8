"""Columns that are written to disk and then read in place: memory does not grow with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from escm2rec.preprocess.ragged import Array, Ragged, offsets_of


class ColumnFile:
    """A column that is appended to on disk and then read in place: memory does not grow with it."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path = path
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb")

    def append(self, values: Array) -> None:
        """Write values at the end."""
        np.ascontiguousarray(values, dtype=self._dtype).tofile(self._file)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def finish(self) -> Any:
        """Close the file and map it."""
        self.close()
        if self.path.stat().st_size == 0:
            return np.empty(0, dtype=self._dtype)
        return np.memmap(self.path, dtype=self._dtype, mode="r")


class SpilledColumn:
    """A raw or encoded column on disk, ragged or one value a row."""

    def __init__(self, stem: Path) -> None:
        self._stem = stem
        self._values: ColumnFile | None = None
        self._weights: ColumnFile | None = None
        self._lengths: ColumnFile | None = None

    def append(self, column: Any) -> None:
        """Write rows at the end."""
        values = column.values if isinstance(column, Ragged) else column
        if self._values is None:
            self._values = self._file("values", values.dtype)
        self._values.append(values)
        if isinstance(column, Ragged):
            self._lengths = self._lengths or self._file("lengths", np.int32)
            self._lengths.append(column.lengths)
            if column.weights is not None:
                self._weights = self._weights or self._file("weights", np.float32)
                self._weights.append(column.weights)

    def _file(self, what: str, dtype: Any) -> ColumnFile:
        return ColumnFile(self._stem.with_name(f"{self._stem.name}.{what}"), dtype)

    def close(self) -> None:
        """Close the files, finished or not."""
        for file in (self._values, self._weights, self._lengths):
            if file is not None:
                file.close()

    def finish(self) -> Any:
        """The whole column, read in place."""
        assert self._values is not None, "append at least once"
        values = self._values.finish()
        if self._lengths is None:
            return values
        return Ragged(values, offsets_of(self._lengths.finish()), self._weights.finish() if self._weights is not None else None)
