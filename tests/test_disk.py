"""A full disk as libraries tell it, on one that is full; and what else keeps a file from being written."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from escm2rec.disk import PLACE, free_space, telling_of_disk
from escm2rec.errors import DataError, RunError
from tests.small_disks import small_disk

NUMBERS = np.random.default_rng(0).integers(0, 2**62, 500_000)  # 4 MB that no compression makes smaller
FREE = r"\d\.\d MB of 2\.1 MB are free there"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_disk(tmp_path_factory.mktemp("small") / "disk", "2m") as made:
        yield made


def arrow_file(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("a", pa.int64())])) as writer:
        writer.write_batch(pa.record_batch({"a": NUMBERS}))


def appended(path: Path) -> None:
    with path.open("wb") as file:
        for start in range(0, len(NUMBERS), 100_000):
            NUMBERS[start : start + 100_000].tofile(file)


def copied(path: Path) -> None:
    source = path.parents[1] / "source"
    source.write_bytes(NUMBERS.tobytes())
    shutil.copyfile(source, path)


def stored(path: Path) -> None:
    with duckdb.connect(str(path)) as connection:
        connection.register("numbers", pa.table({"a": NUMBERS}))
        connection.execute("CREATE TABLE held AS SELECT a, hash(a) FROM numbers")


def sorted_on_disk(path: Path) -> None:
    config = {"memory_limit": "8MiB", "threads": 1, "temp_directory": str(path)}
    with duckdb.connect(":memory:", config=config) as connection:
        connection.register("numbers", pa.table({"a": NUMBERS}))
        connection.sql("SELECT a FROM numbers, range(8) ORDER BY a").to_arrow_table()


FULL = "No space left on device"
CUT = r"a write was cut short \(100000 requested and \d+ written\)"
WRITES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pyarrow, Parquet": (lambda path: pq.write_table(pa.table({"a": NUMBERS}), path), FULL),
    "pyarrow, Arrow": (arrow_file, FULL),
    "polars": (lambda path: pl.DataFrame({"a": NUMBERS}).write_parquet(path), rf".*IO error: {FULL} \(os error 28\)"),
    "polars by pyarrow": (lambda path: pl.DataFrame({"a": NUMBERS}).write_parquet(path, use_pyarrow=True), FULL),
    "numpy, at once": (lambda path: np.save(path, np.tile(NUMBERS, 8)), r"Not enough free space to write 32000000 bytes after offset 128"),
    "numpy, bit by bit": (appended, CUT),
    "text": (lambda path: path.write_text("x" * 4_000_000), FULL),
    "duckdb": (stored, rf"(IO|TransactionContext) Error: .*{FULL}"),
    "duckdb, sorting": (sorted_on_disk, r"Out of Memory Error: failed to offload data block .*"),
}


@pytest.mark.parametrize("how", WRITES)
def test_a_full_disk_is_told_the_same_by_whatever_library(disk: Path, how: str) -> None:
    write, said = WRITES[how]
    folder = disk / "job"
    folder.mkdir()
    try:
        with pytest.raises(RunError) as error, telling_of_disk(folder, "do it again", "it takes 4 MB"):
            write(folder / "file")
    finally:
        shutil.rmtree(folder)
    assert re.fullmatch(rf"cannot write {folder}(/file)?: {said}; {FREE}; it takes 4 MB", error.value.message)
    assert re.fullmatch(r"make room there(, or raise the limit on the size of a file \(ulimit -f\))?, then do it again", error.value.hint)
    assert error.value.exit_code == 1


def test_what_a_copy_is_made_to_is_named(disk: Path) -> None:
    told = rf"^cannot write {disk}/copy: {FULL}; {FREE}\nhint: make room there, then do it again$"
    with pytest.raises(RunError, match=told), telling_of_disk(disk, "do it again"):
        copied(disk / "copy")
    (disk / "copy").unlink()


def test_a_disk_without_numbers_for_files_says_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m,nr_inodes=3") as disk:
        for name in ("a", "b"):
            (disk / name).touch()
        assert re.fullmatch(rf"{FREE}, and no number for another file \(inode\)", free_space(disk / "not" / "there"))


OTHERS = {
    errno.EDQUOT: (r"Disk quota exceeded; .* of .* are free there; it takes 4 MB", "make room in your quota"),
    errno.EFBIG: ("File too large", r"raise the limit on the size of a file \(ulimit -f\)"),
    errno.EROFS: ("in a library's words", "let the file system be written"),
    errno.EACCES: ("in a library's words", "mend its permissions"),
    errno.EPERM: ("in a library's words", "mend its permissions"),
}


@pytest.mark.parametrize("number", OTHERS)
def test_other_reasons_have_steps_of_their_own(tmp_path: Path, number: int) -> None:
    said, step = OTHERS[number]
    path = tmp_path / "part"
    told = rf"^cannot write {path}: {said}\nhint: {step}, then do it again$"
    with pytest.raises(RunError, match=told), telling_of_disk(tmp_path, "do it again", "it takes 4 MB"):
        raise OSError(number, "in a library's words", str(path))


DENIED: dict[str, tuple[str, Callable[[str], Exception]]] = {
    "pyarrow": ("Failed to open local file '{}'. Detail: [errno 13] Permission denied", lambda text: PermissionError(errno.EACCES, text)),
    "duckdb": ('IO Error: Cannot open file "{}": Permission denied', duckdb.IOException),
    "polars": ("Permission denied (os error 13): {}", PermissionError),
}


def denied(how: str, path: Path) -> Exception:
    """As the libraries raise it: root, who runs the tests in containers, is denied nothing."""
    text, make = DENIED[how]
    return make(text.format(path))


@pytest.mark.parametrize("how", DENIED)
def test_a_file_that_is_named_in_words_alone_is_told_where_it_lies_in_the_folder(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "the job"
    error = denied(how, folder / "part")
    told = rf"^cannot write {folder}(/part)?: {re.escape(str(error.args[-1]))}\nhint: mend its permissions, then do it again$"
    with pytest.raises(RunError, match=told), telling_of_disk(folder, "do it again"):
        raise error
    error = denied(how, tmp_path / "logs" / "day 1.parquet")
    with pytest.raises(type(error)) as raised, telling_of_disk(folder, "do it again"):
        raise error
    assert raised.value is error, "read, not written"


def test_pyarrow_names_what_it_cannot_open_as_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        pq.ParquetFile(tmp_path / "a b" / "c.parquet")
    match = PLACE.search(str(raised.value))
    assert match is not None
    assert match[1] == str(tmp_path / "a b" / "c.parquet")


def test_the_line_that_says_it_is_kept(tmp_path: Path) -> None:
    said = f'IO Error: Could not write file "{tmp_path}/sort.tmp": {FULL}'
    told = rf"^cannot write {tmp_path}/sort.tmp: {re.escape(said)}; .* are free there\nhint"
    with pytest.raises(RunError, match=told), telling_of_disk(tmp_path, "do it again"):
        raise duckdb.TransactionException(f"TransactionContext Error: Failed to commit\n{said}\nand more")


NCCL = "NCCL error in: x.cpp:2251, unhandled system error\nError while creating shared memory segment /dev/shm/nccl-G7 (size 9637888)"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such file", "x"),
        PermissionError(errno.EACCES, "denied", "/elsewhere/input.parquet"),
        PermissionError(errno.EACCES, "Permission denied"),  # no file: of a semaphore
        ValueError("Permission denied"),
        ValueError("could not convert string to float: 'credit requested and refused'"),
        OSError("'credit requested and refused'"),
        RuntimeError(f"{NCCL}, error: {FULL} (28)"),
        duckdb.IOException(f'IO Error: Could not write file "/elsewhere/a": {FULL}'),
        OSError(f"{FULL} (os error 28): /elsewhere/a"),
        DataError(FULL),
    ],
)
def test_other_errors_are_raised_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, telling_of_disk(tmp_path, "do it again"):
        raise error
    assert raised.value is error
