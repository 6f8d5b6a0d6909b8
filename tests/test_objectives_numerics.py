"""Losses are right and finite to the ends of their range, in the precision that training uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from escm2rec.models.predictions import Predictions
from escm2rec.objectives.bce import bce_losses
from escm2rec.objectives.ctcvr import ctcvr_losses
from escm2rec.objectives.estimator import estimator_of
from escm2rec.objectives.objective import Phase, Stage
from tests.objectives_world import KINDS, Batch, make_objective, take_step, whole_phase

Array = NDArray[np.float64]
GRID = np.linspace(-80, 80, 65)
A, Z = (axis.ravel() for axis in np.meshgrid(GRID, GRID))


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def reference_ctcvr(a: Array, z: Array, c: int) -> tuple[Array, Array, Array]:
    """Value and both gradients in float64 by another way: log1mexp of log p_hat + log eta_hat, and closed forms."""
    log_both = -np.logaddexp(0, -a) - np.logaddexp(0, -z)
    with np.errstate(divide="ignore"):  # the branch that is not taken
        log_neither = np.where(log_both > -np.log(2), np.log(-np.expm1(log_both)), np.log1p(-np.exp(log_both)))
    if c:
        return -log_both, -sigmoid(-a), -sigmoid(-z)
    rest = np.exp(log_both - log_neither)
    return -log_neither, sigmoid(-a) * rest, sigmoid(-z) * rest


def computed_ctcvr(a: Array, z: Array, c: int, dtype: torch.dtype) -> tuple[Array, ...]:
    ctr_logit, cvr_logit = (torch.from_numpy(logit).to(dtype).requires_grad_() for logit in (a, z))
    losses = ctcvr_losses(ctr_logit, cvr_logit, torch.full_like(ctr_logit, c).detach())
    grads = torch.autograd.grad(losses.sum(), (ctr_logit, cvr_logit))
    return tuple(values.detach().double().numpy() for values in (losses, *grads))


@pytest.mark.parametrize("c", [0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
def test_ctcvr_keeps_its_relative_precision(c: int, dtype: torch.dtype, tolerance: float) -> None:
    # Relative, down to where float32 itself ends: a loss of 1e-20 still has the right gradient.
    for seen, expected in zip(computed_ctcvr(A, Z, c, dtype), reference_ctcvr(A, Z, c), strict=True):
        assert np.isfinite(seen).all()
        np.testing.assert_allclose(seen, expected, rtol=tolerance, atol=1e-37)


def test_log_one_minus_product_loses_what_ctcvr_keeps() -> None:
    # The form that this one replaces: at logits of 20 the plain product rounds to 1, and its loss is infinite.
    p_ctcvr = torch.sigmoid(torch.tensor(20.0)) ** 2
    assert torch.log(1 - p_ctcvr).isinf()
    assert ctcvr_losses(torch.tensor([20.0]), torch.tensor([20.0]), torch.zeros(1)).item() == pytest.approx(19.3069, rel=1e-5)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_bce_keeps_its_relative_precision(label: int, dtype: torch.dtype, tolerance: float) -> None:
    # softplus(z) - z cancels to 0 at 17 in float32, and torch's softplus is linear above 20 in float64.
    logit = torch.from_numpy(GRID).to(dtype).requires_grad_()
    losses = bce_losses(logit, torch.full_like(logit, label).detach())
    (grad,) = torch.autograd.grad(losses.sum(), logit)
    sign = 1 - 2 * label
    np.testing.assert_allclose(losses.detach().double().numpy(), np.logaddexp(0, sign * GRID), rtol=tolerance)
    np.testing.assert_allclose(grad.double().numpy(), sign * sigmoid(sign * GRID), rtol=tolerance)


def extreme_batch(dtype: torch.dtype) -> Batch:
    """Every combination of extreme logits and possible labels, and a weight of 0 among the weights."""
    ends = [-80.0, -17.0, 0.0, 17.0, 80.0]
    labels = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    grid = torch.cartesian_prod(*[torch.tensor(ends)] * 4)
    logits = grid.repeat(len(labels), 1)
    click, conversion = torch.tensor(labels).repeat_interleave(len(grid), dim=0).unbind(1)
    weight = torch.ones_like(click)
    weight[0] = 0
    a, z, further, own = (column.to(dtype).requires_grad_() for column in logits.unbind(1))
    imputation, counterfactual = further, further.detach().clone().requires_grad_()
    return Batch(Predictions(a, z, imputation, counterfactual, own, logits), click, conversion, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("floor", [0.0, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_finite_at_extreme_logits(kind: str, floor: float, dtype: torch.dtype) -> None:
    phase: Phase = whole_phase(kind)
    variants: list[dict[str, Any]] = [{"predicts": "error"}, {"predicts": "label"}, {"predicts": "label", "clip_pseudo_labels": True}]
    seen = 0
    imputes = estimator_of(kind).pseudo_labels
    for variant in variants if imputes else variants[1:2]:
        for weighting in ("dr-jl", "mrdr", "dr-bias", "dr-mse"):
            objective = make_objective(kind, floor=floor, weighting=weighting, detach_ctr=False, lambda_balance=1.0, **variant)
            step = take_step(objective, extreme_batch(dtype), phase)
            assert step.loss.isfinite()
            assert all(grad is None or grad.isfinite().all() for grad in step[2:])
            seen += 1
    assert seen == (12 if imputes else 4)


def test_low_precision_logits_are_lossless_from_there_on() -> None:
    def losses(dtype: torch.dtype) -> dict[str, Tensor]:
        batch = extreme_batch(torch.bfloat16)
        predictions = Predictions(*(logit.detach().to(dtype) for logit in batch.logits()))._replace(inputs=batch.predictions.inputs)
        terms = make_objective("escm2-dr", floor=0.01).terms(predictions, *batch[1:], stage=Stage("joint"))
        return {name: term.losses for name, term in terms.items()}

    low, full = losses(torch.bfloat16), losses(torch.float32)
    assert len(low) == 4
    for name in full:
        assert low[name].dtype == torch.float32
        assert torch.equal(low[name], full[name])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_labels_may_be_of_any_dtype(dtype: torch.dtype) -> None:
    batch = extreme_batch(torch.float32)
    typed = batch._replace(click=batch.click.to(dtype), conversion=batch.conversion.to(dtype))
    assert torch.equal(take_step(make_objective("escm2-dr"), typed).loss, take_step(make_objective("escm2-dr"), batch).loss)
