"""Where a data set lies: a local folder, or a folder of an object store by an fsspec URL such as `s3://bucket/set`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from escm2rec.errors import ConfigError, DataError, Escm2Error


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of an fsspec file system, read by the few methods of `pathlib.Path` that a data set needs."""

    fs: Any
    path: str

    def __str__(self) -> str:
        return str(self.fs.unstrip_protocol(self.path))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.fs, f"{self.path.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The folder that holds it."""
        return RemotePath(self.fs, self.path.rstrip("/").rpartition("/")[0])

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return bool(self.fs.exists(self.path))

    def is_dir(self) -> bool:
        """Whether there is a folder."""
        return bool(self.fs.isdir(self.path))

    def is_file(self) -> bool:
        """Whether there is a file."""
        return bool(self.fs.isfile(self.path))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What the pattern matches below it."""
        return (RemotePath(self.fs, found) for found in self.fs.glob(f"{self.path.rstrip('/')}/{pattern}"))

    def read_text(self, encoding: str) -> str:
        """The whole file as text."""
        return bytes(self.fs.cat_file(self.path)).decode(encoding)

    def open(self) -> IO[bytes]:
        """The file, to read bytes from."""
        file: IO[bytes] = self.fs.open(self.path, "rb")
        return file


DataPath = Path | RemotePath


def data_path(place: str | DataPath) -> DataPath:
    """A path for a local folder and for `file://`, a RemotePath for any other URL.

    ConfigError when the URL's file system is unknown or its package is not installed.
    """
    if not isinstance(place, str) or "://" not in place:
        return place if isinstance(place, RemotePath) else Path(place)
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"cannot open {place}: {error}", "install the fsspec package of that protocol (s3fs, gcsfs, ...)") from error
    return Path(path) if "file" in fs.protocol else RemotePath(fs, path)


@contextmanager
def telling(place: DataPath) -> Iterator[None]:
    """DataError where a store does not let itself be read: each has errors of its own, for no answer and for no right to."""
    try:
        yield
    except Escm2Error:
        raise
    except Exception as error:
        if isinstance(place, Path):
            raise
        hint = "check its address, and the credentials and endpoint that the package of this protocol finds (s3fs: AWS_* variables)"
        raise DataError(f"cannot read {place}: {type(error).__name__}: {error}", hint) from error


def copy_folder(source: DataPath, to: Path) -> None:
    """Copy the files of a folder to a local one that is made for them."""
    if isinstance(source, Path):
        shutil.copytree(source, to)
        return
    to.mkdir()
    for file in source.glob("*"):
        source.fs.get_file(file.path, str(to / file.name))


@contextmanager
def open_parquet(path: DataPath) -> Iterator[pq.ParquetFile]:
    """A Parquet file: a local one mapped, a remote one read in few large requests."""
    if isinstance(path, Path):
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    else:
        with path.open() as source, pq.ParquetFile(source, pre_buffer=True) as file:
            yield file
