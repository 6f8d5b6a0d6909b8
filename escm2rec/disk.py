"""What is said where a disk is full or may not be written. Libraries say it each in a way of their own."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from escm2rec.errors import Escm2Error, RunError

CUT_SHORT = 0  # a write that nobody says the reason of
LIMIT = "raise the limit on the size of a file (ulimit -f)"
STEPS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: LIMIT,
    CUT_SHORT: f"make room there, or {LIMIT}",
    errno.EACCES: "mend its permissions",
    errno.EPERM: "mend its permissions",
    errno.EROFS: "let the file system be written",
}
"""Numbers of the system's errors, and what to do about each."""
DISK_LIMIT = "max_temp_directory_size"  # duckdb's: by default what was free when it started
FULL = (errno.ENOSPC, errno.EDQUOT, CUT_SHORT)  # of which it helps to know how much is free
WORDS = {
    **{os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)},  # polars and duckdb, among their own
    "Not enough free space to write": errno.ENOSPC,  # numpy, before it writes
    " requested and ": CUT_SHORT,  # numpy, after it did
    DISK_LIMIT: errno.ENOSPC,
}


@contextmanager
def telling_of_disk(folder: Path, hint: str, needs: str = "") -> Iterator[None]:
    """RunError where the block fails because something could not be written in `folder`; `hint` is what to do when that is mended, `needs`
    how much room it takes.

    Python and pyarrow raise an OSError with its number, numpy one without, polars and duckdb errors that are none. What fails otherwise is
    raised as it is, as is an error that names a file elsewhere, which was read.
    """
    try:
        yield
    except Escm2Error:
        raise
    except Exception as error:
        number, place = _number(error), _place(error, folder)
        if number is None or place is None:
            raise
        room = [free_space(folder), needs] if number in FULL else []
        message = "; ".join([f"cannot write {place}: {_said(error, number)}", *filter(None, room)])
        raise RunError(message, f"{STEPS[number]}, then {hint}") from error


def _number(error: Exception) -> int | None:
    """Which of STEPS an error is, if any."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in STEPS else None
    return next((number for words, number in WORDS.items() if words in str(error)), None)


def _place(error: Exception, folder: Path) -> str | None:
    """What could not be written: the file that the error names, or the folder; None where the file lies elsewhere."""
    names = (getattr(error, name, None) for name in ("filename2", "filename"))  # the first is what a copy is made to
    name = next((name for name in names if isinstance(name, str)), None)
    return str(folder) if name is None else name if Path(name).is_relative_to(folder) else None


def _said(error: Exception, number: int) -> str:
    if number == CUT_SHORT:
        return f"a write was cut short ({error})"
    if not isinstance(error, OSError) or error.errno is None:
        return str(error).partition("\n")[0]
    return os.strerror(number) if number in (*FULL, errno.EFBIG) else error.strerror or ""  # pyarrow names the file only there


def free_space(folder: Path) -> str:
    """How much is free where a folder is, or would be."""
    there = os.statvfs(next(place for place in (folder, *folder.parents) if place.is_dir()))
    free = f"{_size(there.f_bavail * there.f_frsize)} of {_size(there.f_blocks * there.f_frsize)} are free there"
    return f"{free}, and no number for another file (inode)" if there.f_files and not there.f_favail else free


def _size(bytes: int) -> str:
    return f"{bytes / 1e9:,.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:,.1f} MB"
