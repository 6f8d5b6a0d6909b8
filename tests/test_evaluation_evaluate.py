"""The evaluate verb on real ranks: every row counts once on any number of them, and the model has learned."""

from __future__ import annotations

import json
import shutil
from html import escape
from pathlib import Path
from typing import Any

import pytest

from tests.encoded import write_dataset
from tests.ranks import run_ranks
from tests.small_disks import small_disk

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


def test_weights_and_balance_are_of_the_split(folder: Path, results: dict[int, Any]) -> None:
    """Under the names that training logs them by, every click counted, with the floor of the run."""
    metrics = results[1]["metrics"]
    report = json.loads((folder / "run" / "report.json").read_text())["propensity"]
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    logged = {name for name in manifest["last_metrics"] if name.startswith("propensity_")}
    assert len(logged) == 6
    assert logged <= metrics.keys()
    assert report["weights"]["floor"] == pytest.approx(0.1 * manifest["base_ctr"])
    assert (report["weights"]["weighs"], report["weights"]["own_tower"]) == (True, False)
    assert report["weights"]["num_clicked"] == metrics["ctr_positives"]
    assert metrics["propensity_mean_weight"] == pytest.approx(1, abs=0.15)
    assert 0.3 < metrics["propensity_effective_share"] < 1
    assert {row["feature"] for row in report["balance"]["features"]} == {"user", "tags", "history", "scene", "price", "age"}
    assert metrics["balance_largest_before"] > 0.3, "price draws clicks"
    assert metrics["balance_largest_after"] < metrics["balance_largest_before"] / 2
    assert "Balance of clicked and all impressions" in (folder / "run" / "report.html").read_text()


PROPENSITIES = {"tower": "{balance: 0.1}", "calibrated": "{calibration: platt, calibration_every_steps: 3}"}


@pytest.mark.parametrize("how", PROPENSITIES)
def test_q_is_of_its_own_tower_or_calibrated(how: str, folder: Path) -> None:
    """As in training: a run whose q has a tower, or a slope and shift, is not measured by its CTR tower as it is."""
    data = write_dataset(folder / how, {"train": 4_000, "validation": 600, "test": TEST_ROWS})
    overrides = [f"objective={{kind: multi-ipw, propensity: {PROPENSITIES[how]}}}"]
    names = {"data": str(data), "out": str(folder / f"run-{how}")}
    evaluates = ("tests.training_calls:evaluate_run", {"run": names["out"], "data": names["data"]})
    _, two = run_ranks(2, [("tests.training_calls:train_run", {**names, "overrides": overrides}), evaluates], folder / f"{how}-two")
    by_hand = ("tests.training_calls:propensities", {**evaluates[1], "split": "test"})
    one, direct = run_ranks(1, [evaluates, by_hand], folder / f"{how}-one")
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-4, abs=1e-5)
    assert one["metrics"]["propensity_mean_weight"] == pytest.approx(direct["mean_weight"], rel=1e-5)
    assert direct["mean_weight"] != pytest.approx(direct["of_ctr_tower"], rel=1e-3)
    if how == "calibrated":
        last = json.loads((folder / f"run-{how}" / "metrics.jsonl").read_text().splitlines()[-1])
        assert one["metrics"]["propensity_slope"] == pytest.approx(last["propensity_slope"]) != 1
        assert one["metrics"]["propensity_shift"] == pytest.approx(last["propensity_shift"]) != 0


def test_the_report_is_written_by_group(folder: Path, results: dict[int, Any]) -> None:
    report = json.loads((folder / "run" / "report.json").read_text())
    assert sorted(row["value"] for row in report["groups"]["group"]["rows"]) == ["cheap", "dear"]
    assert "<html" in (folder / "run" / "report.html").read_text()


CHOSEN = {"taken": "0-escm2-ips", "by": "dr", "why": "it has the <least> risk", "estimated_risk": {"0-escm2-ips": {}, "1-esmm": {}}}


def test_a_chosen_run_says_so_in_the_head_of_its_report(folder: Path, results: dict[int, Any]) -> None:
    """And what cannot be read is told. The run of this file was alone: it says nothing."""
    assert "choice" not in json.loads((folder / "run" / "report.json").read_text())
    assert "Chosen" not in (folder / "run" / "report.html").read_text()
    arguments = {"data": str(folder / "data")}
    texts = {"known": json.dumps(CHOSEN), "torn": '{"taken', "empty": "{}"}
    for name, text in texts.items():
        shutil.copytree(folder / "run", folder / f"chosen-{name}")
        (folder / f"chosen-{name}" / "choice.json").write_text(text)
    calls = [("tests.training_calls:evaluate_run", {**arguments, "run": str(folder / f"chosen-{name}")}) for name in texts]
    known, torn, empty = run_ranks(1, calls, folder / "chosen")
    assert known["metrics"] == pytest.approx(results[1]["metrics"])
    assert "choice.json is not readable JSON" in torn["message"]
    assert "choice.json does not say what was taken, by what and among which" in empty["message"]
    assert torn["hint"] == empty["hint"] == "it was changed after it was written: train again"
    report = json.loads((folder / "chosen-known" / "report.json").read_text())
    says = report["choice"].pop("says")
    assert report["choice"] == {"taken": "0-escm2-ips", "by": "dr", "candidates": 2}
    assert list(report)[:2] == ["run", "choice"]
    assert "0-escm2-ips, is one of 2 that were trained, chosen by the CVR risk on all impressions that the validation split lets DR" in says
    assert "(it has the <least> risk). Its figures on the validation split may therefore be a little too good; those on" in says
    assert f'<p class="soft">{escape(says)}</p>' in (folder / "chosen-known" / "report.html").read_text().split("</header>")[0]


def test_a_report_on_a_full_disk_is_told(folder: Path, results: dict[int, Any]) -> None:
    del results  # the run must be there
    with small_disk(folder / "disk", "32m") as disk:
        run = Path(shutil.copytree(folder / "run", disk / "run", ignore=shutil.ignore_patterns("report.*")))
        with pytest.raises(OSError, match="No space left"):
            (disk / "more").write_bytes(bytes(33 << 20))
        call = ("tests.training_calls:evaluate_run", {"run": str(run), "data": str(folder / "data")})
        (told,) = run_ranks(1, [call], folder / "full")
    assert told["error"] == "RunError"
    assert told["message"].startswith(f"cannot write {run}: No space left on device; 0.0 MB of 33.6 MB are free there")
    assert told["hint"] == "make room there, then run the same command again"


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
