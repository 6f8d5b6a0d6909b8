"""Parts of predictions, each whole or absent, and what is known of those that are done: by it a job goes on where it stopped."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from escm2rec.errors import DataError
from escm2rec.folder import MANIFEST, sha256_of, write_json
from escm2rec.scoring.inputs import LogFile
from escm2rec.scoring.output import files_of

DONE = "done"  # in an unfinished folder: a record of each part, written after it
CLAIMS = "claims"  # there too: which inputs ranks have taken
BEST = "best"  # the folder of what is kept while the best of all are looked for, and in a record what is there of its input
ROWS = "rows"  # and how many rows of each input are scored, int64 each
Record = dict[str, Any]

logger = logging.getLogger(__name__)


def take_up(folder: Path, files: Sequence[LogFile], places: Sequence[Path]) -> list[int]:
    """Numbers of the files that are to be scored; of those that are done, the inputs are as they were. What is half written goes, and what
    is in `places`, the folders of parts, of inputs that are not done."""
    shutil.rmtree(folder / CLAIMS, ignore_errors=True)
    (folder / CLAIMS).mkdir()
    (folder / ROWS).write_bytes(bytes(8 * len(files)))
    if not (folder / DONE).is_dir():
        (folder / DONE).mkdir()
        _restore_records(folder)
    todo = [number for number, file in enumerate(files) if not _is_done(folder, number, file)]
    for place in places:
        place.mkdir(exist_ok=True)
        for partial in place.glob(".part-*.partial"):
            partial.unlink()
        for number in todo:
            for part in files_of(place, number):
                part.unlink()
    if done := len(files) - len(todo):
        logger.info("%d of %d files are scored already", done, len(files))
    return todo


def _restore_records(folder: Path) -> None:
    """From the manifest, where a job ended between it and its place, or is to do what failed."""
    manifest = _manifest(folder)
    for number, record in enumerate(manifest.get("files", [])):
        write_record(folder, number, {**record, "parts": record[BEST]} if BEST in record else record)


def _manifest(folder: Path) -> Record:
    try:
        manifest: Record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest


def _is_done(folder: Path, number: int, file: LogFile) -> bool:
    record = record_of(folder, number)
    if record is None:
        return False
    if "error" not in record:
        if [_state(each) for each in record["inputs"]] == states_of(file):
            return True
        logger.warning("%s changed since it was scored: it is scored again", file.name)
    (folder / DONE / f"{number}.json").unlink()
    return False


def states_of(file: LogFile) -> list[Record]:
    """Of the files of an input: what tells that one changed; nothing of one that is not there any more."""
    try:
        return file.states()
    except (OSError, DataError):
        return []


def _state(told: Record) -> Record:
    return {key: value for key, value in told.items() if key != "sha256"}


def claimed(folder: Path, todo: Sequence[int]) -> Iterator[int]:
    """Those of the numbers that no other rank has taken, one at a time, each as the caller comes to it."""
    for number in todo:
        with suppress(FileExistsError):
            os.close(os.open(folder / CLAIMS / str(number), os.O_CREAT | os.O_EXCL))
            yield number


def tell_rows(folder: Path, number: int, rows: int) -> None:
    """Say how many rows of an input are scored."""
    file = os.open(folder / ROWS, os.O_WRONLY)
    try:
        os.pwrite(file, np.int64(rows).tobytes(), 8 * number)
    finally:
        os.close(file)


def rows_told(folder: Path) -> int:
    """Of all inputs, since the job was taken up."""
    return int(np.fromfile(folder / ROWS, np.int64).sum())


def record_of(folder: Path, number: int) -> Record | None:
    """Of an input that is done, or that failed and was skipped; None of another."""
    try:
        record: Record = json.loads((folder / DONE / f"{number}.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record


def write_record(folder: Path, number: int, record: Record) -> None:
    """Say that an input is done, or failed."""
    write_json(folder / DONE / f"{number}.json", record)


def inputs_of(file: LogFile, before: list[Record], here: Sequence[Path]) -> list[Record]:
    """What the manifest says of the files of an input; DataError where one changed since `before`. `here` is where they lie to be read."""
    try:
        inputs = [{**state, "sha256": sha256_of(path)} for state, path in zip(before, here, strict=True)]
    except OSError as error:
        raise DataError(f"{file.name} cannot be read: {error.strerror or error}", "was it removed while it was scored?") from error
    if states_of(file) != before:
        raise DataError(f"{file.name} changed while it was scored", "run the same command again when nothing writes it any more")
    return inputs


def records_of(folder: Path, num_files: int) -> list[Record]:
    """All records, in the order of the inputs."""
    records = [record_of(folder, number) for number in range(num_files)]
    assert all(record is not None for record in records)
    return [record for record in records if record is not None]


def take_back(out: Path, identity: str) -> bool:
    """Whether there are predictions of this job at `out` that lack files, which failed: then they are where an unfinished job goes on.

    They stay at `out` until that is whole; what both have is on the disk once.
    """
    manifest = _manifest(out)
    if manifest.get("made_from") != identity or not manifest.get("failed"):
        return False
    logger.info("%s lacks %d file(s), which failed: going on with them", out, manifest["failed"])
    partial = out.with_name(f".{out.name}.partial")
    if not partial.exists():
        shutil.copytree(out, partial, copy_function=link)
    return True


def link(source: str | Path, to: str | Path) -> None:
    """A second name for a file; a copy where there can be none."""
    try:
        os.link(source, to)
    except OSError:  # a file system without links
        shutil.copy2(source, to)


def is_empty(folder: Path) -> bool:
    """Whether nothing of an unfinished job is done."""
    return not any((folder / DONE).glob("*.json"))


def forget(folder: Path, names: Sequence[str]) -> None:
    """Drop what a finished folder does not need; the manifest has the records."""
    (folder / ROWS).unlink()
    for name in (DONE, CLAIMS, *names):
        shutil.rmtree(folder / name, ignore_errors=True)
