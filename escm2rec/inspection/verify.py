"""Whether the files of a data set are those that were written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from escm2rec.config import SPLITS
from escm2rec.errors import DataError
from escm2rec.parallel import default_workers, ordered_map
from escm2rec.paths import DataPath
from escm2rec.progress import Progress
from escm2rec.reader.dataset import Dataset


@dataclass(frozen=True)
class _Written:
    """A file as it was written; `size` None where that was not noted."""

    path: DataPath
    size: int | None
    sha256: str


def verify(dataset: Dataset) -> dict[str, int]:
    """Read every part and vocabulary of a data set, wherever it lies, and compare them with what was noted when they were written.

    Parts must have the size and SHA-256 that the manifest says, vocabularies the SHA-256 that the schema says; the schema itself was
    compared with its hash and that of the manifest when the data set was opened.

    Returns how many files and bytes were read. Raises DataError with the first file that is not as it was written, and how many are not.
    """
    written = _written(dataset)
    damaged: list[tuple[DataPath, str]] = []
    total = 0
    with Progress("verify", len(written), unit="files") as progress:
        for file, (size, fault) in zip(written, ordered_map(map(_check, written), default_workers()), strict=True):
            total += size
            damaged += [(file.path, fault)] if fault else []
            progress.add(1, file.path.name)
    if damaged:
        path, fault = damaged[0]
        count = f"{len(damaged):,} of {len(written):,} files {'is' if len(damaged) == 1 else 'are'} damaged"
        raise DataError(f"{path} {fault}; {count}", "copy the data set again from where it is whole, or preprocess again")
    return {"files": len(written), "bytes": total}


def _written(dataset: Dataset) -> list[_Written]:
    """All files that a checksum was noted of."""
    entries: list[dict[str, Any]] = [entry for split in SPLITS for entry in dataset.manifest["splits"].get(split, {}).get("files", [])]
    parts = [_Written(dataset.path / entry["path"], entry["bytes"], entry["sha256"]) for entry in entries]
    vocabularies = [
        _Written(dataset.path / "vocabulary" / f"{feature.name}.parquet", None, feature.vocabulary_sha256)
        for feature in dataset.schema.tables
        if feature.vocabulary_sha256 is not None
    ]
    return [*parts, *vocabularies]


def _check(file: _Written) -> Callable[[], tuple[int, str]]:
    return lambda: _fault(file)


def _fault(file: _Written) -> tuple[int, str]:
    """Size of a file, and what is wrong with it, if anything. DataError when its store does not answer."""
    try:
        with closing(_open(file.path)) as source:
            size = source.seek(0, os.SEEK_END)
            if file.size is not None and size != file.size:
                return size, f"has {size:,} bytes, the manifest says {file.size:,}"
            source.seek(0)
            found = hashlib.file_digest(source, "sha256").hexdigest()
    except FileNotFoundError:
        return 0, "is missing"
    except OSError as error:
        if not isinstance(file.path, Path):
            raise
        return 0, f"cannot be read: {error.strerror or error}"
    if found != file.sha256:
        said = "schema" if file.size is None else "manifest"
        return size, f"has the SHA-256 {found[:12]}..., the {said} says {file.sha256[:12]}..."
    return size, ""


def _open(path: DataPath) -> Any:
    return path.open("rb") if isinstance(path, Path) else path.open()
