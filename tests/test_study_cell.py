"""One cell: the same twice, references that use what they are given, towers as the world says."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from escm2rec.evaluation import metrics
from escm2rec.objectives.propensity import LEAST_PROPENSITY
from escm2rec.study import cell
from escm2rec.study.candidates import CANDIDATES, Candidate
from escm2rec.study.cell import Rows, StudyModel, draw_world, train
from escm2rec.study.presets import BASE, IDS
from escm2rec.study.worlds import World, wrong_shift
from escm2rec.training.build import build_objective
from tests.study_cells import one_thread  # noqa: F401

SMALL = replace(BASE, impressions=4_000)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "EPOCHS", 2)
    monkeypatch.setattr(cell, "FRESH_ROWS", 4_000)


@pytest.mark.parametrize("world", [SMALL, replace(IDS, impressions=4_000, users=40)], ids=["numbers", "ids"])
@pytest.mark.parametrize("name", ["escm2-dr", "escm2-ips true q"])
def test_the_same_cell_twice_is_the_same(world: World, name: str) -> None:
    sample = draw_world(world, 0).training
    state = torch.get_rng_state()
    one, two, other = (train(world, CANDIDATES[name], sample, seed).predict(sample).cvr_logit for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_draw_keeps_negatives_in_fresh_impressions_only() -> None:
    drawn = draw_world(replace(SMALL, keep_rate=0.1), 0)
    assert len(drawn.fresh) == 4_000
    assert set(drawn.fresh.weight) == {1.0}
    for log, rows in ((drawn.training, 4_000), (drawn.held_out, 1_333)):
        assert len(log) < 0.35 * rows
        assert set(log.weight) == {1.0, 10.0}
    assert not np.array_equal(drawn.training.click[:100], drawn.held_out.click[:100])


def test_the_reference_weighs_by_the_true_propensity() -> None:
    drawn = draw_world(SMALL, 0)
    trained = train(SMALL, CANDIDATES["escm2-ips true q"], drawn.training, 0)
    assert trained.objective.given
    assert trained.objective.floor == 0
    q = trained.objective.propensity(trained.predict(drawn.fresh), trained.stage).numpy()
    assert q == pytest.approx(drawn.fresh.propensity.clip(max(trained.objective.floor, LEAST_PROPENSITY)), rel=1e-5)
    learned = train(SMALL, CANDIDATES["escm2-ips"], drawn.training, 0)
    assert not learned.objective.given
    assert not torch.equal(trained.predict(drawn.fresh).cvr_logit, learned.predict(drawn.fresh).cvr_logit)


def test_a_wrong_propensity_is_for_candidates_alone() -> None:
    world = replace(SMALL, slope=0.5)
    drawn = draw_world(world, 0)
    trained = train(world, CANDIDATES["escm2-ips"], drawn.training, 0)
    predictions = trained.predict(drawn.fresh)
    wrong = torch.sigmoid(0.5 * predictions.ctr_logit + wrong_shift(world)).clamp(min=trained.objective.floor)
    assert torch.allclose(trained.objective.propensity(predictions, trained.stage), wrong)
    assert train(world, CANDIDATES["escm2-ips true q"], drawn.training, 0).calibration is None


def test_the_oracle_comes_near_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "EPOCHS", 10)
    world = replace(BASE, impressions=20_000, towers="linear", interactions=False)
    drawn = draw_world(world, 0)
    found = {}
    for name in ("oracle", "escm2-ips"):
        z = train(world, CANDIDATES[name], drawn.training, 0).predict(drawn.fresh).cvr_logit.double().numpy()
        found[name] = metrics.kl(drawn.fresh.cvr, z)
    assert found["oracle"] < 0.002
    assert found["oracle"] < 0.5 * found["escm2-ips"]


@pytest.mark.parametrize(("towers", "linear"), [("small", (True, False)), ("linear", (True, True)), ("flexible", (False, False))])
def test_towers_are_as_the_world_says(towers: Literal["small", "linear", "flexible"], linear: tuple[bool, bool]) -> None:
    world = replace(SMALL, towers=towers)
    sample = draw_world(world, 0).training
    trained = train(world, CANDIDATES["escm2-dr"], sample, 0)
    rows = Rows.of(sample).take(torch.arange(60))
    x, y = rows.numeric[:30], rows.numeric[30:]
    assert isinstance(trained.model, StudyModel)
    half = rows.take(torch.arange(30))
    with torch.no_grad():
        at = [trained.model(half._replace(numeric=numeric)) for numeric in (x, y, x + y, torch.zeros_like(x))]
    for task, is_linear in zip(("cvr_logit", "ctr_logit"), linear, strict=True):
        first, second, both, neither = (getattr(predictions, task) for predictions in at)
        assert torch.allclose(first + second, both + neither, atol=1e-4) == is_linear


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("escm2-ips", 20),
        ("escm2-dr", 20),
        ("stable-dr", 20),
        ("escm2-dr alternating", 39),
        ("escm2-dr 3:1", 26),
        ("stable-dr alternating", 58),
    ],
)
def test_ctr_and_cvr_learn_in_as_many_steps_under_every_objective(name: str, steps: int) -> None:
    """Of 1:1 alternation the 20th CVR step is the 39th, of stable-dr's cycle of three the 58th; what comes after it trains neither."""
    objective = build_objective(CANDIDATES[name].objective, 0.1)
    assert cell._steps(objective, 20) == steps
    batches = cell._batches(30_000, 2, 3_000, objective, seed=0)
    assert len(batches) == steps
    assert sum(objective.phase(step) in ("cvr", "joint") for step in range(steps)) == 20
    assert sorted(torch.cat(batches[:10]).tolist()) == list(range(30_000))


@pytest.mark.parametrize(("dr", "ips"), [("escm2-dr", "escm2-ips"), ("multi-dr", "multi-ipw")])
def test_dr_with_imputed_errors_is_no_candidate_because_it_is_ips(dr: str, ips: str) -> None:
    """To the bit where towers start alike, so a study that held both would count one twice."""
    world = replace(SMALL, towers="flexible")
    drawn = draw_world(world, 0)
    logits = [
        train(world, Candidate(settings), drawn.training, 0).predict(drawn.held_out).cvr_logit
        for settings in ({"kind": dr, "imputation": {"predicts": "error"}}, {"kind": ips}, {"kind": dr})
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
