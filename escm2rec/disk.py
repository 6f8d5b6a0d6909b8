"""What is said where a disk is full or may not be written. Libraries say it each in a way of their own."""

from __future__ import annotations

import errno
import os
import re
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
DENIED = (errno.EACCES, errno.EPERM)  # only ever of a file that is named: without a name they are of something else
LIBRARIES = ("duckdb", "_duckdb", "polars")  # what their errors are of is said in words alone
WORDS = {
    **{os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, *DENIED)},
    "Not enough free space to write": errno.ENOSPC,  # numpy, before it writes
    r"\d+ requested and \d+ written": CUT_SHORT,  # numpy, after it did
    DISK_LIMIT: errno.ENOSPC,
}
"""What LIBRARIES say, and an OSError without a number, as polars and numpy raise it."""
PLACE = re.compile(r"""local file '(.*?)'|"(/.*?)"|'(/.*?)'|(?<!\S)(/\S+?)(?=[:,.;)]*(?:\s|$))""")
"""A file in what pyarrow, duckdb and polars say of it."""


@contextmanager
def telling_of_disk(folder: Path, hint: str, needs: str = "") -> Iterator[None]:
    """RunError where the block fails because something could not be written in `folder`; `hint` is what to do when that is mended, `needs`
    how much room it takes.

    Python and pyarrow raise an OSError with its number, numpy and polars one without, polars and duckdb errors of their own. What fails
    otherwise is raised as it is, as is an error that names a file elsewhere, which was read.
    """
    try:
        yield
    except Escm2Error:
        raise
    except Exception as error:
        (number, said), name = _told(error), _name(error, folder)
        place = str(folder) if name is None else name
        if number is None or (number in DENIED and name is None) or not Path(place).is_relative_to(folder):
            raise
        room = [free_space(folder), needs] if number in FULL else []
        raise RunError("; ".join([f"cannot write {place}: {said}", *filter(None, room)]), f"{STEPS[number]}, then {hint}") from error


def _told(error: Exception) -> tuple[int | None, str]:
    """Which of STEPS an error is, if any, and what is said of it."""
    if isinstance(error, OSError) and error.errno is not None:
        of_system = error.errno in (*FULL, errno.EFBIG)  # pyarrow says which file it is only in words, that it is denied
        return (error.errno, os.strerror(error.errno) if of_system else error.strerror or "") if error.errno in STEPS else (None, "")
    if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in LIBRARIES:
        return None, ""
    lines = str(error).splitlines()
    for words, number in WORDS.items():
        line = next((line for line in lines if re.search(words, line)), None)
        if line is not None:
            # How the limit is set comes after what did not fit.
            return number, f"a write was cut short ({line})" if number == CUT_SHORT else lines[0] if words == DISK_LIMIT else line
    return None, ""


def _name(error: Exception, folder: Path) -> str | None:
    """The file that an error names, if any; of several in its words, the one in the folder."""
    names = (getattr(error, name, None) for name in ("filename2", "filename"))  # the first is what a copy is made to
    if (name := next((name for name in names if isinstance(name, str)), None)) is not None:
        return name
    found = [match[match.lastindex or 0] for match in PLACE.finditer(str(error))]
    inside = str(folder) if str(folder) in str(error) else None  # whatever stands around it
    return next((name for name in found if Path(name).is_relative_to(folder)), inside or next(iter(found), None))


def free_space(folder: Path) -> str:
    """How much is free where a folder is, or would be."""
    there = os.statvfs(next(place for place in (folder, *folder.parents) if place.is_dir()))
    free = f"{_size(there.f_bavail * there.f_frsize)} of {_size(there.f_blocks * there.f_frsize)} are free there"
    return f"{free}, and no number for another file (inode)" if there.f_files and not there.f_favail else free


def _size(bytes: int) -> str:
    return f"{bytes / 1e9:,.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:,.1f} MB"
