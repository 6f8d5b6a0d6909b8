"""One loss, however the batch is cut into ranks, ordered or weighted."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from escm2rec.objectives.objective import Objective, Phase, Stage
from escm2rec.objectives.reduction import local_sums, mean_of, reduce_terms, squared_mean_of
from tests.objectives_world import KINDS, Batch, close, make_batch, make_objective, take_step, whole_phase


def step_over_ranks(objective: Objective, batch: Batch, ranks: list[Tensor], phase: Phase) -> tuple[Tensor, Tensor]:
    """Loss and gradients [5, B] as DDP makes them: averaged over ranks, each rank with its rows alone and the global denominators."""
    parts = [batch.rows(rank) for rank in ranks]
    terms = [objective.terms(*part, stage=Stage(phase)) for part in parts]
    sums = torch.stack([local_sums(local) for local in terms]).sum(dim=0)
    losses, grads = [], torch.zeros(5, len(batch.click), dtype=torch.float64)
    for rank, part, local in zip(ranks, parts, terms, strict=True):
        loss, _ = reduce_terms(local, sums, world_size=len(ranks))
        losses.append(loss.detach())
        for row, grad in enumerate(torch.autograd.grad(loss, part.logits(), allow_unused=True)):
            if grad is not None:
                grads[row, rank] = grad / len(ranks)
    return torch.stack(losses).mean(), grads


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    normalise=st.booleans(),
    predicts=st.sampled_from(["error", "label"]),
    balance=st.sampled_from([0.0, 0.3]),
    rows=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 12), max_size=3),
    seed=st.integers(0, 1000),
)
def test_ranks_make_the_step_that_one_rank_makes(
    kind: str, normalise: bool, predicts: str, balance: float, rows: int, cuts: list[int], seed: int
) -> None:
    """Empty ranks and ranks without a click included."""
    objective = make_objective(kind, normalise=normalise, predicts=predicts, lambda_balance=balance, floor=0.02)
    batch = make_batch(rows, seed)
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    ranks = [torch.arange(start, stop) for start, stop in pairwise(edges)]
    whole_loss, whole_grads = step_over_ranks(objective, batch, [torch.arange(rows)], whole_phase(kind))
    loss, grads = step_over_ranks(objective, batch, ranks, whole_phase(kind))
    assert close(loss, whole_loss, tolerance=1e-10)
    assert close(grads, whole_grads, tolerance=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    normalise=st.booleans(),
    predicts=st.sampled_from(["error", "label"]),
    order=st.permutations(range(12)),
    factor=st.floats(1e-3, 1e3),
)
def test_order_and_scale_of_the_weights_do_not_matter(kind: str, normalise: bool, predicts: str, order: list[int], factor: float) -> None:
    objective = make_objective(kind, normalise=normalise, predicts=predicts, lambda_balance=0.3)
    batch, index = make_batch(), torch.tensor(order)
    shuffled = batch.rows(index)
    reference = take_step(objective, batch, whole_phase(kind))
    seen = take_step(objective, shuffled.with_labels(weight=factor * shuffled.weight), whole_phase(kind))
    assert seen.values.keys() == reference.values.keys()
    assert all(close(seen.values[name], value, tolerance=1e-10) for name, value in reference.values.items())
    grads = list(zip(seen[2:], reference[2:], strict=True))
    assert len(grads) == 5
    for left, right in grads:
        assert (left is None) is (right is None)
        assert right is None or close(left, right[index], tolerance=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_impression_weight_is_a_number_of_impressions(kind: str) -> None:
    # What makes weights of 1/k right for negatives kept at rate k.
    batch = make_batch().with_labels(weight=torch.ones(12, dtype=torch.float64))
    tripled = torch.cat([torch.arange(12), torch.tensor([2, 2])])
    weight = batch.weight.clone()
    weight[2] = 3
    objective = make_objective(kind, lambda_balance=0.3)
    by_weight = take_step(objective, batch.with_labels(weight=weight), whole_phase(kind))
    by_rows = take_step(objective, batch.rows(tripled), whole_phase(kind))
    assert close(by_weight.loss, by_rows.loss)


def test_a_term_without_a_denominator_is_exactly_zero() -> None:
    losses = torch.zeros(3, requires_grad=True)
    none, one = torch.zeros(3), torch.ones(3)
    terms = {"cvr": mean_of(2 * losses, none), "ctr": mean_of(losses + 1, one), "balance": squared_mean_of(losses.unsqueeze(1), none)}
    loss, values = reduce_terms(terms, local_sums(terms), world_size=1)
    (grad,) = torch.autograd.grad(loss, losses)
    assert values["cvr"] == values["balance"] == 0
    assert loss == 1
    assert close(grad, torch.full((3,), 1 / 3), tolerance=1e-6)


def test_values_are_global_and_unscaled() -> None:
    # Neither lambda nor world_size is in what is logged; the loss is scaled by lambda alone.
    terms = {"ctr": mean_of(torch.tensor([1.0, 2.0]), torch.ones(2))._replace(scale=7.0)}
    loss, values = reduce_terms(terms, torch.tensor([9.0, 6.0]), world_size=3)
    assert values["ctr"].item() == pytest.approx(1.5)
    assert loss.item() == pytest.approx(7.0 * 1.5)


def test_a_squared_mean_over_ranks_has_the_gradient_of_the_whole() -> None:
    """world_size 2 S S(rank): squared rank by rank, and averaged, it is another loss."""
    values = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-1.0, 1.0], [2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    whole = ((values.sum(dim=0) / weight.sum()) ** 2).sum()
    (expected,) = torch.autograd.grad(whole, values)
    ranks = [slice(0, 1), slice(1, 4)]
    parts = [{"balance": squared_mean_of(values[rank], weight[rank])} for rank in ranks]
    sums = torch.stack([local_sums(part) for part in parts]).sum(dim=0)
    losses = torch.stack([reduce_terms(part, sums, world_size=2)[0] for part in parts])
    (grad,) = torch.autograd.grad(losses.mean(), values)
    assert close(losses.detach(), whole.detach().expand(2))
    assert close(grad, expected)

    alone = torch.stack([reduce_terms(part, local_sums(part), world_size=1)[0] for part in parts]).mean()
    (wrong,) = torch.autograd.grad(alone, values)
    assert not close(wrong, expected, tolerance=1e-2)


def test_stability_over_ranks_is_no_mean_of_theirs() -> None:
    """[mean (o/p) delta_hat - mean (o/p) mean delta_hat]^2 over all rows: its gradient by the formula; on three ranks, one empty."""
    batch = make_batch()
    _, _, h, _, own = (logit.detach() for logit in batch.logits())
    o, w, p, imputed = batch.click, batch.weight, torch.sigmoid(own), torch.log1p(h.exp())
    apart = imputed - (w * imputed).sum() / w.sum()
    covariance = (w * o / p * apart).sum() / w.sum()
    expected = 2 * covariance * -w * o * (1 - p) / p * apart / w.sum()
    objective = make_objective("stable-dr", stability=1.0)
    whole = take_step(objective, batch, "propensity", only="stability")
    assert close(whole.loss, covariance**2)
    assert close(whole.propensity_grad, expected)

    ranks = [torch.arange(0, 5), torch.arange(5, 5), torch.arange(5, 12)]
    without = make_objective("stable-dr", stability=0.0)
    grads = [step_over_ranks(each, batch, ranks, "propensity")[1][4] for each in (objective, without)]
    assert close(grads[0] - grads[1], expected)
    alone = [take_step(objective, batch.rows(rank), "propensity", only="stability").propensity_grad for rank in ranks]
    wrong = torch.cat([grad for grad in alone if grad is not None]) / 3
    assert not close(wrong, expected, tolerance=1e-2)


def test_sums_must_fit_the_terms() -> None:
    terms = {"ctr": mean_of(torch.ones(2), torch.ones(2))}
    with pytest.raises(RuntimeError, match="split"):
        reduce_terms(terms, torch.ones(3), world_size=1)
