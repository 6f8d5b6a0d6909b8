"""Parts of predictions, each whole or absent, and what is known of those that are done: by it a job goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from escm2rec.errors import DataError
from escm2rec.folder import sha256_of, write_json
from escm2rec.preprocess import RawFile
from escm2rec.training.run import Run

DONE = "done"  # in an unfinished folder: a record of each part, written after it
Record = dict[str, Any]

logger = logging.getLogger(__name__)


def job_identity(run: Run, files: Sequence[RawFile], kept: Sequence[str], batch_rows: int) -> str:
    """What a folder is made from: a job of another identity begins anew.

    The run is by what its manifest says, not by its path, which of one on a store is another each time. Inputs are by their paths; whether
    one changed, records say.
    """
    paths = [[str(path.resolve()) for path in file.all_paths] for file in files]
    made_from = [run.manifest, run.schema.hash(), paths, list(kept), batch_rows]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def take_up(folder: Path, files: Sequence[RawFile]) -> list[int]:
    """Numbers of the files that are to be scored; of those that are done, the inputs are as they were. What is half written goes."""
    for partial in folder.glob(".*.partial"):
        partial.unlink()
    (folder / DONE).mkdir(exist_ok=True)
    todo = []
    for number, file in enumerate(files):
        record = record_of(folder, number)
        if record is not None and [_at(each) for each in record["inputs"]] == states_of(file):
            continue
        if record is not None:
            logger.warning("%s changed since it was scored: it is scored again", file.path)
            (folder / DONE / f"{number}.json").unlink()
        (folder / part_name(number)).unlink(missing_ok=True)
        todo.append(number)
    if done := len(files) - len(todo):
        logger.info("%d of %d files are scored already", done, len(files))
    return todo


def part_name(number: int) -> str:
    """Of the file of a number, from 0."""
    return f"part-{number:05d}.parquet"


def record_of(folder: Path, number: int) -> Record | None:
    """Of a part that is done; None of one that is not."""
    try:
        record: Record = json.loads((folder / DONE / f"{number}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record


def states_of(file: RawFile) -> list[Record]:
    """By what a change of the inputs is noticed without reading them."""
    found = [(path, path.stat()) for path in file.all_paths]
    return [{"path": str(path), "bytes": state.st_size, "modified_ns": state.st_mtime_ns} for path, state in found]


def _at(told: Record) -> Record:
    return {key: told[key] for key in ("path", "bytes", "modified_ns")}


def finish_part(folder: Path, number: int, file: RawFile, before: list[Record], part: str | None, rows: int) -> None:
    """Record a part as done; DataError where an input changed since `before`."""
    inputs = [{**state, "sha256": sha256_of(Path(state["path"]))} for state in before]
    if states_of(file) != before:
        raise DataError(f"{file.path} changed while it was scored", "run the same command again when nothing writes it any more")
    write_json(folder / DONE / f"{number}.json", {"path": part, "input": str(file.path), "rows": rows, "inputs": inputs})


def finish(folder: Path, num_files: int) -> list[Record]:
    """All records, in the order of the input."""
    records = [record_of(folder, number) for number in range(num_files)]
    assert all(record is not None for record in records)
    return [record for record in records if record is not None]


def forget(folder: Path) -> None:
    """Drop the records, which the manifest has."""
    shutil.rmtree(folder / DONE)
