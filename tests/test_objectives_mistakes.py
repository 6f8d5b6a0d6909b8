"""What public ESCM2 code paths got wrong (docs/method.md): each test holds the right form and shows that it tells the wrong one apart.

Mistakes 10 and 11 are of evaluation and training, and are tested there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from escm2rec.models.predictions import Predictions
from escm2rec.objectives.bce import bce_losses, softplus
from escm2rec.objectives.estimator import estimator_of
from escm2rec.objectives.imputation import imputation_losses
from escm2rec.objectives.objective import TERMS, Phase, Stage
from escm2rec.objectives.propensity import propensity
from escm2rec.objectives.reduction import LossTerm, local_sums, reduce_terms
from tests.objectives_world import (
    IMPUTING,
    IMPUTING_ERRORS,
    KINDS,
    WEIGHING_CLICKS,
    WITH_CVR,
    Batch,
    close,
    cvr_parts,
    make_batch,
    make_objective,
    take_step,
    whole_phase,
)

DOUBLY_ROBUST = ("multi-dr", "escm2-dr")


def phases_of(kind: str) -> set[Phase]:
    """Every phase that a kind has, all at once included."""
    objective = make_objective(kind)
    return {whole_phase(kind), *(objective.phase(step) for step in range(6))}


@pytest.mark.parametrize("kind", WITH_CVR)
def test_mistake_01_the_denominator_is_all_impressions_of_all_ranks(kind: str) -> None:
    """The CVR loss over two ranks with unequal clicks is that of the whole; by clicks, or as a mean of rank means, it is not."""
    batch = make_batch()
    parts = cvr_parts(kind, batch)
    right = parts.numerators.sum() / parts.denominators.sum()
    ranks = [torch.arange(0, 3), torch.arange(3, 12)]
    objective = make_objective(kind)
    terms = [objective.terms(*batch.rows(rank), stage=Stage("cvr")) for rank in ranks]
    sums = torch.stack([local_sums(local) for local in terms]).sum(dim=0)
    for local in terms:
        assert close(reduce_terms(local, sums, world_size=2)[1]["cvr"], right.detach())

    by_rank = torch.stack([parts.numerators[rank].sum() / parts.denominators[rank].sum() for rank in ranks]).mean()
    assert not close(by_rank, right, tolerance=1e-3)
    if not estimator_of(kind).weighs:
        assert kind in ("naive", "naive+ctcvr"), "the one loss that is of clicks"
        return
    by_clicks = parts.numerators.sum() / (batch.weight * batch.click).sum()
    assert not close(by_clicks, right, tolerance=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_mistake_02_a_weight_does_not_depend_on_the_batch(kind: str) -> None:
    """What a row brings to every sum is the same whatever stands beside it; with 1/q capped at the clicks of the batch it is not."""
    objective, batch = make_objective(kind, lambda_balance=1.0), make_batch()
    few = batch.rows(torch.arange(4))
    whole, part = (objective.terms(*rows, stage=Stage(whole_phase(kind))) for rows in (batch, few))
    assert list(whole) == list(part)
    for name, term in whole.items():
        assert torch.equal(term.columns[:4], part[name].columns), name

    def capped_by_clicks(rows: Batch) -> Tensor:
        return (1 / propensity(rows.predictions.ctr_logit - 3, floor=0.01))[:4].clamp(max=rows.click.sum().item())

    assert not torch.equal(capped_by_clicks(batch), capped_by_clicks(few))


@pytest.mark.parametrize("kind", WEIGHING_CLICKS)
def test_mistake_03_weights_meet_losses_one_by_one(kind: str) -> None:
    """(1/N) sum o delta / q is a mean of products; the product of means weights nothing."""
    batch = make_batch()
    parts = cvr_parts(kind, batch)
    seen = take_step(make_objective(kind), batch).values["cvr"]
    assert close(seen, (parts.numerators.sum() / parts.denominators.sum()).detach())

    def averaged_first(q: Tensor) -> Tensor:
        return (batch.click * parts.delta).mean() * (1 / q).mean()

    # The wrong form does not notice which row bears which weight; the right one does.
    other = parts.q.flip(0)
    assert close(averaged_first(parts.q), averaged_first(other))
    assert not close(seen, averaged_first(parts.q), tolerance=1e-2)
    moved = cvr_parts(kind, batch, own_q=other)
    assert not close(seen, moved.numerators.sum() / moved.denominators.sum(), tolerance=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_mistake_04_logits_meet_the_logit_loss(kind: str) -> None:
    """Sure and right predictions cost nothing in any term; with probabilities taken for logits each costs at least log(1 + exp(-1))."""
    sure = torch.tensor([40.0, -40.0], requires_grad=True)
    label = torch.tensor([1.0, 0.0])
    predictions = Predictions(sure, sure, sure, -sure, sure)
    objective = make_objective(kind, predicts="label", loss="bce")
    terms = objective.terms(predictions, label, label, torch.ones(2), Stage(whole_phase(kind)))
    for name, term in terms.items():
        assert name == "stability" or term.losses.max() < 1e-15, name

    wrong = functional.binary_cross_entropy_with_logits(torch.sigmoid(sure), label)
    assert wrong > 0.3


@pytest.mark.parametrize("predicts", ["error", "label"])
@pytest.mark.parametrize("kind", WEIGHING_CLICKS)
def test_mistake_05_the_propensity_is_detached(kind: str, predicts: str) -> None:
    """L_CVR and the imputation loss do not reach the logit that q is made of; with a q that is not detached they do."""
    batch, objective = make_batch(), make_objective(kind, predicts=predicts)
    for name in {"cvr", "imputation"} & objective.terms(*batch, stage=Stage(whole_phase(kind))).keys():
        step = take_step(objective, batch, whole_phase(kind), only=name)
        assert step.ctr_grad is None
        assert step.propensity_grad is None
    assert not objective.propensity(batch.predictions, Stage("cvr")).requires_grad

    logit = objective.propensity_logit(batch.predictions)
    parts = cvr_parts(kind, batch, predicts, own_q=torch.sigmoid(logit))
    (wrong,) = torch.autograd.grad(parts.numerators.sum() / parts.denominators.sum(), logit)
    assert (wrong[batch.click > 0] != 0).all()
    if kind in ("multi-ipw", "escm2-ips"):
        assert (wrong[batch.click > 0] < 0).all(), "IPS lowers itself by raising p_hat of clicked rows"


@pytest.mark.parametrize("kind", IMPUTING_ERRORS)
def test_mistake_06_the_imputed_error_is_unbounded(kind: str) -> None:
    """delta_hat reaches any error; squashed into (0, 1) it cannot reach delta = 3."""
    one = torch.ones(2, dtype=torch.float64)
    z = -torch.log(torch.expm1(3 * one))
    assert close(bce_losses(z, one), 3 * one)
    h = torch.log(torch.expm1(3 * one))
    click = torch.tensor([1.0, 0.0], dtype=torch.float64)
    terms = make_objective(kind, predicts="error").terms(Predictions(0 * one, z, h, None, 0 * one), click, click, one, Stage("joint"))
    assert terms["imputation"].losses.max().item() < 1e-20
    if kind in DOUBLY_ROBUST:
        assert close(terms["cvr"].losses, 3 * one)

    tops = torch.linspace(-50, 50, 101, dtype=torch.float64)
    assert ((3 - torch.sigmoid(tops)) ** 2).min() >= 4


@pytest.mark.parametrize("predicts", ["error", "label"])
@pytest.mark.parametrize("kind", IMPUTING)
def test_mistake_07_only_clicked_rows_have_an_error(kind: str, predicts: Any) -> None:
    """Unclicked rows enter neither delta nor the imputation loss; without the mask their labels change it."""
    batch = make_batch()
    other = torch.where(batch.click > 0, batch.conversion, 1 - batch.conversion)
    objective = make_objective(kind, predicts=predicts)
    for phase in phases_of(kind):
        assert torch.equal(take_step(objective, batch, phase).loss, take_step(objective, batch.with_labels(conversion=other), phase).loss)
    imputation_grad = take_step(objective, batch, "imputation").imputation_grad
    assert imputation_grad is not None
    assert (imputation_grad[batch.click == 0] == 0).all()
    assert (imputation_grad[batch.click > 0] != 0).all()

    _, z, h, *_ = batch.logits()
    unmasked = [imputation_losses(h, z, labels, predicts, "squared").mean() for labels in (batch.conversion, other)]
    assert not close(unmasked[0], unmasked[1], tolerance=1e-2)


@pytest.mark.parametrize("predicts", ["error", "label"])
@pytest.mark.parametrize("kind", DOUBLY_ROBUST)
def test_mistake_08_the_imputed_error_is_divided_by_q_on_clicked_rows_only(kind: str, predicts: str) -> None:
    """Right imputation makes DR's average over clicks the true risk under any q; misplaced divisions do not."""
    batch = make_batch()
    p = torch.linspace(0.1, 0.9, 12, dtype=torch.float64)
    a, z, h, *_ = (logit.detach() for logit in batch.logits())
    q, m = torch.sigmoid(a), torch.sigmoid(h)
    # DR is linear in o, so its average over clicks is its value at o = p; and the error is imputed right: delta = delta_hat.
    one, none = torch.ones_like(p), torch.zeros_like(p)
    if predicts == "error":
        delta_hat, conversion = softplus(h), one
        z = -torch.log(torch.expm1(delta_hat))
    else:
        delta_hat, conversion = bce_losses(z, m), m

    def losses(click: Tensor) -> Tensor:
        objective = make_objective(kind, predicts=predicts)
        return objective.terms(Predictions(a, z, h), click, conversion, one, Stage("cvr"))["cvr"].losses

    average = p * losses(one) + (1 - p) * losses(none)
    assert close(average, delta_hat, tolerance=1e-9)

    delta = delta_hat
    nowhere = p * (delta / q - delta_hat) + delta_hat
    everywhere = p * (delta - delta_hat) / q + delta_hat / q
    assert not close(nowhere, delta_hat, tolerance=1e-2)
    assert not close(everywhere, delta_hat, tolerance=1e-2)


@pytest.mark.parametrize("predicts", ["error", "label"])
@pytest.mark.parametrize("kind", IMPUTING)
def test_mistake_09_neither_tower_is_trained_to_please_the_other(kind: str, predicts: str) -> None:
    """The imputation loss does not move the CVR tower, L_CVR does not move the imputation tower; undetached both do."""
    batch = make_batch()
    objective = make_objective(kind, predicts=predicts)
    assert take_step(objective, batch, "imputation").cvr_grad is None
    assert take_step(objective, batch, "cvr").imputation_grad is None
    joint = take_step(objective, batch, "joint").imputation_grad
    alone = take_step(objective, batch, "imputation").imputation_grad
    assert alone is not None
    assert close(joint, alone)

    _, z, h, *_ = batch.logits()
    delta, q = cvr_parts("escm2-ips", batch)[2:]
    imputed = softplus(h) if predicts == "error" else bce_losses(z, torch.sigmoid(h))
    (towards_imputation,) = torch.autograd.grad((batch.click * (delta - imputed) ** 2 / q).mean(), z, retain_graph=True)
    assert towards_imputation.abs().max() > 1e-2
    (shrinking,) = torch.autograd.grad((imputed + batch.click * (delta - imputed) / q).sum(), h)
    slope = torch.sigmoid(h) if predicts == "error" else -z * torch.sigmoid(h) * torch.sigmoid(-h)
    assert close(shrinking, ((1 - batch.click / q) * slope).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_mistake_12_a_batch_without_a_click_is_a_batch(kind: str) -> None:
    """Finite, with no CVR loss where that is of clicks alone; a mean over the clicked rows is NaN."""
    batch = make_batch()
    none = batch.with_labels(click=torch.zeros_like(batch.click))
    phase: Phase = whole_phase(kind)
    step = take_step(make_objective(kind, normalise=True), none, phase)
    assert step.loss.isfinite()
    for grad in step[2:]:
        assert grad is None or grad.isfinite().all()
    if kind in ("naive", "naive+ctcvr", "multi-ipw", "escm2-ips", "escm2-snips", "stable-dr"):
        cvr = take_step(make_objective(kind), none, only="cvr")
        assert cvr.loss == 0
        assert cvr.cvr_grad is not None
        assert (cvr.cvr_grad == 0).all()
    if "imputation" in estimator_of(kind).towers:
        assert step.values["imputation"] == 0

    delta = cvr_parts("naive", none).delta
    assert delta[none.click > 0].mean().isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_mistake_12_outputs_keep_their_names_in_every_mode(kind: str) -> None:
    """Predictions and terms are named: what a name means does not change with kind or phase."""
    logits = ("ctr_logit", "cvr_logit", "imputation_logit", "counterfactual_logit", "propensity_logit")
    assert Predictions._fields == (*logits, "inputs")
    batch = make_batch()
    objective = make_objective(kind)
    phases: set[Phase] = {"joint", *(objective.phase(step) for step in range(6))}
    for phase in phases:
        terms = objective.terms(*batch, stage=Stage(phase))
        assert list(terms) == [name for name in TERMS if name in terms]
        assert all(isinstance(term, LossTerm) for term in terms.values())
        if "ctr" in terms:
            assert close(terms["ctr"].losses, batch.weight * bce_losses(batch.predictions.ctr_logit, batch.click))


def one_parameter(rows: list[tuple[float, float, float]], ctr: float, cvr: float, m: float = 0.5) -> Batch:
    """Impressions of one kind, all with the same logits: click, conversion and count of each."""
    click, conversion, count = torch.tensor(rows, dtype=torch.float64).unbind(1)
    probabilities = (torch.full_like(count, value) for value in (ctr, cvr, m, 1 - cvr, ctr))
    leaves = [torch.logit(probability).requires_grad_() for probability in probabilities]
    return Batch(Predictions(*leaves)._replace(inputs=torch.zeros(len(rows), 0)), click, conversion, count)


def slope_of(term: str, batch: Batch, kind: str, **settings: Any) -> float:
    """Gradient of a term in the logit that all rows share: a's of `ctr`, z's otherwise."""
    step = take_step(make_objective(kind, **settings), batch, only=term)
    grad = step.ctr_grad if term == "ctr" else step.cvr_grad
    assert grad is not None
    return grad.sum().item()


@pytest.mark.parametrize("kind", KINDS)
def test_caution_kept_negatives_are_corrected_once(kind: str) -> None:
    """Weighted 1/k, L_CTR is least at the true rate, and q is p_hat as it stands; its odds times k again make .023 of .069."""
    ctr, k = 0.069, 0.32
    rows = [(1.0, 0.0, 6_900.0), (0.0, 0.0, 29_792 / k)]
    right = one_parameter(rows, ctr, 0.1)
    assert abs(slope_of("ctr", right, kind)) < 1e-12
    assert make_objective(kind).propensity(right.predictions, Stage("cvr")).tolist() == pytest.approx([ctr, ctr])

    twice = torch.sigmoid(torch.logit(torch.tensor(ctr)) + torch.log(torch.tensor(k))).item()
    assert round(twice, 3) == 0.023
    assert slope_of("ctr", one_parameter(rows, twice, 0.1), kind) < -0.04


@pytest.mark.parametrize("kind", KINDS)
def test_caution_no_class_has_a_weight(kind: str) -> None:
    """L_CTR is least at the click rate, where sum(o/q)/N is 1; with a weight for clicks it is least elsewhere, where that is not 1."""
    clicked = torch.tensor([1.0, 0.0], dtype=torch.float64)
    rows = [(1.0, 0.0, 10.0), (0.0, 0.0, 90.0)]
    assert abs(slope_of("ctr", one_parameter(rows, 0.1, 0.1), kind)) < 1e-12

    wrong = one_parameter(rows, 5 * 10 / (5 * 10 + 90), 0.1)
    losses = functional.binary_cross_entropy_with_logits(
        wrong.predictions.ctr_logit, clicked, wrong.weight, pos_weight=torch.tensor(5.0), reduction="sum"
    )
    (grad,) = torch.autograd.grad(losses, wrong.predictions.ctr_logit)
    assert abs(grad.sum().item()) < 1e-10
    assert slope_of("ctr", wrong, kind) > 0.1
    q = make_objective(kind).propensity(wrong.predictions, Stage("cvr"))
    assert (wrong.weight * clicked / q).sum() / wrong.weight.sum() < 0.3


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_caution_zero_labels_halve_the_cvr(beta: float) -> None:
    """Two-space with m = eta is least at eta; with 0 for the unclicked at eta / (1 + beta). Convex: a slope of 0 is the minimum."""
    p, eta = 0.3, 0.2
    rows = [(1.0, 1.0, p * eta), (1.0, 0.0, p * (1 - eta)), (0.0, 0.0, 1 - p)]

    def slope(cvr: float, m: float) -> float:
        return slope_of("cvr", one_parameter(rows, p, cvr, m), "two-space", beta=beta)

    assert abs(slope(eta, m=eta)) < 1e-12
    assert abs(slope(eta / (1 + beta), m=0.0)) < 1e-12
    assert slope(eta, m=0.0) == pytest.approx(beta * eta)
    assert slope(eta / (1 + beta), m=eta) < -0.05


def test_every_kind_is_in_the_table_of_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "method.md").read_text(encoding="utf-8")
    table = page.split("| kind | L_CVR |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"`([\w+-]+)`", "".join(line.split("|")[1] for line in table.splitlines()[1:]))) == sorted(KINDS)


def test_every_guard_that_the_documentation_names_exists() -> None:
    root = Path(__file__).parents[1]
    named = re.findall(r"`(test_\w+)`", (root / "docs" / "method.md").read_text(encoding="utf-8"))
    tests = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").glob("test_*.py"))
    assert len(named) >= 11
    assert [name for name in named if f"def {name}(" not in tests] == []
