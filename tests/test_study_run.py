"""Cells in parallel: only what is missing is computed, failures are named, the number of workers changes nothing."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from escm2rec.errors import RunError
from escm2rec.study import cell, run
from escm2rec.study.run import Task, default_workers, read_cells, run_cells, run_task
from tests.study_cells import TINY, one_thread  # noqa: F401

PLAN = [(world, 2, ("naive", "escm2-ips")) for world in TINY]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread instead of processes, and short training."""
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(1))
    monkeypatch.setattr(cell, "EPOCHS", 1)
    monkeypatch.setattr(cell, "FRESH_ROWS", 1_000)


def written(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.json")}


@pytest.mark.usefixtures("in_this_process")
def test_a_study_that_goes_on_computes_what_is_missing(tmp_path: Path) -> None:
    run_cells(tmp_path, PLAN, 1)
    first = written(tmp_path)
    assert len(first) == 8
    gone = "cells/tiny_right/escm2-ips/1.json"
    before = json.loads((tmp_path / gone).read_text(encoding="utf-8"))
    (tmp_path / gone).unlink()
    run_cells(tmp_path, PLAN, 1)
    second = written(tmp_path)
    assert {path for path in first if first[path] != second[path]} == {gone}
    assert json.loads((tmp_path / gone).read_text(encoding="utf-8")) == before
    run_cells(tmp_path, PLAN, 1)
    assert written(tmp_path) == second


@pytest.mark.usefixtures("in_this_process")
def test_seeds_are_read_in_order(tmp_path: Path) -> None:
    run_cells(tmp_path, PLAN[:1], 1)
    values = read_cells(tmp_path, TINY[0], 2, "naive")
    assert values == [json.loads((tmp_path / "cells" / "selection_+0.8" / "naive" / f"{seed}.json").read_text()) for seed in (0, 1)]
    assert values[0]["kl"] != values[1]["kl"]


@pytest.mark.usefixtures("in_this_process")
def test_a_failing_candidate_names_world_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(world: Any, candidate: Any, sample: Any, seed: int) -> Any:
        if seed == 1 and candidate.settings["kind"] == "escm2-ips":
            raise FloatingPointError("the loss is not finite")
        return cell.train(world, candidate, sample, seed)

    monkeypatch.setattr(run, "train", fail)
    said = "1 of 2 tasks failed, the first in world 'tiny right', seed 1: escm2-ips: the loss is not finite\nhint: all other cells are kept"
    with pytest.raises(RunError, match=said):
        run_cells(tmp_path, PLAN[1:], 1)
    assert sorted(written(tmp_path)) == [f"cells/tiny_right/{name}" for name in ("escm2-ips/0.json", "naive/0.json", "naive/1.json")]


@pytest.mark.timeout(120)
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    plan = [(TINY[0], 2, ("naive", "escm2-ips"))]
    run_cells(tmp_path / "two", plan, 2)
    for seed in range(2):
        run_task(Task(TINY[0], seed, ("naive", "escm2-ips"), tmp_path / "one"))
    for name in ("naive", "escm2-ips"):
        assert read_cells(tmp_path / "two", TINY[0], 2, name) == read_cells(tmp_path / "one", TINY[0], 2, name)
    assert default_workers() >= 1
