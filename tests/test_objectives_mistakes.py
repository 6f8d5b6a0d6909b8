"""What public ESCM2 code paths got wrong (docs/method.md): each test holds the right form and shows that it tells the wrong one apart.

Mistakes 10 and 11 are of evaluation and training, and are tested there.
"""

from __future__ import annotations

import re
from pathlib import Path

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
from tests.objectives_world import KINDS, Batch, close, make_batch, make_objective, take_step, whole_phase


def ips_parts(batch: Batch) -> tuple[Tensor, Tensor]:
    """delta and q of a batch, written out: for the wrong forms."""
    a, z, *_ = batch.logits()
    delta = torch.where(batch.conversion > 0, -torch.log(torch.sigmoid(z)), -torch.log(torch.sigmoid(-z)))
    return delta, torch.sigmoid(a)


def test_mistake_01_the_denominator_is_all_impressions_of_all_ranks() -> None:
    """IPS over two ranks with unequal clicks is (1/N) sum w o delta / q; by clicks, or as a mean of rank means, it is not."""
    batch = make_batch()
    delta, q = ips_parts(batch)
    right = (batch.weight * batch.click * delta / q).sum() / batch.weight.sum()
    ranks = [torch.arange(0, 3), torch.arange(3, 12)]
    objective = make_objective("escm2-ips")
    terms = [objective.terms(*batch.rows(rank), stage=Stage("cvr")) for rank in ranks]
    sums = torch.stack([local_sums(local) for local in terms]).sum(dim=0)
    for local in terms:
        assert close(reduce_terms(local, sums, world_size=2)[1]["cvr"], right.detach())

    by_clicks = (batch.weight * batch.click * delta / q).sum() / (batch.weight * batch.click).sum()
    by_rank = torch.stack([(batch.weight * batch.click * delta / q)[rank].sum() / batch.weight[rank].sum() for rank in ranks]).mean()
    assert not close(by_clicks, right, tolerance=1e-2)
    assert not close(by_rank, right, tolerance=1e-2)


def test_mistake_02_a_weight_does_not_depend_on_the_batch() -> None:
    """A row's q is the same whatever stands beside it; capped at the number of clicks in the batch, 1/q is not."""
    logits = torch.tensor([-3.0, -2.5, 0.0])
    alone = propensity(logits[:1], floor=0.01)
    assert torch.equal(propensity(logits, floor=0.01)[:1], alone)

    def capped_by_clicks(num_clicks: int) -> Tensor:
        return (1 / torch.sigmoid(logits[:1])).clamp(max=num_clicks)

    assert not torch.equal(capped_by_clicks(1), capped_by_clicks(3))


def test_mistake_03_weights_meet_losses_one_by_one() -> None:
    """(1/N) sum o delta / q is a mean of products; the product of means weights nothing."""
    batch = make_batch()
    delta, q = ips_parts(batch)
    seen = take_step(make_objective("escm2-ips"), batch).values["cvr"]
    assert close(seen, ((batch.weight * batch.click * delta / q).sum() / batch.weight.sum()).detach())

    def averaged_first(q: Tensor) -> Tensor:
        return (batch.click * delta).mean() * (1 / q).mean()

    # The wrong form does not notice which row bears which weight.
    assert close(averaged_first(q), averaged_first(q.flip(0)))
    assert not close(seen, averaged_first(q), tolerance=1e-2)


@pytest.mark.parametrize("term", ["ctr", "cvr"])
def test_mistake_04_logits_meet_the_logit_loss(term: str) -> None:
    """A sure and right prediction costs nothing; with probabilities taken for logits it costs at least log(1 + exp(-1))."""
    sure = torch.full((2,), 40.0, requires_grad=True)
    one = torch.ones(2)
    terms = make_objective("escm2-ips").terms(Predictions(sure, sure), one, one, one, Stage("cvr"))
    assert terms[term].losses.max() < 1e-15

    wrong = functional.binary_cross_entropy_with_logits(torch.sigmoid(sure), one)
    assert wrong > 0.3


@pytest.mark.parametrize("kind", ["escm2-ips", "escm2-dr"])
def test_mistake_05_the_propensity_is_detached(kind: str) -> None:
    """L_CVR does not reach the CTR logit; with a q that is not detached it lowers itself by raising p_hat of clicked rows."""
    batch = make_batch()
    assert take_step(make_objective(kind), batch, only="cvr").ctr_grad is None
    assert not propensity(batch.predictions.ctr_logit, floor=0.0).requires_grad

    delta, q = ips_parts(batch)
    (wrong,) = torch.autograd.grad((batch.click * delta / q).mean(), batch.predictions.ctr_logit)
    assert (wrong[batch.click > 0] < 0).all()


def test_mistake_06_the_imputed_error_is_unbounded() -> None:
    """delta_hat reaches any error; squashed into (0, 1) it cannot reach delta = 3."""
    one = torch.ones(1, dtype=torch.float64)
    z = -torch.log(torch.expm1(3 * one))
    assert close(bce_losses(z, one), 3 * one)
    h = torch.log(torch.expm1(3 * one))
    assert imputation_losses(h, z, one, "error", "squared").item() < 1e-20

    tops = torch.linspace(-50, 50, 101, dtype=torch.float64)
    assert ((3 - torch.sigmoid(tops)) ** 2).min() >= 4


def test_mistake_07_only_clicked_rows_have_an_error() -> None:
    """Unclicked rows enter neither delta nor the imputation loss; without the mask their labels change it."""
    batch = make_batch()
    other = torch.where(batch.click > 0, batch.conversion, 1 - batch.conversion)
    objective = make_objective("escm2-dr")
    for phase in ("cvr", "imputation"):
        assert torch.equal(take_step(objective, batch, phase).loss, take_step(objective, batch.with_labels(conversion=other), phase).loss)
    imputation_grad = take_step(objective, batch, "imputation").imputation_grad
    assert imputation_grad is not None
    assert (imputation_grad[batch.click == 0] == 0).all()
    assert (imputation_grad[batch.click > 0] != 0).all()

    _, z, h, *_ = batch.logits()
    unmasked = [(imputation_losses(h, z, labels, "error", "squared")).mean() for labels in (batch.conversion, other)]
    assert not close(unmasked[0], unmasked[1], tolerance=1e-2)


def test_mistake_08_the_imputed_error_is_divided_by_q_on_clicked_rows_only() -> None:
    """Right imputation makes DR's average over clicks the true risk under any q; misplaced divisions do not."""
    batch = make_batch()
    p = torch.linspace(0.1, 0.9, 12, dtype=torch.float64)
    _, _, h, *_ = batch.logits()
    _, q = ips_parts(batch)
    delta_hat = softplus(h)
    # DR is linear in o, so its average over clicks is its value at o = p; and the error is imputed right: delta = delta_hat.
    one, none = torch.ones_like(p), torch.zeros_like(p)
    objective = make_objective("escm2-dr")

    def losses(click: Tensor) -> Tensor:
        right = Predictions(batch.predictions.ctr_logit, -torch.log(torch.expm1(delta_hat)), h)
        return objective.terms(right, click, click, one, Stage("cvr"))["cvr"].losses

    average = p * losses(one) + (1 - p) * losses(none)
    assert close(average.detach(), delta_hat.detach(), tolerance=1e-9)

    delta = delta_hat
    nowhere = p * (delta / q - delta_hat) + delta_hat
    everywhere = p * (delta - delta_hat) / q + delta_hat / q
    assert not close(nowhere, delta_hat, tolerance=1e-2)
    assert not close(everywhere, delta_hat, tolerance=1e-2)


def test_mistake_09_neither_tower_is_trained_to_please_the_other() -> None:
    """The imputation loss does not move the CVR tower, L_DR does not move the imputation tower; undetached both do."""
    batch = make_batch()
    objective = make_objective("escm2-dr")
    assert take_step(objective, batch, "imputation").cvr_grad is None
    assert take_step(objective, batch, "cvr").imputation_grad is None
    joint = take_step(objective, batch, "joint").imputation_grad
    alone = take_step(objective, batch, "imputation").imputation_grad
    assert alone is not None
    assert close(joint, alone)

    _, z, h, *_ = batch.logits()
    delta, q = ips_parts(batch)
    (towards_imputation,) = torch.autograd.grad((batch.click * (delta - softplus(h)) ** 2 / q).mean(), z, retain_graph=True)
    assert towards_imputation.abs().max() > 1e-2
    (shrinking,) = torch.autograd.grad((softplus(h) + batch.click * (delta - softplus(h)) / q).sum(), h)
    assert close(shrinking, ((1 - batch.click / q) * torch.sigmoid(h)).detach())


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

    delta, _ = ips_parts(none)
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


def test_every_guard_that_the_documentation_names_exists() -> None:
    root = Path(__file__).parents[1]
    named = re.findall(r"`(test_\w+)`", (root / "docs" / "method.md").read_text(encoding="utf-8"))
    tests = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").glob("test_*.py"))
    assert len(named) >= 11
    assert [name for name in named if f"def {name}(" not in tests] == []
