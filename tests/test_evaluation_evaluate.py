"""The evaluate verb on real ranks: every row counts once on any number of them, and the model has learned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.encoded import write_dataset
from tests.ranks import run_ranks

TEST_ROWS = 1501  # no number of ranks divides it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_dataset(folder / "data", {"train": 12_000, "test": TEST_ROWS})
    overrides = ["objective.kind=escm2-ips", "training.epochs=5", "training.log_every_steps=100"]
    arguments = {"data": str(folder / "data"), "out": str(folder / "run"), "overrides": overrides}
    run_ranks(2, [("tests.training_calls:train_run", arguments)], folder / "train")
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[int, Any]:
    call = ("tests.training_calls:evaluate_run", {"run": str(folder / "run"), "data": str(folder / "data"), "by": ["group"]})
    return {ranks: run_ranks(ranks, [call], folder / f"evaluate-{ranks}")[0] for ranks in (1, 2, 3)}


def test_no_row_is_dropped_on_any_number_of_ranks(results: dict[int, Any]) -> None:
    assert {ranks: result["rows"] for ranks, result in results.items()} == {1: TEST_ROWS, 2: TEST_ROWS, 3: TEST_ROWS}


def test_any_number_of_ranks_measures_the_same(results: dict[int, Any]) -> None:
    expected = results[1]["metrics"]
    assert len(expected) > 20
    for ranks in (2, 3):
        assert results[ranks]["metrics"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_model_has_learned(results: dict[int, Any]) -> None:
    metrics = results[1]["metrics"]
    assert metrics["ctr_auc"] > 0.7
    assert metrics["cvr_auc_clicked"] > 0.65
    assert metrics["ctcvr_auc"] > 0.65
    assert metrics["cvr_rmse_entire"] < 0.2


def test_the_report_is_written_by_group(folder: Path, results: dict[int, Any]) -> None:
    report = json.loads((folder / "run" / "report.json").read_text())
    assert sorted(row["value"] for row in report["groups"]["group"]["rows"]) == ["cheap", "dear"]
    assert "<html" in (folder / "run" / "report.html").read_text()


def test_wrong_arguments_are_refused(folder: Path, results: dict[int, Any]) -> None:
    del results  # the report must be there
    other = write_dataset(folder / "other", {"train": 100})
    incomplete = folder / "incomplete"
    (incomplete / "train").mkdir(parents=True)
    unfinished = folder / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    right = {"run": str(folder / "run"), "data": str(folder / "data")}
    wrong: dict[str, dict[str, Any]] = {
        "the data set at": {**right, "data": str(incomplete)},
        f"no run at {folder / 'absent'}": {**right, "run": str(folder / "absent")},
        f"the run at {unfinished} is incomplete": {**right, "run": str(unfinished)},
        "has no rows in split 'test'": {**right, "data": str(other)},
        "the data set keeps no column 'grop'; it keeps: row_id, group": {**right, "by": ["grop"]},
        f"{folder / 'data'} is no run": {**right, "run": str(folder / "data")},
    }
    calls = [("tests.training_calls:evaluate_run", arguments) for arguments in wrong.values()]
    found = run_ranks(1, calls, folder / "wrong")
    assert len(found) == len(wrong)
    for message, result in zip(wrong, found, strict=True):
        assert message in result["message"]


def test_a_split_smaller_than_the_ranks_is_measured_too(folder: Path) -> None:
    small = write_dataset(folder / "small", {"train": 100, "test": 2})
    shutil.copytree(folder / "run", folder / "run-small")
    call = ("tests.training_calls:evaluate_run", {"run": str(folder / "run-small"), "data": str(small)})
    (result,) = run_ranks(3, [call], folder / "evaluate-small")
    assert (result["rows"], result["metrics"]["ctr_impressions"]) == (2, 2)
