"""Temporary folders that do not stay: what a process that was killed left, the next one removes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HELD = "held-by-escm2rec"  # a file in each of them, locked as long as its process lives


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder among the temporary files whose name begins so, and goes at the end; before that those of killed processes go."""
    remove_unheld(f"{prefix}*")
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        number = hold(Path(name))
        try:
            yield Path(name)
        finally:
            os.close(number)


def remove_unheld(pattern: str) -> None:
    """Remove the folders among the temporary files, by the pattern of their names, that this user's processes held and no one holds now."""
    for file in Path(tempfile.gettempdir()).glob(f"{pattern}/{HELD}"):
        with suppress(OSError):  # it is held, another user's, or gone
            _remove_unheld(file)


def _remove_unheld(file: Path) -> None:
    folder = file.parent
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        return
    number = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(number)


def hold(folder: Path) -> int:
    """Let this process be the one that holds a folder of its own, until it ends or closes the number."""
    number = os.open(folder / HELD, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return number
