"""A finished run that lies on a store, for ranks that read a folder."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from escm2rec.disk import telling_of_disk
from escm2rec.errors import Escm2Error
from escm2rec.folder import MANIFEST, RUN_CONFIG, read_manifest
from escm2rec.paths import DataPath, RemotePath, fetch_files
from escm2rec.sharding.runtime import Runtime, on_each
from escm2rec.temporary import temporary_folder
from escm2rec.training.choice import CHOICE
from escm2rec.training.run import COVERAGE

T = TypeVar("T")
PREFIX = "escm2rec-run-"


def run_here(run: DataPath, runtime: Runtime) -> AbstractContextManager[Path]:
    """The folder of a run; of one on a store what its model needs, as of `folder_here`. DataError where there is no finished run."""
    return folder_here(run, runtime, _fetch)


@contextmanager
def folder_here(place: DataPath, runtime: Runtime, fetch_to: Callable[[RemotePath, Path], None]) -> Iterator[Path]:
    """A folder; of one on a store what `fetch_to` fetches, among the temporary files of each machine until this ends.

    Called by all ranks alike; the first of each machine fetches. DataError where it does not arrive; RunError where the disk does not take
    it. Errors of the block that name the folder name the place on the store instead.
    """
    if isinstance(place, Path):
        yield place
        return
    machines = _of_all((os.uname().nodename, os.environ.get("GROUP_RANK")), runtime)
    first = machines.index(machines[runtime.rank])
    with ExitStack() as stack:
        stack.enter_context(_ending_in_order())
        fetched: list[str] = [""]

        def fetch() -> None:
            if runtime.rank == first:
                with telling_of_disk(Path(tempfile.gettempdir()), "set TMPDIR to a folder of another disk and run the same command again"):
                    folder = stack.enter_context(temporary_folder(PREFIX))
                    fetch_to(place, folder)
                    fetched[0] = str(folder)

        on_each(runtime, fetch)
        folder = _of_all(fetched[0], runtime)[first]
        try:
            yield Path(folder)
        except Escm2Error as error:
            told = type(error)(error.message.replace(folder, str(place)), error.hint.replace(folder, str(place)))
            told.told_by_rank_0 = error.told_by_rank_0
            raise told from error


def _of_all(mine: T, runtime: Runtime) -> list[T]:
    every: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(every, mine, group=runtime.group)
    return every


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """A rank that is told to end (SIGTERM) takes its temporary folder with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fetch(run: RemotePath, to: Path) -> None:
    checkpoint = read_manifest(run, "run", frozenset({"checkpoint"}))["checkpoint"]
    sizes = run.sizes()
    needed = {MANIFEST, RUN_CONFIG, "schema.json", COVERAGE, CHOICE}
    names = [name for name in sizes if name in needed or name.startswith(("vocabulary/", f"{checkpoint}/"))]
    fetch_files(run, {name: sizes[name] for name in names}, to)
