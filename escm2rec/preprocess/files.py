"""The raw files of a source, each with those that belong to it."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from escm2rec.config import SPLITS, AliccpSource, EventsSource, MatrixSource, Source
from escm2rec.errors import DataError
from escm2rec.folder import is_of_kind

ENCODED = (*SPLITS, "vocabulary")  # folders of a data set
PARQUET = b"PAR1"  # begins every such file
NAMES = 5  # of files, in a message
PART_MARK = {b"escm2rec": b"part of a data set"}
"""Key and value in the Parquet metadata of the parts that `write` makes: by it they are known wherever they are moved to."""


@dataclass(frozen=True)
class RawFile:
    """One file of impressions, with its common and truth files (Ali-CCP), its training matrix and feature files (matrix), or all click and
    conversion files of its log (events)."""

    path: Path
    common: Path | None = None
    truth: Path | None = None
    train: Path | None = None  # of a test matrix: what its ratings must not be in
    user_features: Path | None = None
    item_features: Path | None = None
    clicks: tuple[Path, ...] = ()
    conversions: tuple[Path, ...] = ()
    outcomes: Path | None = None  # of the impressions of an event log: what the join made of each row

    @property
    def name(self) -> str:
        """File name without its folder: what splits go by."""
        return self.path.name

    @property
    def all_paths(self) -> list[Path]:
        """Every path that is read for this file."""
        paths = (self.path, self.common, self.truth, self.train, self.user_features, self.item_features, *self.clicks, *self.conversions)
        return [path for path in paths if path is not None]


def raw_files(source: Source, path: Path, labels: bool = True) -> list[RawFile]:
    """The files of a source under `path` (a folder, or one file), in the order of their names.

    Truth files, test matrices, clicks and conversions are looked for with `labels` only. DataError when there are no files, when a file
    lacks one that belongs to it, or when one is of a data set, which escm2rec made.
    """
    if isinstance(source, MatrixSource):
        return _matrices(source, path, labels)
    if isinstance(source, EventsSource) and labels:
        return _events(source, path)
    key, pattern = pattern_of(source)
    found = _matching(path, key, pattern, labels)
    if isinstance(source, AliccpSource):
        return [_with_companions(source, skeleton, labels) for skeleton in found]
    return [RawFile(file) for file in found]


def pattern_of(source: Source) -> tuple[str, str]:
    """The key of `data.source` that says what files of impressions are named, and what it says."""
    if isinstance(source, AliccpSource):
        return "skeleton", source.skeleton
    if isinstance(source, MatrixSource):
        return "train", source.train
    return ("impressions", source.impressions) if isinstance(source, EventsSource) else ("files", source.files)


def named(names: Sequence[str]) -> str:
    """The first few of these names, and how many more there are."""
    more = len(names) - NAMES
    return ", ".join(names[:NAMES]) + (f" and {more:,} more" if more > 0 else "")


def _matching(path: Path, key: str, pattern: str, labels: bool) -> list[Path]:
    """The files of a pattern, that of `data.source.key`, in a folder, in the order of their names; a file is itself."""
    if path.is_file():
        check_readable(path)
        _refuse_made(path)
        return [path]
    if not path.is_dir():
        raise DataError(f"no raw logs at {path}", "check the path")
    found = sorted(entry for entry in path.iterdir() if fnmatch.fnmatchcase(entry.name, pattern))
    for entry in found:
        check_readable(entry)
    refuse_nested(path, pattern)
    if not found:
        held = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in path.iterdir())
        holds = f"it holds {named(held)}" if held else "it is empty"
        hint = f"set data.source.{key} to the names of the files, or pass their folder" if labels else "pass the files themselves"
        raise DataError(f"no file in {path} matches the pattern {pattern!r} of data.source.{key}: {holds}", hint)
    for entry in found:
        _refuse_made(entry)
    return found


def _events(source: EventsSource, folder: Path) -> list[RawFile]:
    """The impression files, each with all click and conversion files."""
    if folder.is_file():
        raise DataError(f"{folder} is no folder: impressions, clicks and conversions are read from one", "pass the folder")
    patterns = {"impressions": source.impressions, "clicks": source.clicks, "conversions": source.conversions}
    found = {table: _matching(folder, table, pattern, labels=True) for table, pattern in patterns.items()}
    owners: dict[Path, str] = {}
    for table, files in found.items():
        for file in files:
            if owner := owners.get(file):
                raise DataError(
                    f"{file} matches the patterns of {owner} ({patterns[owner]!r}) and {table} ({patterns[table]!r})",
                    f"narrow data.source.{owner} or data.source.{table}",
                )
            owners[file] = table
    clicks, conversions = tuple(found["clicks"]), tuple(found["conversions"])
    return [RawFile(file, clicks=clicks, conversions=conversions) for file in found["impressions"]]


def _matrices(source: MatrixSource, folder: Path, labels: bool) -> list[RawFile]:
    """The training matrix, and with `labels` the test matrix after it."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder: rating matrices are read from one, which holds {source.train}",
            "pass the folder; score predicts every pair, pick yours by user and item",
        )

    def path(name: str | None, key: str) -> Path | None:
        if name is not None and not (folder / name).is_file():
            raise DataError(f"no file {folder / name}", f"set data.source.{key}, or fetch the file")
        if name is None:
            return None
        check_readable(folder / name)
        return folder / name

    users, items = path(source.user_features, "user_features"), path(source.item_features, "item_features")
    train, test = path(source.train, "train"), path(source.test, "test") if labels else None
    assert train is not None
    files = [RawFile(train, user_features=users, item_features=items)]
    return files if test is None else [*files, RawFile(test, train=train, user_features=users, item_features=items)]


def check_readable(path: Path) -> None:
    """DataError for what has the name of a file and cannot be read as one: to pass it over would lose rows."""
    try:
        path.name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{str(path)!r}: its name is no UTF-8", "rename the file") from error
    if not path.is_file():
        what = "a folder" if path.is_dir() else "a link to nowhere" if path.is_symlink() else "no file"
        raise DataError(f"{path} is {what}, and its name is that of an input file", "move it, or set data.source to other names")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check who may read it") from error


def refuse_nested(path: Path, pattern: str) -> None:
    """DataError when files of the pattern lie deeper: to read only some in silence would lose rows."""
    for nested in sorted(path.glob("*/**/*")):
        hidden = any(part.startswith(".") for part in nested.relative_to(path).parts)
        if not hidden and nested.is_file() and fnmatch.fnmatchcase(nested.name, pattern):
            _refuse_made(nested)
            raise DataError(f"{nested} lies in a sub-folder: only files right in {path} are read", "move it, or pass its folder")


def _refuse_made(path: Path) -> None:
    """DataError for a file of a data set: it would be read as a log, whatever its numbers mean. Parts of before the mark are known by their
    folder, as vocabularies are."""
    folder = path.resolve().parent
    is_there = folder.name in ENCODED and is_of_kind(folder.parent, "data set")
    if is_there or is_part(path):
        whose = f" ({folder.parent})" if is_there else ""
        raise DataError(
            f"{path} is of a data set that escm2rec made{whose}: its values are encoded, it is no raw log",
            "pass the raw logs, and keep data sets (--out) outside of their folder",
        )


def is_part(path: Path) -> bool:
    """Whether a file is part of a data set, by PART_MARK. What is no Parquet, or damaged, has none: who reads it says so."""
    try:
        with path.open("rb") as file:
            if file.read(len(PARQUET)) != PARQUET:
                return False
        metadata = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return PART_MARK.items() <= metadata.items()


def _with_companions(source: AliccpSource, skeleton: Path, labels: bool) -> RawFile:
    before, after = source.skeleton.split("*")
    name = skeleton.name
    if not fnmatch.fnmatchcase(name, source.skeleton):
        raise DataError(
            f"{skeleton} does not match the skeleton pattern {source.skeleton!r}", "set data.source.skeleton, or pass the folder"
        )
    part = name[len(before) : len(name) - len(after)]

    def companion(pattern: str, what: str) -> Path:
        file = skeleton.with_name(pattern.replace("*", part))
        if not file.is_file():
            raise DataError(f"{skeleton} has no {what} file: {file} is missing", f"set data.source.{what}, or fetch the file")
        check_readable(file)
        return file

    truth = companion(source.truth, "truth") if source.truth is not None and labels else None
    return RawFile(skeleton, companion(source.common, "common"), truth)
