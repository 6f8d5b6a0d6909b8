"""Temporary folders: which ones go, and above all which ones stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from escm2rec.temporary import HELD, hold, remove_unheld, temporary_folder

PREFIX = "escm2rec-test-"
WAITS = """
import sys
from escm2rec.temporary import temporary_folder
with temporary_folder("escm2rec-test-") as folder:
    (folder / "content").write_text("of one that waits")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of temporary files that is empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_folder_goes_with_its_block_and_that_of_a_killed_process_with_the_next(temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    lives, killed = (
        subprocess.Popen([sys.executable, "-c", WAITS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    try:
        folders = []
        for each in (lives, killed):
            assert each.stdout is not None
            folders.append(Path(each.stdout.readline().strip()))
        killed.send_signal(signal.SIGKILL)
        killed.wait(60)
        assert all((folder / "content").exists() for folder in folders)
        with temporary_folder(PREFIX) as mine:
            assert {*temporary.iterdir()} == {folders[0], mine}
        assert {*temporary.iterdir()} == {folders[0]}
    finally:
        lives.communicate("", timeout=60)
        killed.communicate(timeout=60)
    assert not list(temporary.iterdir())


def test_nothing_else_goes(temporary: Path, tmp_path: Path) -> None:
    """A folder of another name, one that a link of the name leads to, and one that this process holds."""
    elsewhere = tmp_path / "elsewhere"
    for folder in (
        temporary / "project",
        temporary / f"{PREFIX}left",
        elsewhere,
        temporary / f"{PREFIX}held",
        temporary / f"{PREFIX}other",
    ):
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
        if not folder.name.endswith("other"):
            (folder / HELD).touch()
    (temporary / f"{PREFIX}link").symlink_to(elsewhere)
    number = hold(temporary / f"{PREFIX}held")
    try:
        for _ in range(2):
            remove_unheld(f"{PREFIX}*")
            there = {path.name.removeprefix(PREFIX) for path in temporary.iterdir()}
            assert there == {"project", "link", "held", "other"}, "left was nobody's"
    finally:
        os.close(number)
    assert (elsewhere / "thesis.txt").exists()
    opened = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink() and os.path.lexists(path)]
    assert not [path for path in opened if path.endswith(HELD)], "no file is left open"
