"""Opens raw files of any kind, so that the rest of preprocess knows blocks only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from escm2rec.config import AliccpSource, MatrixSource, Source
from escm2rec.preprocess.aliccp import SkeletonFile
from escm2rec.preprocess.aliccp_columns import AliccpColumns
from escm2rec.preprocess.block import RawBlock, Request
from escm2rec.preprocess.common import CommonRecords, read_common
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.matrix import MatrixFile
from escm2rec.preprocess.rejections import Rejected
from escm2rec.preprocess.tables import TableFile

BLOCK_ROWS = 65_536  # of a table or a matrix


class OpenFile(Protocol):
    """A raw file that can be read any number of times."""

    file: RawFile

    def tasks(self) -> Iterator[Callable[[], RawBlock]]:
        """One task a block, in the order of the file; tasks may run on any thread."""


class Opener:
    """Opens raw files for one request. Common records are read on opening, into folders under `workspace`."""

    def __init__(
        self,
        source: Source,
        request: Request,
        workspace: Path,
        rejected: Rejected,
        workers: int,
        block_rows: int = BLOCK_ROWS,
    ) -> None:
        self._source, self._request = source, request
        self._workspace, self._rejected, self._workers, self._block_rows = workspace, rejected, workers, block_rows
        self._columns = AliccpColumns(request) if isinstance(source, AliccpSource) else None

    def open(self, file: RawFile) -> OpenFile:
        """Open one file; its bad common records are counted, or refused, here."""
        if isinstance(self._source, MatrixSource):
            return MatrixFile(file, self._source, self._request, self._block_rows)
        if not isinstance(self._source, AliccpSource):
            return TableFile(file, self._source, self._request, self._block_rows)
        assert file.common is not None
        assert self._columns is not None
        common = read_common(file.common, self._columns, self.folder(file), self._rejected, self._workers)
        return SkeletonFile(file, self._columns, common)

    def folder(self, file: RawFile) -> Path:
        """Where the raw common records of a file are kept."""
        return self._workspace / f"{file.name}.raw"


def common_of(opened: OpenFile) -> CommonRecords | None:
    """The common records of an Ali-CCP file; None for others."""
    return opened.common if isinstance(opened, SkeletonFile) else None
