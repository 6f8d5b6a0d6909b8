"""The files to score: of paths, patterns and URLs, raw or encoded; and their rows as encoded blocks."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from escm2rec.config import KEPT_PREFIX, SPLITS, AliccpSource, MatrixSource, Source
from escm2rec.disk import telling_of_disk
from escm2rec.errors import ConfigError, DataError, Escm2Error
from escm2rec.folder import is_of_kind
from escm2rec.paths import DataPath, RemotePath, data_path, fetch_files
from escm2rec.preprocess import RawFile, raw_files
from escm2rec.preprocess.files import check_readable, is_part, pattern_of, refuse_nested
from escm2rec.preprocess.raw import EncodedBlock
from escm2rec.preprocess.rejections import NOT_WANTED, Rejected, Rejection
from escm2rec.preprocess.tables import READ_BYTES
from escm2rec.preprocess.where import Where
from escm2rec.reader.columns import encoded_columns
from escm2rec.reader.dataset import Dataset
from escm2rec.schema import Schema
from escm2rec.temporary import temporary_folder

PATTERN = frozenset("*?[")
FETCHED = "escm2rec-log-"  # folders of files of a store


@dataclass(frozen=True)
class LogFile:
    """One file to score. `raw` is a file of the model's source; `encoded` says that it is a part of a data set; one on a store, with what
    belongs to it, lies at `urls`. `fault` is why it cannot be scored at all, and what to do."""

    name: str
    raw: RawFile | None = None
    encoded: bool = False
    urls: tuple[str, ...] = ()
    fault: tuple[str, str] | None = None

    def states(self) -> list[dict[str, Any]]:
        """Of each file: what tells that it changed without reading it."""
        if self.raw is not None:
            found = [(path, path.stat()) for path in self.raw.all_paths]
            return [{"path": str(path), "bytes": state.st_size, "modified_ns": state.st_mtime_ns} for path, state in found]
        return [{"path": url, **_remote(url).state()} for url in self.urls]

    @property
    def path(self) -> str:
        """By which it is known."""
        return self.name if "://" in self.name else os.path.abspath(self.name)


def log_files(schema: Schema, inputs: Sequence[str], skips: bool = False) -> list[LogFile]:
    """The files of the inputs, one after the other: files, folders, patterns of `glob`, and URLs of them.

    DataError where there is none, or one cannot be read, unless it `skips` such files; and for what is encoded by another schema.
    ConfigError where a file is given twice.
    """
    found = [file for given in inputs for file in _files(schema, given, skips)]
    twice = [path for path, times in Counter(os.path.realpath(file.path) for file in found).items() if times > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is among the inputs twice", "give each file once: its rows would be scored twice")
    return found


def _files(schema: Schema, given: str, skips: bool) -> list[LogFile]:
    place = data_path(given)
    if PATTERN.isdisjoint(given) or (isinstance(place, Path) and place.exists()):
        return _of_place(schema, place, skips)
    if isinstance(place, Path):
        matching: list[DataPath] = [Path(path) for path in sorted(glob.glob(given, recursive=True))]
    else:
        root = RemotePath(place.fs, place.path.partition("*")[0].partition("?")[0].partition("[")[0].rpartition("/")[0])
        matching = sorted(root.glob(place.path.removeprefix(root.path).lstrip("/")), key=str)
    if not matching:
        raise DataError(f"no file matches {given!r}", "check the pattern; in a shell put it into quotes, so that it comes here as it is")
    return [file for path in matching for file in _of_place(schema, path, skips)]


def _of_place(schema: Schema, place: DataPath, skips: bool) -> list[LogFile]:
    if (split := _split_of(schema, place)) is not None:
        return split
    if isinstance(place, Path):
        if place.is_file() and is_part(place):
            return [_part(schema, place)]
        return _raw(schema.source, place, skips)
    if place.is_file():
        return [_on_store(schema.source, place)]
    _, pattern = pattern_of(schema.source)
    files = sorted(place.glob(pattern), key=str) if place.is_dir() else []
    if not files:
        raise DataError(f"no raw logs at {place}" + (f": it holds no {pattern}" if place.is_dir() else ""), "check the address")
    return [_on_store(schema.source, file) for file in files if file.is_file()]


def _raw(source: Source, place: Path, skips: bool) -> list[LogFile]:
    """Local files of the model's source; those that cannot be read with their fault, if it `skips` them."""
    try:
        return [LogFile(str(file.path), file) for file in raw_files(source, place, labels=False)]
    except DataError as error:
        if not skips or not place.exists() or isinstance(source, MatrixSource):
            raise
        if not place.is_dir():
            return [LogFile(str(place), fault=(error.message, error.hint))]
        _, pattern = pattern_of(source)
        entries = sorted(entry for entry in place.iterdir() if fnmatch.fnmatchcase(entry.name, pattern))
        if not any(entry.is_dir() for entry in entries):  # whose fault says so
            refuse_nested(place, pattern)
        found = [file for entry in entries for file in _entry(source, entry)]
        if all(file.fault is None for file in found):
            raise  # it is of the folder
        return found


def _entry(source: Source, entry: Path) -> list[LogFile]:
    try:
        check_readable(entry)
        return _raw(source, entry, skips=False)
    except DataError as error:
        return [LogFile(str(entry), fault=(error.message, error.hint))]


def _on_store(source: Source, file: RemotePath) -> LogFile:
    if isinstance(source, MatrixSource):
        raise DataError(f"{file}: rating matrices are read from a local folder", "copy them there")
    if not isinstance(source, AliccpSource):
        return LogFile(str(file), urls=(str(file),))
    before, after = source.skeleton.split("*")
    common = file.parent / source.common.replace("*", file.name[len(before) : len(file.name) - len(after)])
    if not common.is_file():
        raise DataError(f"{file} has no common file: {common} is missing", "set data.source.common, or put the file there")
    return LogFile(str(file), urls=(str(file), str(common)))


def _split_of(schema: Schema, place: DataPath) -> list[LogFile] | None:
    """The parts of a split of a data set, if the place is one."""
    if place.name in SPLITS and place.is_dir() and is_of_kind(place.parent, "data set"):
        dataset = Dataset.open(place.parent)
        _check_schema(schema, dataset.schema, str(place.parent))
        paths = [place.parent / entry["path"] for entry in dataset.manifest["splits"].get(place.name, {}).get("files", [])]
        return [_encoded(path) for path in paths]
    if place.is_dir() and is_of_kind(place, "data set"):
        raise DataError(f"{place} is a data set", f"give the split to score: {place / 'test'}")
    return None


def _part(schema: Schema, path: Path) -> LogFile:
    folder = path.resolve().parent.parent
    if is_of_kind(folder, "data set"):
        _check_schema(schema, Schema.load(folder / "schema.json"), str(folder))
    return _encoded(path)


def _encoded(path: DataPath) -> LogFile:
    if isinstance(path, Path):
        return LogFile(str(path), RawFile(path), encoded=True)
    return LogFile(str(path), urls=(str(path),), encoded=True)


def _check_schema(model: Schema, found: Schema, place: str) -> None:
    if model.hash() != found.hash():
        raise DataError(f"{place} is encoded by another schema than that of the model", "score the raw logs, or a data set of this schema")


def _remote(url: str) -> RemotePath:
    place = data_path(url)
    assert isinstance(place, RemotePath)
    return place


@contextmanager
def file_here(schema: Schema, file: LogFile) -> Iterator[RawFile]:
    """The file on this machine: one on a store among the temporary files, until this ends; then errors name its URL."""
    if file.fault is not None:
        raise DataError(*file.fault)
    if file.raw is not None:
        yield file.raw
        return
    hint = "set TMPDIR to a folder with room for a file of the input"
    with temporary_folder(FETCHED) as folder:
        with telling_of_disk(folder, hint):
            for url in file.urls:
                place = _remote(url)
                fetch_files(place.parent, {place.name: place.state()["bytes"]}, folder)
        try:
            first = folder / _remote(file.urls[0]).name
            yield RawFile(first) if file.encoded else raw_files(schema.source, first, labels=False)[0]
        except Escm2Error as error:
            place_of = str(_remote(file.urls[0]).parent)
            raise type(error)(error.message.replace(str(folder), place_of), error.hint.replace(str(folder), place_of)) from error


def encoded_blocks(
    file: Path, schema: Schema, keep: Sequence[str], block_rows: int, where: Where | None, rejected: Rejected
) -> Iterator[EncodedBlock]:
    """The rows of a part of a data set, as `RawEncoder.blocks` gives those of a raw file; nothing is counted of its features."""
    kept = dict.fromkeys([*keep, *(where.columns if where is not None else ())])
    wanted = [*encoded_columns(schema, labels=False), *(KEPT_PREFIX + name for name in kept)]
    group = 0
    try:
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES) as parquet:
            _check_columns(file, parquet.schema_arrow.names, wanted)
            for group in range(parquet.num_row_groups):
                for batch in parquet.iter_batches(block_rows, row_groups=[group], columns=wanted, use_threads=False):
                    table = pa.Table.from_batches([batch])
                    if where is not None:
                        table = _selected(table, where, file, rejected)
                    if len(table):
                        yield EncodedBlock(file, table, {})
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: row group {group} cannot be read: {error}", "the data set is damaged: preprocess again") from error


def _selected(table: pa.Table, where: Where, file: Path, rejected: Rejected) -> pa.Table:
    """The rows that are wanted; the others are counted."""
    named = table.select([KEPT_PREFIX + name for name in where.columns]).rename_columns(list(where.columns))
    places = where.places(named, file)
    if left_out := len(table) - len(places):
        rejected.add([Rejection(NOT_WANTED, str(file), "", left_out, [], [])])
    return table.take(pa.array(places)) if left_out else table


def _check_columns(file: Path, available: Sequence[str], wanted: Sequence[str]) -> None:
    for name in wanted:
        if name not in available:
            kept = [each.removeprefix(KEPT_PREFIX) for each in available if each.startswith(KEPT_PREFIX)]
            if name.startswith(KEPT_PREFIX):
                message = f"{file} keeps no column {name.removeprefix(KEPT_PREFIX)!r}; it keeps: {', '.join(kept) or 'none'}"
                raise DataError(message, "leave it out, or score the raw logs")
            raise DataError(f"{file} has no column {name!r}: it is encoded by another schema than that of the model", "score the raw logs")
