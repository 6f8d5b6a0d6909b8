"""Where workers of preprocess come from, in programs of their own."""

from __future__ import annotations

import errno
import multiprocessing.context
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from escm2rec import workers
from escm2rec.disk import telling_of_disk
from escm2rec.errors import RunError
from escm2rec.workers import is_small

CODE = """
import multiprocessing, sys
from escm2rec.workers import ready_workers, starting_workers
if sys.argv[1] == "command":
    ready_workers("escm2rec.preprocess")
with starting_workers() as context:
    print(context.get_start_method())
"""


def start_method(how: str, temporary: Path) -> str:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", CODE, how], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_command_forks_them_and_a_program_that_calls_does_not(tmp_path: Path) -> None:
    """A fork server stays, with its environment and what it imported, and would be that of the program's own pools."""
    assert start_method("command", tmp_path) == "forkserver"
    assert start_method("program", tmp_path) == "spawn"


def test_a_temporary_folder_with_a_long_name_is_no_hindrance(tmp_path: Path) -> None:
    """The socket of a fork server has a name of some hundred bytes at most."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    assert start_method("command", long) == "spawn"


def test_a_command_removes_the_sockets_of_killed_ones_and_no_others(tmp_path: Path) -> None:
    waits = 'from escm2rec.workers import ready_workers; ready_workers("escm2rec.preprocess"); print("ready", flush=True); input()'
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    lives, killed = (
        subprocess.Popen([sys.executable, "-c", waits], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    try:
        for each in (lives, killed):
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 2
        killed.kill()
        killed.wait(60)
        assert start_method("command", tmp_path) == "forkserver"
        assert len(list(tmp_path.iterdir())) == 1, "of the one that lives"
    finally:
        lives.communicate("\n", timeout=60)
        killed.communicate(timeout=60)
    assert not list(tmp_path.iterdir())


def test_a_main_module_without_a_file_has_its_name_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    main = sys.modules["__main__"]
    for name, shown in (("<stdin>", None), (str(tmp_path), str(tmp_path))):
        monkeypatch.setattr(main, "__file__", name, raising=False)
        with workers.starting_workers():
            assert getattr(main, "__file__", None) == shown
        assert main.__file__ == name


PROGRAM = """
import sys
from escm2rec.workers import starting_workers
with starting_workers() as context, context.Pool(1) as pool:
    print(pool.map(len, ["four"]))
"""


def test_a_program_on_stdin_has_workers_beside_a_file_of_that_name(tmp_path: Path) -> None:
    """Every worker would run that file."""
    (tmp_path / "<stdin>").write_text("print('another program')")
    done = subprocess.run([sys.executable, "-"], input=PROGRAM, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[4]\n", "")


def test_no_room_for_semaphores_is_not_told_as_that_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("spawn")
    room = r"; [\d,.]+ [GM]B of [\d,.]+ [GM]B are free there" if workers.SHARED_MEMORY.is_dir() else ""
    told = rf"^cannot start worker processes: their semaphores lie in /dev/shm: No space left on device{room}\nhint: make room there"

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(context, "Lock", full)
    monkeypatch.setattr(workers, "_server", context)
    with pytest.raises(RunError, match=told), telling_of_disk(tmp_path, "do it again"), workers.starting_workers():
        pass


def test_a_pool_makes_as_many_semaphores_as_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = multiprocessing.context.BaseContext

    def counted(kind: str) -> Any:
        real = getattr(make, kind)

        def make_one(self: Any, *given: Any) -> Any:
            made.append(kind)
            return real(self, *given)

        return make_one

    for kind in ("Lock", "BoundedSemaphore"):
        monkeypatch.setattr(make, kind, counted(kind))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")):
        assert len(made) == workers.SEMAPHORES


def test_what_is_small_is_told_of_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SMALL_BYTES", 100)
    (tmp_path / "a").write_bytes(b"x" * 60)
    assert is_small([tmp_path]), "60 bytes"
    assert not is_small([tmp_path / "a", tmp_path / "a"]), "120 bytes"
    (tmp_path / "b").write_bytes(b"x" * 60)
    assert not is_small([tmp_path])
    assert is_small([tmp_path / "nowhere"]), "told of by who reads it"
