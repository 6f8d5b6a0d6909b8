"""Tasks whose outputs are whole or absent, and that may run beside themselves."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from escm2rec.preprocess.steps import once


def test_a_task_runs_once_and_one_that_fails_leaves_nothing(tmp_path: Path) -> None:
    runs = []

    def make(folder: Path) -> dict[str, Any]:
        runs.append(folder)
        (folder / "rows").write_text("whole")
        if len(runs) == 1:
            raise ZeroDivisionError
        return {"rows": 3}

    with pytest.raises(ZeroDivisionError):
        once(tmp_path, "task", make)
    assert list(tmp_path.iterdir()) == []
    assert once(tmp_path, "task", make) == once(tmp_path, "task", make) == {"rows": 3}
    assert len(runs) == 2
    assert {path.name: path.read_text() for path in tmp_path.glob("r*")} == {"rows": "whole"}


def test_two_runs_at_once_leave_what_one_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a task that is thought lost and runs again elsewhere. A slow rename makes them meet."""
    replace = os.replace

    def slow(source: Path, target: Path) -> None:
        os.sched_yield()
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)
    with ThreadPoolExecutor(8) as pool:
        names = [f"task-{number // 8}" for number in range(400)]
        told = list(pool.map(lambda name: once(tmp_path, name, lambda folder: {"name": name, "size": folder.name.count("x")}), names))
    assert [each["name"] for each in told] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({f"{name}.json" for name in names})
