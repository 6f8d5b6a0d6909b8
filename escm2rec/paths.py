"""Where a data set or a run lies: a local folder, or a folder of an object store by an fsspec URL such as `s3://bucket/set`."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import pyarrow.parquet as pq

from escm2rec.errors import ConfigError, DataError

OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
COPY_BYTES = 8 << 20  # asked of a store at a time


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of an fsspec file system, read by the few methods of `pathlib.Path` that a data set needs, and written as a copy is.

    DataError where the store does not let itself be read or written, FileNotFoundError where `read_text` and `open` find no file.
    """

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
        with telling(self):
            return bool(self.fs.exists(self.path))

    def is_dir(self) -> bool:
        """Whether there is a folder."""
        with telling(self):
            return bool(self.fs.isdir(self.path))

    def is_file(self) -> bool:
        """Whether there is a file."""
        with telling(self):
            return bool(self.fs.isfile(self.path))

    def state(self) -> dict[str, Any]:
        """Of a file: `bytes`, and as `modified` what its store tells of when, or which, it is."""
        with telling(self):
            self.fs.invalidate_cache()
            known = self.fs.info(self.path)
        told = next((known[name] for name in ("ETag", "etag", "LastModified", "mtime", "updated") if known.get(name)), None)
        return {"bytes": int(known["size"]), "modified": str(told)}

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What the pattern matches below it."""
        with telling(self):
            found = self.fs.glob(f"{self.path.rstrip('/')}/{pattern}")
        return (RemotePath(self.fs, each) for each in found)

    def read_text(self, encoding: str) -> str:
        """The whole file as text."""
        with telling(self, absent=False):
            text = bytes(self.fs.cat_file(self.path))
        return text.decode(encoding)

    def open(self) -> RemoteFile:
        """The file, to read bytes from."""
        with telling(self, absent=False):
            return RemoteFile(self, self.fs.open(self.path, "rb"))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below it, by the name that leads there from here, as the store has them now."""
        start = len(self.path.rstrip("/")) + 1
        with telling(self):
            self.fs.invalidate_cache()  # other ranks write there too
            found = self.fs.find(self.path, detail=True)
        return {path[start:]: int(known["size"]) for path, known in found.items() if path[start:]}

    def fetch(self, to: Path) -> None:
        """The file, to a local one. OSError where the disk does not take it."""
        with telling(self, local=True):
            self.fs.get_file(self.path, str(to))

    def put(self, source: Path) -> None:
        """Make it the copy of a local file; one that is cut off may leave a part of it on a local disk, where stores leave nothing."""
        with telling(self, doing="write"):
            self.fs.put_file(str(source), self.path)

    def remove(self) -> None:
        """Remove the file, or the folder with all that is in it."""
        with telling(self, doing="remove"):
            if "file" in self.fs.protocol:
                self.fs.rm(self.path, recursive=True)
            else:  # file by file: `rm` would read the path as a pattern, and remove a bucket with its last file
                for path in self.fs.find(self.path):
                    self.fs.rm_file(path)


class RemoteFile:
    """A file of a store. What the store says is told where it is said: what whoever reads it says then is of what it holds."""

    def __init__(self, path: RemotePath, file: IO[bytes]) -> None:
        self._path, self._file = path, file

    def read(self, size: int = -1) -> bytes:
        """So many bytes, or all that is left."""
        with telling(self._path, absent=False):
            return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        """As many bytes as fit; how many there were."""
        with telling(self._path, absent=False):
            return int(self._file.readinto(buffer))  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


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


def store_path(place: str) -> RemotePath:
    """A folder to write to, local ones too; ConfigError as of `data_path`."""
    path = data_path(place)
    if isinstance(path, RemotePath):
        return path
    import fsspec

    return RemotePath(fsspec.filesystem("file", auto_mkdir=True), str(path.absolute()))


@contextmanager
def telling(place: RemotePath, absent: bool = True, doing: str = "read", local: bool = False) -> Iterator[None]:
    """DataError where a store does not let itself be read or written: each has errors of its own, for no answer and for no right to.

    That a file is not there is told only with `absent`; what a full disk says is raised as it is with `local`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not absent:
            raise
        if local and isinstance(error, OSError) and error.errno in OF_DISKS:
            raise
        hint = "check its address, and the credentials and endpoint that the package of this protocol finds (s3fs: AWS_* variables)"
        raise DataError(f"cannot {doing} {place}: {type(error).__name__}: {error}", hint) from error


def not_read(what: str, error: Exception, damaged: str = "cannot be read") -> DataError:
    """What is said of a file of a data set, or of a part of it, that raised this when it was read.

    Of a damaged file pyarrow raises ArrowInvalid, or an OSError without a number; the system's have one, and are of who may read it, or of
    the disk. What a store says is told before (RemotePath).
    """
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        return DataError(f"{what} cannot be read: {os.strerror(error.errno)}", "check who may read it, and that its disk answers")
    return DataError(f"{what} {damaged}: {error}", "the data set is damaged: preprocess again")


def copy_folder(source: DataPath, to: Path) -> None:
    """Copy the files of a folder to a local one that is made for them."""
    if isinstance(source, Path):
        shutil.copytree(source, to)
        return
    to.mkdir()
    for file in source.glob("*"):
        with file.open() as remote, (to / file.name).open("wb") as local:
            shutil.copyfileobj(remote, local, COPY_BYTES)


def fetch_files(place: RemotePath, sizes: dict[str, int], to: Path) -> None:
    """Files of a folder on a store, by name, to the same names in a local one. DataError where one does not arrive with all its bytes."""
    for name, size in sizes.items():
        if not (to / name).resolve().is_relative_to(to.resolve()):  # a store's names are any text
            raise DataError(
                f"{place / name} would be fetched to a place outside of {to}", "remove it from the store, or find out who wrote it"
            )
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).fetch(to / name)
        if (arrived := (to / name).stat().st_size) != size:
            raise DataError(f"{arrived:,} of {size:,} bytes of {place / name} arrived")


@contextmanager
def open_parquet(path: DataPath) -> Iterator[pq.ParquetFile]:
    """A Parquet file: a local one mapped, a remote one read in few large requests."""
    if isinstance(path, Path):
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    else:
        with path.open() as source, pq.ParquetFile(source, pre_buffer=True) as file:
            yield file
