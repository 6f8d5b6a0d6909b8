"""Several objectives trained, one kept: on real ranks, cut off and resumed."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from escm2rec.config import ChoiceConfig
from escm2rec.errors import RunError
from escm2rec.evaluation.entire_risk import RiskEstimates
from escm2rec.training import choice
from escm2rec.training.choice import Estimated, _choice
from escm2rec.training.owner import Owner
from escm2rec.training.run import Run
from escm2rec.training.train import train as choose
from tests.encoded import config, write_dataset
from tests.ranks import train_on_ranks

SETTINGS = [
    "objective.kind=escm2-ips",
    "choice.objectives=[{kind: esmm}, {kind: escm2-dr, lambda_c: 0.2}]",
    "training.log_every_steps=50",
]
train = functools.partial(train_on_ranks, overrides=SETTINGS)
NAMES = ["0-escm2-ips", "1-esmm", "2-escm2-dr"]
WRITTEN = [{"kind": "escm2-ips"}, {"kind": "esmm"}, {"kind": "escm2-dr", "lambda_c": 0.2}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": 3_000, "validation": 1_000, "test": 100})
    shutil.rmtree(made / "test")  # no choice may need the test split
    return made


@pytest.fixture(scope="module")
def chosen(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("chosen")
    for world_size in (1, 2):
        result = train(data, folder / str(world_size), folder / f"ranks-{world_size}", world_size)
        assert "choice" in result, result
    return {world_size: folder / str(world_size) for world_size in (1, 2)}


RISKS = {"0-a": 0.5, "1-noisy": 0.48, "2-sure": 0.485, "3-worse": 0.51}
ERRORS = {"1-noisy": 0.03, "2-sure": 0.002, "3-worse": 0.001}


def chosen_of(names: list[str], errors: dict[str, float | None], by: str = "dr") -> dict[str, Any]:
    """A choice among models of these risks, whose differences from the first have these errors; the other estimate says nothing."""

    def estimates(value: float, error: float | None) -> RiskEstimates:
        return RiskEstimates(9.0, 9.0, value, error) if by == "dr" else RiskEstimates(value, error, 9.0, 9.0)

    above = {name: None if name == names[0] else estimates(RISKS[name] - RISKS[names[0]], errors[name]) for name in names}
    return _choice(by, {name: Estimated(estimates(RISKS[name], 0.1), above[name]) for name in names})


@pytest.mark.parametrize("by", ["dr", "snips"])
@pytest.mark.parametrize(
    ("names", "errors", "taken", "why"),
    [
        (["0-a", "2-sure"], ERRORS, "2-sure", "2-sure lies 0.015 below 0-a, standard error of the difference 0.002"),
        (["0-a", "1-noisy", "2-sure"], ERRORS, "2-sure", "2-sure lies 0.015 below 0-a, standard error of the difference 0.002"),
        (
            ["0-a", "1-noisy", "2-sure"],
            {**ERRORS, "1-noisy": 0.019},
            "1-noisy",
            "1-noisy lies 0.02 below 0-a, standard error of the difference 0.019",
        ),
        (
            ["0-a", "1-noisy"],
            ERRORS,
            "0-a",
            "1-noisy has the least risk, 0.02 below 0-a, standard error of the difference 0.03: too little, 0-a is kept",
        ),
        (
            ["0-a", "1-noisy"],
            {"1-noisy": None},
            "0-a",
            "1-noisy has the least risk, 0.02 below 0-a, standard error of the difference unknown: too little, 0-a is kept",
        ),
        (["0-a", "3-worse"], ERRORS, "0-a", "0-a has the least risk"),
    ],
)
def test_the_first_is_kept_unless_another_errs_less_beyond_a_standard_error(
    names: list[str], errors: dict[str, float | None], taken: str, why: str, by: str
) -> None:
    choice = chosen_of(names, errors, by)
    assert (choice["taken"], choice["by"], choice["why"]) == (taken, by, why)
    assert {name: above[by] for name, above in choice["above_first"].items()} == {name: RISKS[name] - 0.5 for name in names[1:]}


def test_what_was_taken_is_kept_as_a_run(chosen: dict[int, Path]) -> None:
    out = chosen[1]
    choice = json.loads((out / "choice.json").read_text())
    risks = {name: risk["dr"] for name, risk in choice["estimated_risk"].items()}
    assert list(risks) == NAMES
    assert choice["by"] == "dr"
    assert choice["objectives"] == dict(zip(NAMES, WRITTEN, strict=True))
    assert len(set(risks.values())) == 3
    for name, above in choice["above_first"].items():
        assert above["dr"] == pytest.approx(risks[name] - risks[NAMES[0]], abs=1e-9)
        assert 0 < above["dr_standard_error"] < choice["estimated_risk"][name]["dr_standard_error"]
    assert list(choice["above_first"]) == NAMES[1:]
    taken = [name for name, above in choice["above_first"].items() if above["dr"] < -above["dr_standard_error"]]
    assert choice["taken"] == min(taken, key=lambda name: risks[name], default=NAMES[0])
    run = Run.open(out)
    assert f"{NAMES.index(choice['taken'])}-{run.config.objective.kind}" == choice["taken"]
    assert run.config.choice == ChoiceConfig(), "the kept run is one training, which its config repeats"
    assert run.checkpoint.is_dir()
    others = {path.name for path in (out / "candidates").iterdir() if path.is_dir()}
    assert others == {*NAMES, "judge"} - {choice["taken"]}
    for name in others:
        assert Run.open(out / "candidates" / name).manifest["steps"] == run.manifest["steps"]


def test_the_judge_does_not_weigh_by_the_floor_of_what_it_judges(data: Path, chosen: dict[int, Path], tmp_path: Path) -> None:
    """A floor of 0.9 makes all weights alike, and would favour a model that corrects nothing."""
    settings = ["objective={kind: escm2-ips, propensity: {floor: 0.9}}", "choice.objectives=[{kind: esmm}]", SETTINGS[-1]]
    choice = train_on_ranks(data, tmp_path / "run", tmp_path / "ranks", 1, overrides=settings)["choice"]
    before = json.loads((chosen[1] / "choice.json").read_text())
    assert choice["estimated_risk"]["1-esmm"] == before["estimated_risk"]["1-esmm"]
    assert choice["estimated_risk"]["0-escm2-ips"] != before["estimated_risk"]["0-escm2-ips"]


def test_ranks_estimate_the_same_risk(chosen: dict[int, Path]) -> None:
    first, second = (json.loads((chosen[world_size] / "choice.json").read_text()) for world_size in (1, 2))
    for name in NAMES[1:]:
        assert second["above_first"][name] == pytest.approx(first["above_first"][name], rel=1e-2, abs=1e-6)
    one, two = first["estimated_risk"], second["estimated_risk"]
    for name in NAMES:
        for estimate in ("snips", "snips_standard_error", "dr", "dr_standard_error"):
            assert two[name][estimate] == pytest.approx(one[name][estimate], rel=1e-4)


def move_back(out: Path, taken: str) -> None:
    """As before the kept run was moved up."""
    (out / "candidates" / taken).mkdir()
    for entry in [path for path in out.iterdir() if path.name not in ("candidates", "choice.json")]:
        entry.rename(out / "candidates" / taken / entry.name)


def test_a_choice_that_was_cut_off_goes_on(data: Path, chosen: dict[int, Path], tmp_path: Path) -> None:
    """Cut off while the kept run was moved up, and before the judge was trained; what is there is kept."""
    expected = json.loads((chosen[1] / "choice.json").read_text())
    out = tmp_path / "run"
    shutil.copytree(chosen[1], out)
    move_back(out, expected["taken"])
    (out / "candidates" / expected["taken"] / "plan.json").rename(out / "plan.json")
    (out / "candidates" / expected["taken"] / "manifest.json").rename(out / "candidates" / expected["taken"] / ".manifest.json.kept")
    first = train(data, out, tmp_path / "a", resume=True)
    assert first["choice"] == expected
    assert Run.open(out).config.objective.kind == first["objective"]
    assert train(data, out, tmp_path / "b", resume=True) == first, "there is nothing left to do"
    assert "exists" in train(data, out, tmp_path / "c")["message"]

    move_back(out, expected["taken"])
    (out / "choice.json").unlink()
    shutil.rmtree(out / "candidates" / "judge")
    refused = train(data, out, tmp_path / "d")
    assert "holds a choice that was cut off" in refused["message"]
    assert "--resume goes on with it" in refused["hint"]
    other = train(data, out, tmp_path / "f", resume=True, overrides=[*SETTINGS, "choice.by=snips"])
    assert "was begun with another config or data set: config.choice.by differ(s)" in other["message"]
    again = train(data, out, tmp_path / "e", resume=True)
    for name in NAMES:
        assert again["choice"]["estimated_risk"][name]["dr"] == pytest.approx(expected["estimated_risk"][name]["dr"], rel=1e-6)


def test_a_choice_needs_clicks_to_judge_by(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "set", {"train": 500})
    refused = train(made, tmp_path / "run", tmp_path / "ranks")
    assert "choice.objectives are judged on the clicks of the validation split: that of" in refused["message"]
    assert "has 0 impressions and none" in refused["message"]
    assert not (tmp_path / "run").exists()


def test_an_objective_that_does_not_hold_together_is_told_before_any_is_trained(data: Path, tmp_path: Path) -> None:
    settings = ["choice.objectives=[{kind: esmm}, {kind: naive, propensity: {balance: 1.0}}]"]
    refused = train(data, tmp_path / "run", tmp_path / "ranks", overrides=settings)
    assert refused["message"].startswith("choice.objectives.1: objective.propensity.balance has no effect on naive")
    assert not (tmp_path / "run").exists()
    own = ["objective={kind: two-space, imputation: {predicts: error}}", "choice.objectives=[{kind: esmm}]"]
    refused = train(data, tmp_path / "run", tmp_path / "ranks-own", overrides=own)
    assert "predicts: error teaches the CVR tower of two-space nothing" in refused["message"]
    assert not (tmp_path / "run").exists(), "the first objective is looked at before anything is written, too"


def test_a_folder_that_no_choice_made_is_not_dropped(data: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "hiring"
    (theirs / "candidates").mkdir(parents=True)
    (theirs / "candidates" / "cv.pdf").write_text("mine")
    cases: list[dict[str, Any]] = [{"overwrite": True}, {"resume": True}, {}]
    for arguments in cases:
        refused = train(data, theirs, tmp_path / f"ranks-{len(arguments)}-{arguments.get('resume')}", **arguments)
        assert "message" in refused, refused
    assert (theirs / "candidates" / "cv.pdf").read_text() == "mine"


def test_the_judge_has_a_seed_and_a_network_of_its_own(data: Path, chosen: dict[int, Path]) -> None:
    judge, kept = Run.open(chosen[1] / "candidates" / "judge"), Run.open(chosen[1])
    assert judge.config.training.seed == kept.config.training.seed + 1
    assert judge.config.objective.kind == "naive"


@pytest.mark.parametrize("when", ["estimates", "moves"])
def test_a_choice_that_a_later_start_took_over_writes_nothing_more(
    data: Path, chosen: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Before what it chose is written, and before the run it took is moved; the later start then ends as one alone does."""
    out = tmp_path / "run"
    known = json.loads((chosen[1] / "choice.json").read_text())
    risks = {
        name: Estimated(RiskEstimates(0.5, 0.1, 0.5, 0.1), None if name == NAMES[0] else RiskEstimates(0.1, 0.1, 0.1, 0.1))
        for name in NAMES
    }

    def taken_over(*_: Any) -> dict[str, Estimated]:
        if when == "estimates":
            (out / ".owner").unlink()
        return risks

    def written(owner: Owner, told: dict[str, Any]) -> None:
        write(owner, told)
        if when == "moves":
            (out / ".owner").unlink()

    write = choice._write
    monkeypatch.setattr(choice, "_estimate", taken_over)
    monkeypatch.setattr(choice, "_write", written)
    with pytest.raises(RunError, match="was taken over by a later start of this training, or replaced: this one ends, and writes nothing"):
        choose(config(*SETTINGS), data, out)
    assert (out / "choice.json").exists() == (when == "moves")
    assert not (out / "manifest.json").exists()
    assert sorted(path.name for path in (out / "candidates").iterdir() if path.is_dir()) == [*NAMES, "judge"]
    monkeypatch.undo()
    result = choose(config(*SETTINGS), data, out, resume=True)
    assert result["choice"]["objectives"] == known["objectives"]
    assert (out / "manifest.json").exists()
