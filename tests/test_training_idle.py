"""Settings without effect: each is refused where it does nothing, and nowhere else; what escm2rec itself wrote is never refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from escm2rec.config import Config, ObjectiveConfig, parse_config
from escm2rec.errors import ConfigError
from escm2rec.training.build import build_objective
from escm2rec.training.idle import READ_BY, refuse_idle
from tests.encoded import config, write_dataset
from tests.objectives_world import KINDS, make_batch, take_step
from tests.ranks import run_ranks


def problems(*overrides: str) -> list[str]:
    """What is said of a config, line by line; empty when nothing is."""
    return problems_of(config(*overrides))


def problems_of(checked: Config) -> list[str]:
    try:
        refuse_idle(checked)
    except ConfigError as error:
        return error.message.splitlines()[1:]
    return []


# Of each: the objective, and what is said of it.
IDLE: dict[str, tuple[str, list[str]]] = {
    "a number of another kind": (
        "{kind: escm2-ips, two_space_beta: 1}",
        ["  objective.two_space_beta: escm2-ips has no such number; read by two-space"],
    ),
    "numbers of two other kinds": (
        "{kind: two-space, dcmt_consistency: 0, stability: 2}",
        [
            "  objective.dcmt_consistency: two-space has no such number; read by dcmt",
            "  objective.stability: two-space has no such number; read by stable-dr",
        ],
    ),
    "imputation without its tower": (
        "{kind: escm2-snips, lambda_imp: 1, imputation: {loss: squared}}",
        [
            "  objective.lambda_imp: escm2-snips has no imputation tower; read by direct, multi-dr, escm2-dr, stable-dr, two-space",
            "  objective.imputation.loss: escm2-snips has no imputation tower; read by direct, multi-dr, escm2-dr, stable-dr, two-space",
        ],
    ),
    "clipping of no pseudo-labels": (
        "{kind: direct, imputation: {clip_pseudo_labels: true}}",
        ["  objective.imputation.clip_pseudo_labels: direct has no pseudo-labels; read by multi-dr, escm2-dr"],
    ),
    "steps in turn without turns": (
        "{kind: escm2-dr, imputation: {cvr_steps: 3}}",
        ["  objective.imputation.cvr_steps: acts only with imputation.alternate: true"],
    ),
    "a mixture of nothing": (
        "{kind: escm2-dr, imputation: {weighting: mrdr, mse_mixture: 0.2}}",
        ["  objective.imputation.mse_mixture: acts only with imputation.weighting: dr-mse"],
    ),
    "a weight of no CVR loss": (
        "{kind: esmm, lambda_c: 2}",
        [
            "  objective.lambda_c: esmm has no CVR loss; read by naive, naive+ctcvr, direct, multi-ipw, multi-dr, escm2-ips, escm2-snips, "
            "escm2-dr, stable-dr, dcmt, two-space"
        ],
    ),
    "a weight of no CTCVR loss, and its gradient": (
        "{kind: naive, lambda_g: {start: 0, end: 1}, ctcvr_detach_ctr: false}",
        [
            f"  objective.{key}: naive has no L_CTCVR; read by esmm, naive+ctcvr, escm2-ips, escm2-snips, escm2-dr, dcmt"
            for key in ("lambda_g", "ctcvr_detach_ctr")
        ],
    ),
    "a warm-up of what weighs nothing": (
        "{kind: naive+ctcvr, propensity: {warmup_fraction: 0}}",
        [
            "  objective.propensity.warmup_fraction: naive+ctcvr has no weights by q; read by direct, multi-ipw, multi-dr, escm2-ips, "
            "escm2-snips, escm2-dr, stable-dr, dcmt, two-space"
        ],
    ),
    "a warm-up of a propensity that is given": (
        "{kind: escm2-ips, propensity: {cross_fit: true, warmup_fraction: 0.2}}",
        ["  objective.propensity.warmup_fraction: acts only with propensity.cross_fit: false"],
    ),
    "the pace of no calibration": (
        "{kind: escm2-ips, propensity: {calibration_every_steps: 5}}",
        ["  objective.propensity.calibration_every_steps: acts only with propensity.calibration"],
    ),
}


@pytest.mark.parametrize("case", IDLE)
def test_a_setting_without_effect_is_told(case: str) -> None:
    objective, lines = IDLE[case]
    assert problems(f"objective={objective}") == lines


def test_one_and_several_are_told_with_what_to_do() -> None:
    for lambdas, heading in (("stability: 1", "a setting has no effect:\n"), ("stability: 1, lambda_g: 1", "2 settings have no effect:\n")):
        with pytest.raises(ConfigError, match=f"^{heading}") as caught:
            refuse_idle(config(f"objective={{kind: multi-ipw, {lambdas}}}"))
        assert caught.value.hint == "leave out what has no effect, or choose what reads it"


def test_what_a_choice_does_not_read_is_told() -> None:
    lines = [f"  choice.{key}: nothing is chosen, choice.objectives is empty" for key in ("judge", "by")]
    assert problems("choice.judge={tower_hidden: [8]}", "choice.by=dr") == lines
    assert problems("choice={judge: {tower_hidden: [8]}, objectives: []}") == [], "written empty, the choice is turned off"
    twice = "choice.objectives=[{kind: esmm}, {kind: escm2-ips, lambda_c: 0.5}, {kind: esmm}, {kind: naive, stability: 1}]"
    assert problems("objective.kind=escm2-ips", twice, "choice.by=snips") == [
        "  choice.objectives.3.stability: naive has no such number; read by stable-dr",
        "  choice.objectives.1: the same as objective, which is trained already",
        "  choice.objectives.2: the same as choice.objectives.0, which is trained already",
    ]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("{kind: escm2-dr}", "{kind: escm2-dr, imputation: {predicts: label, loss: bce}}", True),
        ("{kind: escm2-dr}", "{kind: escm2-dr, imputation: {loss: squared}}", False),
        ("{kind: escm2-ips}", "{kind: escm2-ips, ctcvr_detach_ctr: true}", True),
        ("{kind: esmm}", "{kind: esmm, ctcvr_detach_ctr: false}", True),
        ("{kind: esmm}", "{kind: esmm, ctcvr_detach_ctr: true}", False),
    ],
)
def test_a_default_that_is_written_out_is_the_same_model(first: str, second: str, same: bool) -> None:
    told = ["  choice.objectives.0: the same as objective, which is trained already"]
    assert problems(f"objective={first}", f"choice.objectives=[{second}]") == (told if same else [])


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_nulls_and_what_is_read_are_accepted(kind: str) -> None:
    assert problems(f"objective.kind={kind}") == []
    assert problems(f"objective={{kind: {kind}, ctcvr_detach_ctr: null, imputation: {{loss: null}}}}", "choice.judge=null") == []


@pytest.mark.parametrize("kind", ["esmm", "naive", "naive+ctcvr"])
def test_what_the_report_reads_is_accepted_where_nothing_is_weighed(kind: str) -> None:
    """`evaluate` reports q, with its floor and calibration, for every run; a choice takes its judge's floor from `objective`."""
    propensity = "{floor: 0.2, floor_kind: absolute, calibration: platt, calibration_every_steps: 4}"
    assert problems(f"objective={{kind: {kind}, propensity: {propensity}}}") == []


def trace(kind: str, **settings: Any) -> list[Any]:
    """Everything that the objective makes of a batch, in the first steps of training."""
    objective = build_objective(ObjectiveConfig.model_validate({"kind": kind, **settings}), base_ctr=0.3)
    batch, seen = make_batch(), []
    for step in range(6):
        taken = take_step(objective, batch, objective.phase(step), warm_up=step >= 3)
        seen.append([taken.loss, *(torch.zeros(1) if grad is None else grad for grad in taken[2:])])
    return seen


# Of each key in READ_BY: values of sections in which only that key differs.
VALUES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lambda_c": ({}, {"lambda_c": 0.9}),
    "lambda_g": ({}, {"lambda_g": 0.3}),
    "ctcvr_detach_ctr": ({"ctcvr_detach_ctr": False}, {"ctcvr_detach_ctr": True}),
    "lambda_imp": ({}, {"lambda_imp": 2.0}),
    "imputation": ({}, {"imputation": {"weighting": "mrdr", "normalise": True}}),
    "imputation.clip_pseudo_labels": (
        {"imputation": {"weighting": "dr-jl"}},
        {"imputation": {"clip_pseudo_labels": True}},
    ),
    "two_space_beta": ({}, {"two_space_beta": 0.4}),
    "dcmt_consistency": ({}, {"dcmt_consistency": 0.5}),
    "stability": ({}, {"stability": 3.0}),
}


@pytest.mark.parametrize("key", VALUES)
def test_what_is_refused_does_nothing_and_what_is_not_does(key: str) -> None:
    reads, _ = READ_BY[key]
    one, other = VALUES[key]
    for kind in KINDS:
        objective = build_objective(ObjectiveConfig.model_validate({"kind": kind}), base_ctr=0.3)
        flat = [[torch.cat([part.flatten() for part in step]) for step in trace(kind, **settings)] for settings in (one, other)]
        same = all(torch.equal(before, after) for before, after in zip(*flat, strict=True))
        assert same is not reads(objective.estimator), kind


def test_the_warm_up_matters_where_q_weighs() -> None:
    assert {*VALUES, "propensity.warmup_fraction"} == READ_BY.keys()
    reads, _ = READ_BY["propensity.warmup_fraction"]
    for kind in KINDS:
        steps = [torch.cat([part.flatten() for part in step]) for step in trace(kind)]
        objective = build_objective(ObjectiveConfig.model_validate({"kind": kind}), base_ctr=0.3)
        assert torch.equal(steps[0], steps[3]) is not reads(objective.estimator), kind


def test_a_config_that_was_printed_or_stored_is_accepted() -> None:
    """`config check` prints every default, and so does a run's config.json: both may be trained with again."""
    for kind in KINDS:
        stored = config(f"objective.kind={kind}").model_dump(mode="json")
        assert problems_of(parse_config(stored)) == []
    stored = config("objective={kind: escm2-dr, lambda_c: 2}", "choice.objectives=[{kind: esmm}]").model_dump(mode="json")
    assert problems_of(parse_config(stored)) == []
    (line,) = problems_of(parse_config(stored, ["objective.kind=esmm", "choice.objectives=[]"]))
    assert line.startswith("  objective.lambda_c: esmm has no CVR loss")


def test_training_refuses_what_has_no_effect_and_goes_on_with_what_began_with_it(tmp_path: Path) -> None:
    """A run that was begun with such a setting, when it was not refused yet, can be resumed and evaluated."""
    data, out = write_dataset(tmp_path / "set", {"train": 600, "test": 300}), tmp_path / "run"
    train, evaluate = "tests.training_calls:train_run", "tests.training_calls:evaluate_run"
    right = {"data": str(data), "out": str(out), "overrides": ["objective.kind=naive", "training.checkpoint_every_steps=2"]}
    idle = {**right, "overrides": [*right["overrides"], "objective.stability=2"], "resume": True}
    refused, first = run_ranks(1, [(train, idle), (train, right)], tmp_path / "first")
    assert refused["error"] == "ConfigError"
    assert refused["message"].startswith("a setting has no effect:\n  objective.stability: naive has no such number")
    assert first["steps"] == 3
    stored = json.loads((out / "config.json").read_text())
    stored["objective"]["stability"] = 2.0
    (out / "config.json").write_text(json.dumps(stored))
    (out / "manifest.json").unlink()
    resumed, measured = run_ranks(1, [(train, idle), (evaluate, {"run": str(out), "data": str(data)})], tmp_path / "again")
    assert resumed.get("steps") == 3, resumed
    assert measured.get("rows") == 300, measured
