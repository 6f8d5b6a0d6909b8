"""Worker processes of preprocess and score. The command has them forked from a process that imports what they need while it does so.

A program that calls them gets processes that start by themselves: a fork server would stay with it, and be that of its own pools.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, util
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

from escm2rec.disk import free_space
from escm2rec.errors import RunError
from escm2rec.temporary import hold, remove_unheld

ONE_THREAD = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
SMALL_BYTES = 16 << 20  # of input: with less, processes take longer to start than to work
SEMAPHORES = 5  # of a ProcessPoolExecutor: three of the queue of calls, two of that of results
SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps them
STDIN = "<stdin>"

_server: ForkServerContext | None = None


def is_small(paths: Iterable[Path]) -> bool:
    """Whether these files, or those in a folder, are worked on sooner here than by other processes."""
    try:
        return sum(_bytes(path) for path in paths) < SMALL_BYTES
    except OSError:
        return True  # who reads it says why


def _bytes(path: Path) -> int:
    return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file()) if path.is_dir() else path.stat().st_size


def ready_workers(module: str) -> None:
    """Start the process that workers are forked from, which imports `module`, in a program that is this command alone."""
    global _server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process
    try:
        remove_unheld("pymp-*")  # as `multiprocessing` names the folder of the server's socket
        hold(Path(util.get_temp_dir()))
        with _environment():
            forkserver.ensure_running()
    except OSError:
        return  # its socket has no place, for one where TMPDIR is long
    finally:
        signal.signal(signal.SIGINT, before)
    _server = context


@contextmanager
def starting_workers() -> Iterator[ForkServerContext | SpawnContext]:
    """Where workers come from, while they start. RunError where there is no room for the semaphores of a pool."""
    context = _server or multiprocessing.get_context("spawn")
    with _environment(), _main_without_file():
        _try_semaphores(context)
        yield context


def _try_semaphores(context: ForkServerContext | SpawnContext) -> None:
    """A pool makes as many, and its error, which names no file, would be told as that of the output folder."""
    try:
        made = [context.Lock() for _ in range(SEMAPHORES)]
    except OSError as error:
        message = f"cannot start worker processes: their semaphores lie in {SHARED_MEMORY}: {error.strerror or error}"
        room = f"; {free_space(SHARED_MEMORY)}" if SHARED_MEMORY.is_dir() else ""
        raise RunError(message + room, "make room there (of a container: --shm-size), then run the same command again") from error
    del made


@contextmanager
def _main_without_file() -> Iterator[None]:
    """A program on stdin has no file, but a name, and every process would end as it looks for it to run it once more."""
    main = vars(sys.modules["__main__"])
    name = main.get("__file__")
    if name is None or (name != STDIN and Path(name).exists()):  # a file of that name is another program
        yield
        return
    del main["__file__"]
    try:
        yield
    finally:
        main["__file__"] = name


@contextmanager
def _environment() -> Iterator[None]:
    """One thread a process: read by libraries when they are loaded, so before a process starts."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
