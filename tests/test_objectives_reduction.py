"""One loss, however the batch is cut into ranks, ordered or weighted."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from escm2rec.objectives.objective import Kind, Objective, Phase
from escm2rec.objectives.reduction import LossTerm, local_denominators, reduce_terms
from tests.objectives_world import KINDS, Batch, close, make_batch, make_objective, take_step


def phase_of(kind: Kind) -> Phase:
    return "joint" if kind == "escm2-dr" else "cvr"


def step_over_ranks(objective: Objective, batch: Batch, ranks: list[Tensor], phase: Phase) -> tuple[Tensor, Tensor]:
    """Loss and gradients [3, B] as DDP makes them: averaged over ranks, each rank with its rows alone and the global denominators."""
    parts = [batch.rows(rank) for rank in ranks]
    terms = [objective.terms(*part, phase=phase, warm_up=False) for part in parts]
    denominators = torch.stack([local_denominators(local) for local in terms]).sum(dim=0)
    losses, grads = [], torch.zeros(3, len(batch.click), dtype=torch.float64)
    for rank, part, local in zip(ranks, parts, terms, strict=True):
        loss, _ = reduce_terms(local, denominators, world_size=len(ranks))
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
    rows=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 12), max_size=3),
    seed=st.integers(0, 1000),
)
def test_ranks_make_the_step_that_one_rank_makes(kind: Kind, normalise: bool, predicts: str, rows: int, cuts: list[int], seed: int) -> None:
    """Empty ranks and ranks without a click included."""
    objective = make_objective(kind, normalise=normalise, predicts=predicts, floor=0.02)
    batch = make_batch(rows, seed)
    edges = [0, *sorted(min(cut, rows) for cut in cuts), rows]
    ranks = [torch.arange(start, stop) for start, stop in pairwise(edges)]
    whole_loss, whole_grads = step_over_ranks(objective, batch, [torch.arange(rows)], phase_of(kind))
    loss, grads = step_over_ranks(objective, batch, ranks, phase_of(kind))
    assert close(loss, whole_loss, tolerance=1e-10)
    assert close(grads, whole_grads, tolerance=1e-10)


@settings(max_examples=20, deadline=None)
@given(kind=st.sampled_from(KINDS), order=st.permutations(range(12)), factor=st.floats(1e-3, 1e3))
def test_order_and_scale_of_the_weights_do_not_matter(kind: Kind, order: list[int], factor: float) -> None:
    objective = make_objective(kind, normalise=True)
    batch = make_batch()
    shuffled = batch.rows(torch.tensor(order))
    reference = take_step(objective, batch, phase_of(kind))
    seen = take_step(objective, shuffled.with_labels(weight=factor * shuffled.weight), phase_of(kind))
    assert close(seen.loss, reference.loss, tolerance=1e-10)
    assert seen.cvr_grad is not None
    assert reference.cvr_grad is not None
    assert close(seen.cvr_grad, reference.cvr_grad[torch.tensor(order)], tolerance=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_impression_weight_is_a_number_of_impressions(kind: Kind) -> None:
    # What makes weights of 1/k right for negatives kept at rate k.
    batch = make_batch().with_labels(weight=torch.ones(12, dtype=torch.float64))
    tripled = torch.cat([torch.arange(12), torch.tensor([2, 2])])
    weight = batch.weight.clone()
    weight[2] = 3
    by_weight = take_step(make_objective(kind), batch.with_labels(weight=weight), phase_of(kind))
    by_rows = take_step(make_objective(kind), batch.rows(tripled), phase_of(kind))
    assert close(by_weight.loss, by_rows.loss)


def test_a_term_without_a_denominator_is_exactly_zero() -> None:
    losses = torch.zeros(3, requires_grad=True)
    terms = {"cvr": LossTerm(2 * losses, torch.zeros(3), 0.5), "ctr": LossTerm(losses + 1, torch.ones(3), 1.0)}
    loss, shares = reduce_terms(terms, local_denominators(terms), world_size=1)
    (grad,) = torch.autograd.grad(loss, losses)
    assert shares["cvr"] == 0
    assert loss == 1
    assert close(grad, torch.full((3,), 1 / 3), tolerance=1e-6)


def test_shares_add_up_to_the_unscaled_global_loss() -> None:
    # Neither lambda nor world_size is in what is logged.
    terms = {"ctr": LossTerm(torch.tensor([1.0, 2.0]), torch.ones(2), 7.0)}
    loss, shares = reduce_terms(terms, torch.tensor([6.0]), world_size=3)
    assert shares["ctr"].item() == pytest.approx(0.5)
    assert loss.item() == pytest.approx(7.0 * 3 * 0.5)


def test_denominators_must_fit_the_terms() -> None:
    terms = {"ctr": LossTerm(torch.ones(2), torch.ones(2), 1.0)}
    with pytest.raises(ValueError, match="zip"):
        reduce_terms(terms, torch.ones(2), world_size=1)
