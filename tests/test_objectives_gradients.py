"""Where each loss sends its gradient, and how much."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from escm2rec.objectives.objective import Phase, Stage
from escm2rec.objectives.reduction import local_sums, reduce_terms
from escm2rec.objectives.weights import Ramp
from tests.objectives_world import IMPUTING, KINDS, Step, close, make_batch, make_objective, take_step, whole_phase

ROWS = 12


def reached(step: Step) -> set[str]:
    """The towers whose logits get a gradient; that of the others is None, not zero."""
    grads = dict(zip(("ctr", "cvr", "imputation", "counterfactual", "propensity"), step[2:], strict=True))
    assert all(grad is None or grad.abs().sum() > 0 for grad in grads.values())
    return {name for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("predicts", ["error", "label"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_term_reaches_its_own_towers(kind: str, predicts: str) -> None:
    objective = make_objective(kind, predicts=predicts, lambda_balance=1.0, floor=0.02)
    expected = {
        "ctr": {"ctr"},
        "cvr": {"cvr", "counterfactual"} if kind == "dcmt" else {"cvr"},
        "ctcvr": {"cvr", "ctr"} if kind == "esmm" else {"cvr"},
        "imputation": {"imputation"},
        "propensity": {"propensity"},
        "stability": {"propensity"},
        "balance": {"propensity"},
    }
    names = take_step(objective, make_batch(), whole_phase(kind)).values.keys()
    assert {"ctr", "propensity", "balance"} <= names
    for name in names:
        assert reached(take_step(objective, make_batch(), whole_phase(kind), only=name)) == expected[name], name


@pytest.mark.parametrize("balance", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_phase_holds_gets_no_gradient(kind: str, balance: float) -> None:
    objective = make_objective(kind, lambda_balance=balance, floor=0.02)
    main = {"ctr", "cvr", "counterfactual"} if kind == "dcmt" else {"ctr", "cvr"}
    own = {"propensity"} if "propensity" in objective.towers else set[str]()
    expected: dict[Phase, set[str]] = {"cvr": main if kind == "stable-dr" else main | own}
    if kind in IMPUTING:
        expected |= {"imputation": {"imputation"}, "joint": main | own | {"imputation"}}
    if kind == "stable-dr":
        expected["propensity"] = own
    assert {objective.phase(step) for step in range(6)} == expected.keys() - {"joint"}
    for phase, towers in expected.items():
        assert reached(take_step(objective, make_batch(), phase)) == towers, phase
    others: tuple[Phase, ...] = ("imputation", "propensity")
    for phase in (other for other in others if other not in expected):
        with pytest.raises(ValueError, match=f"has no {phase} phase"):
            take_step(objective, make_batch(), phase)


@pytest.mark.parametrize("detach_ctr", [True, False])
def test_ctcvr_trains_the_ctr_tower_only_when_not_detached(detach_ctr: bool) -> None:
    step = take_step(make_objective("escm2-ips", detach_ctr=detach_ctr), make_batch(), only="ctcvr")
    assert (step.ctr_grad is None) is detach_ctr


def test_esmm_gradient_in_the_cvr_logit() -> None:
    """(1 - eta)(p eta - c)/(1 - p eta): an unclicked row counts against conversion with about its propensity."""
    batch = make_batch()
    a, z, *_ = batch.logits()
    p, eta = torch.sigmoid(a), torch.sigmoid(z)
    expected = (1 - eta) * (p * eta - batch.click * batch.conversion) / (1 - p * eta)
    step = take_step(make_objective("esmm"), batch)
    assert close(step.cvr_grad, (batch.weight * expected / batch.weight.sum()).detach())


def test_gradient_of_dr_with_imputed_error_is_that_of_ips() -> None:
    # With delta_hat held: `error` changes nothing outside the imputation tower.
    settings: dict[str, Any] = {"predicts": "error", "floor": 0.05}
    ips = take_step(make_objective("escm2-ips", **settings), make_batch())
    dr = take_step(make_objective("escm2-dr", **settings), make_batch())
    assert ips.cvr_grad is not None
    assert ips.ctr_grad is not None
    assert close(dr.cvr_grad, ips.cvr_grad)
    assert close(dr.ctr_grad, ips.ctr_grad)
    assert not close(dr.loss, ips.loss, tolerance=1e-3)


def test_gradient_of_dr_with_imputed_labels() -> None:
    """(eta - m) + (o/q)(m - r): unclicked impressions teach the CVR tower too."""
    batch = make_batch()
    a, z, h, *_ = batch.logits()
    q, m = torch.sigmoid(a).clamp(min=0.05), torch.sigmoid(h)
    expected = torch.sigmoid(z) - m + batch.click / q * (m - batch.conversion)
    step = take_step(make_objective("escm2-dr", predicts="label", floor=0.05), batch, only="cvr")
    assert close(step.cvr_grad, (batch.weight * expected / batch.weight.sum()).detach())
    assert step.cvr_grad is not None
    assert (step.cvr_grad[batch.click == 0] != 0).all()


@pytest.mark.parametrize("kind", ["naive", "direct", "multi-ipw", "escm2-snips", "stable-dr", "two-space", "dcmt"])
def test_gradient_in_the_cvr_logit_by_its_formula(kind: str) -> None:
    batch = make_batch()
    a, z, h, star, own = (logit.detach() for logit in batch.logits())
    o, r, w, beta, tie = batch.click, batch.conversion, batch.weight, 0.7, 0.3
    eta, m, eta_star = torch.sigmoid(z), torch.sigmoid(h), torch.sigmoid(star)
    q = torch.sigmoid(own if kind == "stable-dr" else a).clamp(min=0.2)
    other = (1 - q).clamp(min=0.2)
    side = torch.sign(1 - eta - eta_star)
    ips, n = w * o / q * (eta - r), w.sum()
    expected = {
        "naive": w * o * (eta - r) / (w * o).sum(),
        "direct": w * (eta - m) / n,
        "multi-ipw": ips / n,
        "escm2-snips": ips / (w * o / q).sum(),
        "stable-dr": ips / (w * o / q).sum(),
        "two-space": (ips + beta * w * (1 - o) / other * (eta - m)) / n,
        "dcmt": (ips - tie * w * side * eta * (1 - eta)) / n,
    }[kind]
    step = take_step(make_objective(kind, beta=beta, consistency=tie, floor=0.2), batch, only="cvr")
    assert close(step.cvr_grad, expected)
    if kind == "dcmt":
        counterfactual = -w * (1 - o) / other * (1 - eta_star) - tie * w * side * eta_star * (1 - eta_star)
        assert close(step.counterfactual_grad, counterfactual / n)


@pytest.mark.parametrize("predicts", ["error", "label"])
@pytest.mark.parametrize("term", ["stability", "balance", "propensity"])
def test_gradient_in_the_propensity_logit_is_that_of_finite_differences(term: str, predicts: str) -> None:
    batch = make_batch()
    objective = make_objective("stable-dr", predicts=predicts, lambda_balance=1.0)

    def value(own: Tensor) -> Tensor:
        predictions = batch.predictions._replace(propensity_logit=own)
        terms = objective.terms(predictions, batch.click, batch.conversion, batch.weight, Stage("propensity"))
        return reduce_terms({term: terms[term]}, local_sums({term: terms[term]}), world_size=1)[0]

    assert torch.autograd.gradcheck(value, batch.logits()[4])


def test_gradient_of_balance_by_its_formula() -> None:
    """2 S . phi w [-o (1 - p) / p - (1 - o) p / (1 - p)] / N, S the mean of the contrast times phi = (1, inputs)."""
    batch = make_batch()
    assert batch.predictions.inputs is not None
    o, w, p = batch.click, batch.weight, torch.sigmoid(batch.logits()[4]).detach()
    phi = torch.cat([torch.ones(ROWS, 1), batch.predictions.inputs], dim=1)
    mean = (w * (o / p - (1 - o) / (1 - p))) @ phi / w.sum()
    expected = 2 * (phi @ mean) * -w * (o * (1 - p) / p + (1 - o) * p / (1 - p)) / w.sum()
    step = take_step(make_objective("multi-ipw", lambda_balance=0.5), batch, only="balance")
    assert close(step.loss, (mean**2).sum())
    assert close(step.propensity_grad, expected)


def test_balance_leaves_what_the_towers_read_alone() -> None:
    # The inputs are pooled embeddings, with their gradient: the propensity is to balance them, not they it.
    batch = make_batch()
    assert batch.predictions.inputs is not None
    inputs = batch.predictions.inputs.clone().requires_grad_()
    predictions = batch.predictions._replace(inputs=inputs)
    terms = make_objective("multi-ipw", lambda_balance=1.0).terms(predictions, *batch[1:], Stage("cvr"))
    loss, _ = reduce_terms(terms, local_sums(terms), world_size=1)
    grads = torch.autograd.grad(loss, [inputs, batch.logits()[4]], allow_unused=True)
    assert [grad is None for grad in grads] == [True, False]


def test_balance_without_inputs_says_how_to_get_them() -> None:
    batch = make_batch()
    predictions = batch.predictions._replace(inputs=None)
    with pytest.raises(ValueError, match="needs predictions that hold the inputs: build the head with keeps_inputs=True"):
        make_objective("multi-ipw", lambda_balance=1.0).terms(predictions, batch.click, batch.conversion, batch.weight, Stage("cvr"))


def test_clipped_pseudo_labels_bound_the_loss_below() -> None:
    # A memorising model drives the unclipped loss to minus infinity; the clipped one has its least at 0.
    batch = make_batch()
    a, _, h, *_ = batch.logits()
    eager = batch._replace(predictions=batch.predictions._replace(cvr_logit=(60 * (2 * batch.conversion - 1)).requires_grad_()))
    free, clipped = (make_objective("escm2-dr", predicts="label", clip_pseudo_labels=clip) for clip in (False, True))
    assert take_step(free, eager).values["cvr"] < -10
    assert take_step(clipped, eager).values["cvr"] >= 0
    labels = clipped.pseudo_labels(batch.predictions, batch.click, batch.conversion, Stage("cvr"))
    expected = torch.sigmoid(h) + batch.click / torch.sigmoid(a) * (batch.conversion - torch.sigmoid(h))
    assert close(labels, expected.detach())
    assert not labels.requires_grad


@pytest.mark.parametrize("loss", ["squared", "bce"])
@pytest.mark.parametrize("predicts", ["error", "label"])
def test_imputation_phase_trains_the_imputation_alone(predicts: str, loss: str) -> None:
    step = take_step(make_objective("escm2-dr", predicts=predicts, loss=loss), make_batch(), phase="imputation")
    assert step.ctr_grad is None
    assert step.cvr_grad is None
    assert step.imputation_grad is not None
    assert step.imputation_grad.abs().sum() > 0


def test_cvr_phase_holds_the_imputation() -> None:
    step = take_step(make_objective("escm2-dr"), make_batch(), phase="cvr")
    assert set(step.values) == {"ctr", "cvr", "ctcvr"}
    assert step.imputation_grad is None


@pytest.mark.parametrize("predicts", ["error", "label"])
def test_joint_phase_is_both_phases_at_once(predicts: str) -> None:
    objective = make_objective("escm2-dr", predicts=predicts, lambda_imp=0.7)
    cvr, imputation, joint = (take_step(objective, make_batch(), phase=phase) for phase in ("cvr", "imputation", "joint"))
    assert list(joint.values) == ["ctr", "cvr", "ctcvr", "imputation"]
    assert cvr.ctr_grad is not None
    assert cvr.cvr_grad is not None
    assert imputation.imputation_grad is not None
    assert close(joint.loss, cvr.loss + imputation.loss)
    assert close(joint.ctr_grad, cvr.ctr_grad)
    assert close(joint.cvr_grad, cvr.cvr_grad)
    assert close(joint.imputation_grad, imputation.imputation_grad)


@pytest.mark.parametrize("weighting", ["dr-jl", "mrdr", "dr-bias", "dr-mse"])
@pytest.mark.parametrize("normalise", [False, True])
def test_imputation_loss_by_its_formula(weighting: str, normalise: bool) -> None:
    batch = make_batch()
    a, z, h, *_ = batch.logits()
    q = torch.sigmoid(a)
    v = {
        "dr-jl": 1 / q,
        "mrdr": (1 - q) / q**2,
        "dr-bias": (1 - q) ** 2 / q**3,
        "dr-mse": 0.25 * (1 - q) ** 2 / q**3 + 0.75 * (1 - q) / q**2,
    }[weighting]
    delta = -(batch.conversion * torch.log(torch.sigmoid(z)) + (1 - batch.conversion) * torch.log(torch.sigmoid(-z)))
    weights = batch.weight * batch.click * v
    loss = (weights * (delta - torch.log1p(h.exp())) ** 2).sum() / (weights if normalise else batch.weight).sum()
    objective = make_objective("escm2-dr", weighting=weighting, normalise=normalise, mse_mixture=0.25)
    assert close(take_step(objective, batch, phase="imputation").loss, loss.detach(), tolerance=1e-10)


def test_imputation_of_labels_is_blind_at_an_undecided_cvr_tower_unless_bce() -> None:
    batch = make_batch()
    blind = batch._replace(predictions=batch.predictions._replace(cvr_logit=torch.zeros(ROWS, dtype=torch.float64).requires_grad_()))
    squared, bce = (make_objective("escm2-dr", predicts="label", loss=loss) for loss in ("squared", "bce"))
    seen = take_step(squared, blind, phase="imputation").imputation_grad
    assert seen is not None
    assert (seen == 0).all()
    a, _, h, *_ = blind.logits()
    expected = batch.weight * batch.click / torch.sigmoid(a) * (torch.sigmoid(h) - batch.conversion) / batch.weight.sum()
    assert close(take_step(bce, blind, phase="imputation").imputation_grad, expected.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_unclicked_conversions_change_nothing(kind: str) -> None:
    # Not even NaN: what was never observed is never read.
    phase: Phase = whole_phase(kind)
    batch = make_batch()
    reference = take_step(make_objective(kind), batch, phase)
    for value in (1.0, float("nan")):
        other = torch.where(batch.click > 0, batch.conversion, value)
        seen = take_step(make_objective(kind), batch.with_labels(conversion=other), phase)
        assert torch.equal(seen.loss, reference.loss)
        for left, right in zip(seen[2:], reference[2:], strict=True):
            assert (left is None) is (right is None)
            assert left is None or right is None or torch.equal(left, right)


def test_kinds_differ_by_their_terms() -> None:
    names = {kind: list(take_step(make_objective(kind), make_batch()).values) for kind in KINDS}
    assert names == {
        "esmm": ["ctr", "ctcvr"],
        "naive": ["ctr", "cvr"],
        "naive+ctcvr": ["ctr", "cvr", "ctcvr"],
        "direct": ["ctr", "cvr"],
        "multi-ipw": ["ctr", "cvr"],
        "multi-dr": ["ctr", "cvr"],
        "escm2-ips": ["ctr", "cvr", "ctcvr"],
        "escm2-snips": ["ctr", "cvr", "ctcvr"],
        "escm2-dr": ["ctr", "cvr", "ctcvr"],
        "stable-dr": ["ctr", "cvr"],
        "dcmt": ["ctr", "cvr", "ctcvr"],
        "two-space": ["ctr", "cvr"],
    }
    with pytest.raises(ValueError, match="esmm has no imputation phase"):
        take_step(make_objective("esmm"), make_batch(), phase="imputation")


def test_dr_without_an_imputation_logit_says_how_to_get_one() -> None:
    batch = make_batch()
    predictions = batch.predictions._replace(imputation_logit=None)
    with pytest.raises(ValueError, match="needs predictions with a imputation logit: build the head with the tower 'imputation'"):
        make_objective("escm2-dr").terms(predictions, batch.click, batch.conversion, batch.weight, Stage("cvr"))


def test_lambdas_scale_their_terms() -> None:
    step = take_step(make_objective("escm2-dr", lambda_c=0.3, lambda_g=2.0, lambda_imp=0.7), make_batch(), phase="joint")
    expected = step.values["ctr"] + 0.3 * step.values["cvr"] + 2.0 * step.values["ctcvr"] + 0.7 * step.values["imputation"]
    assert close(step.loss, expected)


def test_scheduled_lambdas_follow_the_training() -> None:
    batch = make_batch()
    objective = make_objective("escm2-ips", lambda_c=Ramp(0.0, 2.0, 0.5), lambda_g=Ramp(3.0, 1.0, 1.0))
    scales = {}
    for progress in (0.0, 0.25, 0.5, 1.0):
        terms = objective.terms(batch.predictions, *batch[1:], Stage("cvr", progress=progress))
        scales[progress] = [terms[name].scale for name in ("ctr", "cvr", "ctcvr")]
    assert scales == {0.0: [1.0, 0.0, 3.0], 0.25: [1.0, 1.0, 2.5], 0.5: [1.0, 2.0, 2.0], 1.0: [1.0, 2.0, 1.0]}


def test_phases_alternate_k_to_one() -> None:
    assert [make_objective("escm2-dr", cvr_steps=2).phase(step) for step in range(6)] == ["cvr", "cvr", "imputation"] * 2
    assert [make_objective("escm2-dr").phase(step) for step in range(4)] == ["cvr", "imputation"] * 2
    assert {make_objective("escm2-dr", alternate=False).phase(step) for step in range(4)} == {"joint"}
    assert {make_objective("escm2-ips").phase(step) for step in range(4)} == {"cvr"}
    cycle = ["cvr", "imputation", "propensity"]
    assert [make_objective("stable-dr").phase(step) for step in range(6)] == cycle * 2
    assert [make_objective("stable-dr", cvr_steps=2).phase(step) for step in range(5)] == ["cvr", *cycle, "cvr"]
    imputing = {"direct", "multi-dr", "escm2-dr", "stable-dr", "two-space"}
    assert {kind for kind in KINDS if make_objective(kind).alternates} == imputing


def test_warm_up_weights_by_the_base_rate() -> None:
    # Then IPS is naive but for a constant: an untrained p_hat would weight by noise.
    batch = make_batch()
    step = take_step(make_objective("escm2-ips", base_ctr=0.25), batch, warm_up=True, only="cvr")
    _, z, *_ = batch.logits()
    expected = batch.weight * batch.click * (torch.sigmoid(z) - batch.conversion) / 0.25 / batch.weight.sum()
    assert close(step.cvr_grad, expected.detach())
