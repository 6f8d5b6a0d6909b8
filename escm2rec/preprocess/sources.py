"""Opens raw files of any kind, so that the rest of preprocess knows blocks only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from escm2rec.config import AliccpSource, MatrixSource, Source
from escm2rec.preprocess.aliccp import SkeletonFile
from escm2rec.preprocess.aliccp_columns import AliccpColumns
from escm2rec.preprocess.block import RawBlock, Request
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.matrix import MatrixFile
from escm2rec.preprocess.records import CommonRecords
from escm2rec.preprocess.tables import TableFile

BLOCK_ROWS = 65_536  # of a table or a matrix


class OpenFile(Protocol):
    """A raw file that can be read any number of times."""

    file: RawFile

    def tasks(self, start: int = 0, stop: int | None = None, first_row: int = 0) -> Iterator[Callable[[], RawBlock]]:
        """One task a block, in the order of the file, or of a range of it (`portions.Range`); tasks may run on any thread."""


class Opener:
    """Opens raw files for one request."""

    def __init__(self, source: Source, request: Request, block_rows: int | None = None) -> None:
        self._source, self._request, self._block_rows = source, request, block_rows or BLOCK_ROWS
        self.columns = AliccpColumns(request) if isinstance(source, AliccpSource) else None

    def open(self, file: RawFile, records: CommonRecords | None) -> OpenFile:
        """Open one file; of Ali-CCP with its common records."""
        if isinstance(self._source, MatrixSource):
            return MatrixFile(file, self._source, self._request, self._block_rows)
        if not isinstance(self._source, AliccpSource):
            return TableFile(file, self._source, self._request, self._block_rows)
        assert records is not None
        assert self.columns is not None
        return SkeletonFile(file, self.columns, records)
