"""Worker processes of preprocess: forked from one that has imported what they need, which starts while this process still imports."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

ONE_THREAD = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}
SMALL_BYTES = 16 << 20  # of input: with less, processes take longer to start than to work


def is_small(paths: Iterable[Path]) -> bool:
    """Whether these files, or those in a folder, are worked on sooner here than by other processes."""
    try:
        return sum(_bytes(path) for path in paths) < SMALL_BYTES
    except OSError:
        return True  # who reads it says why


def _bytes(path: Path) -> int:
    return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file()) if path.is_dir() else path.stat().st_size


def ready_workers() -> ForkServerContext:
    """Start the process that workers are forked from, unless there is one in this process's service already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["escm2rec.preprocess"])
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)  # read by libraries when they are loaded
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context
