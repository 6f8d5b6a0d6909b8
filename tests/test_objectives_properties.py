"""What holds of every objective whatever the batch: what unclicked rows change, and that nothing is ever infinite or NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from escm2rec.models.predictions import Predictions
from escm2rec.objectives.objective import Stage
from escm2rec.objectives.reduction import local_sums, reduce_terms
from tests.objectives_world import IMPUTING, KINDS, WITH_CVR, Batch, close, cvr_parts, make_batch, make_objective, take_step, whole_phase

SHAPE = {
    "rows": st.integers(3, 12),
    "more": st.integers(1, 8),
    "seed": st.integers(0, 1000),
    "predicts": st.sampled_from(["error", "label"]),
}
BETA = 0.7


def with_unclicked(batch: Batch, more: Batch) -> Batch:
    """The batch with the rows of another one, none of them clicked, behind its own."""
    logits = [torch.cat(pair).detach().requires_grad_() for pair in zip(batch.logits(), more.logits(), strict=True)]
    assert batch.predictions.inputs is not None
    assert more.predictions.inputs is not None
    inputs = torch.cat([batch.predictions.inputs, more.predictions.inputs])
    labels = (
        torch.cat([batch.click, 0 * more.click]),
        torch.cat([batch.conversion, more.conversion]),
        torch.cat([batch.weight, more.weight]),
    )
    return Batch(Predictions(*logits)._replace(inputs=inputs), *labels)


def growth(kind: str, more: Batch, predicts: str) -> Tensor:
    """By how much unclicked rows make N L_CVR, or N_c L_CVR, grow, by the formulas."""
    a, z, h, star, _ = more.logits()
    m, q = torch.sigmoid(h), torch.sigmoid(a)
    of_label = -m * torch.log(torch.sigmoid(z)) - (1 - m) * torch.log(torch.sigmoid(-z))
    delta_hat = of_label if predicts == "label" else torch.log1p(h.exp())
    apart = (1 - torch.sigmoid(z) - torch.sigmoid(star)).abs()
    each = {
        "multi-dr": delta_hat,
        "escm2-dr": delta_hat,
        "direct": of_label,
        "two-space": BETA * of_label / (1 - q),
        "dcmt": -torch.log(torch.sigmoid(star)) / (1 - q) + 1e-3 * apart,
    }.get(kind, 0 * z)
    return (more.weight * each).sum().detach()


@pytest.mark.parametrize("kind", WITH_CVR)
@settings(max_examples=15, deadline=None)
@given(**SHAPE)
def test_unclicked_rows_change_the_cvr_loss_by_what_is_imputed_for_them(kind: str, rows: int, more: int, seed: int, predicts: str) -> None:
    """Means over clicks stay as they are; N L_IPS stays; N L_DR grows by the imputed errors of the rows."""
    batch, unclicked = make_batch(rows, seed), make_batch(more, seed + 1)
    objective = make_objective(kind, predicts=predicts, beta=BETA)
    before = take_step(objective, batch, only="cvr").values["cvr"]
    after = take_step(objective, with_unclicked(batch, unclicked), only="cvr").values["cvr"]
    n, grown = (cvr_parts(kind, each).denominators.sum() for each in (batch, with_unclicked(batch, unclicked)))
    assert close(grown * after, n * before + growth(kind, unclicked, predicts), tolerance=1e-9)
    if kind in ("naive", "naive+ctcvr", "escm2-snips", "stable-dr"):
        assert close(after, before, tolerance=1e-10)
    if kind in ("multi-ipw", "escm2-ips"):
        assert close((batch.weight.sum() + unclicked.weight.sum()) * after, batch.weight.sum() * before, tolerance=1e-10)


@pytest.mark.parametrize("kind", IMPUTING)
@settings(max_examples=15, deadline=None)
@given(**SHAPE, normalise=st.booleans())
def test_unclicked_rows_teach_the_imputation_nothing(kind: str, rows: int, more: int, seed: int, predicts: str, normalise: bool) -> None:
    """N times the imputation loss stays as it is; divided by its own weights, the loss does."""
    batch, unclicked = make_batch(rows, seed), make_batch(more, seed + 1)
    objective = make_objective(kind, predicts=predicts, normalise=normalise)
    before = take_step(objective, batch, "imputation")
    after = take_step(objective, with_unclicked(batch, unclicked), "imputation")
    times = torch.ones(()) if normalise else (batch.weight.sum() + unclicked.weight.sum()) / batch.weight.sum()
    assert close(times * after.values["imputation"], before.values["imputation"], tolerance=1e-10)
    assert before.imputation_grad is not None
    assert after.imputation_grad is not None
    assert close(times * after.imputation_grad[:rows], before.imputation_grad, tolerance=1e-10)
    assert (after.imputation_grad[rows:] == 0).all()


LOGIT = st.one_of(st.floats(-80, 80, width=32), st.sampled_from([-80.0, -17.0, 0.0, 17.0, 80.0]))
ROW = st.tuples(st.tuples(*[LOGIT] * 7), st.sampled_from([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]), st.sampled_from([0.0, 0.5, 1.0, 100.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(ROW, max_size=5),
    floor=st.sampled_from([0.0, 1e-4, 0.1]),
    options=st.fixed_dictionaries(
        {
            "predicts": st.sampled_from(["error", "label"]),
            "weighting": st.sampled_from(["dr-jl", "mrdr", "dr-bias", "dr-mse"]),
            "normalise": st.booleans(),
            "clip_pseudo_labels": st.booleans(),
            "detach_ctr": st.booleans(),
            "stability": st.sampled_from([0.0, 1.0, 100.0]),
        }
    ),
    warm_up=st.booleans(),
    calibration=st.sampled_from([None, (0.2, -3.0), (3.0, 5.0)]),
)
def test_nothing_is_infinite_or_nan(
    kind: str,
    dtype: torch.dtype,
    rows: list[Any],
    floor: float,
    options: dict[str, Any],
    warm_up: bool,
    calibration: tuple[float, float] | None,
) -> None:
    """Of any logits up to 80 in size, all terms at once, no row and no weight included: losses, values and gradients are finite."""
    numbers = torch.tensor([row[0] for row in rows]).reshape(len(rows), 7)
    labels = torch.tensor([row[1] for row in rows]).reshape(len(rows), 2)
    weight = torch.tensor([row[2] for row in rows])
    leaves = [column.to(dtype).requires_grad_() for column in numbers[:, :5].unbind(1)]
    predictions = Predictions(*leaves)._replace(inputs=numbers[:, 5:].to(dtype))
    objective = make_objective(
        kind, floor=floor, lambda_balance=1.0, loss="bce" if options["predicts"] == "label" else "squared", **options
    )
    stage = Stage(whole_phase(kind), warm_up, calibration=None if calibration is None else torch.tensor(calibration))
    terms = objective.terms(predictions, labels[:, 0], labels[:, 1], weight, stage)
    assert {"ctr", "propensity", "balance"} <= terms.keys()
    loss, values = reduce_terms(terms, local_sums(terms), world_size=2)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(value.isfinite() for value in values.values())
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert all(grad is None or grad.isfinite().all() for grad in grads)
