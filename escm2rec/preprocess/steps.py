"""The steps of preprocess as tasks whose outputs are whole or absent, so that any of them can run again, anywhere."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from escm2rec.config import DataConfig
from escm2rec.folder import telling_of_job, write_json
from escm2rec.preprocess.block import Request
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.portions import Portion

WORK = "work"  # in the unfinished folder, gone before it is complete
WORK_LAYOUT = 4  # of what steps leave there for each other: a job whose layout is another begins anew


@dataclass(frozen=True)
class Job:
    """What every step knows.

    `folder` is the unfinished data set, `memory_bytes` what one worker may take; `common` and `portions` are what is read of common files
    and of impressions, and `buckets` is how many equal parts the order of rows is cut into.
    """

    config: DataConfig
    request: Request
    folder: Path
    memory_bytes: int
    files: tuple[RawFile, ...]
    common: tuple[Portion, ...]
    portions: tuple[Portion, ...]
    buckets: int

    @property
    def work(self) -> Path:
        """Where the outputs of steps lie."""
        return self.folder / WORK

    @property
    def vocabulary(self) -> Path:
        """Where vocabularies lie."""
        return self.folder / "vocabulary"

    def once(self, name: str, make: Callable[[Path], dict[str, Any]], place: Path | None = None) -> dict[str, Any]:
        """`once` in `work/`."""
        return once(self.work, name, make, place)


def once(work: Path, name: str, make: Callable[[Path], dict[str, Any]], place: Path | None = None) -> dict[str, Any]:
    """What `make` returned (JSON) in its first whole run as the task of this name; no run follows.

    The files that it makes in the folder that it is given move to `place` (`work`) under their names. A run that is killed leaves nothing
    that counts, and one beside another leaves the same. RunError when the disk is full.
    """
    said = work / f"{name}.json"
    if said.exists():
        known: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
        return known
    # Told where it happens: by the time that the others hear of it, the folder is gone and there is room again.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=work, ignore_cleanup_errors=True) as folder, telling_of_job(work):
        result = make(Path(folder))
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, (place or work) / file.name)
        write_json(Path(folder) / said.name, result)  # where no other run of the task writes
        os.replace(Path(folder) / said.name, said)
    return result
