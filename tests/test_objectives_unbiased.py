"""What each CVR loss is on average, by enumerating every outcome of a small population through the code that trains.

Each impression is unclicked, clicked without or clicked with conversion: 3^5 outcomes, each with its exact probability.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from escm2rec.models.predictions import Predictions
from escm2rec.objectives.bce import bce_losses, softplus
from escm2rec.objectives.objective import Stage
from escm2rec.objectives.reduction import local_sums, reduce_terms
from tests.objectives_world import make_objective

TRUE_CTR = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
TRUE_CVR = torch.tensor([0.05, 0.2, 0.3, 0.6, 0.8], dtype=torch.float64)
FIXED_CVR = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
CVR_LOGIT = torch.tensor([0.3, -1.2, 2.0, 0.1, -0.4], dtype=torch.float64)
WRONG_CTR_LOGIT = torch.tensor([1.0, -0.5, 0.2, -2.0, 0.7], dtype=torch.float64)
WRONG_IMPUTATION_LOGIT = torch.tensor([0.5, 1.5, -1.0, 0.0, 2.0], dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 4.0, 0.5, 1.0, 2.0], dtype=torch.float64)
NUM_ROWS = len(TRUE_CTR)


class Outcomes(NamedTuple):
    """All outcomes of the population: labels [K, N] and probability [K]."""

    click: Tensor
    conversion: Tensor
    probability: Tensor


def outcomes(true_cvr: Tensor) -> Outcomes:
    # Outcome 0 is no click, 1 a click alone, 2 a click with conversion.
    kinds = torch.tensor(list(itertools.product((0, 1, 2), repeat=NUM_ROWS)))
    each = torch.stack([1 - TRUE_CTR, TRUE_CTR * (1 - true_cvr), TRUE_CTR * true_cvr])
    probability = each[kinds, torch.arange(NUM_ROWS)].prod(dim=1)
    assert len(kinds) == 3**NUM_ROWS
    assert probability.sum().item() == pytest.approx(1, abs=1e-14)
    return Outcomes((kinds > 0).double(), (kinds == 2).double(), probability)


def cvr_loss_by_outcome(kind: str, ctr_logit: Tensor, imputation_logit: Tensor, true_cvr: Tensor, **settings: Any) -> Tensor:
    """The reduced CVR loss of each outcome, [K]."""
    world = outcomes(true_cvr)
    num_outcomes = len(world.click)
    predictions = Predictions(*(logit.repeat(num_outcomes) for logit in (ctr_logit, CVR_LOGIT, imputation_logit)))
    labels = world.click.flatten(), world.conversion.flatten(), WEIGHT.repeat(num_outcomes)
    cvr = make_objective(kind, **settings).terms(predictions, *labels, stage=Stage("cvr"))["cvr"]
    reduced = []
    for columns in cvr.columns.view(num_outcomes, NUM_ROWS, -1):
        term = {"cvr": cvr._replace(columns=columns)}
        reduced.append(reduce_terms(term, local_sums(term), world_size=1)[1]["cvr"])
    return torch.stack(reduced)


def expected_cvr_loss(
    kind: str, ctr_logit: Tensor, imputation_logit: Tensor = WRONG_IMPUTATION_LOGIT, true_cvr: Tensor = TRUE_CVR, **settings: Any
) -> float:
    losses = cvr_loss_by_outcome(kind, ctr_logit, imputation_logit, true_cvr, **settings)
    return (outcomes(true_cvr).probability * losses).sum().item()


def weighted_mean(values: Tensor) -> float:
    return ((WEIGHT * values).sum() / WEIGHT.sum()).item()


# E[delta | x] = softplus(z) - eta z, the error that a right `error` tower imputes.
TRUE_ERROR = softplus(CVR_LOGIT) - TRUE_CVR * CVR_LOGIT
TRUE_RISK = weighted_mean(TRUE_ERROR)
TRUE_CTR_LOGIT = torch.logit(TRUE_CTR)
RIGHT = {"error": torch.log(torch.expm1(TRUE_ERROR)), "label": torch.logit(TRUE_CVR)}


def test_ips_is_unbiased_under_the_true_propensity() -> None:
    assert expected_cvr_loss("escm2-ips", TRUE_CTR_LOGIT) == pytest.approx(TRUE_RISK, abs=1e-12)


def test_ips_is_biased_under_a_wrong_propensity() -> None:
    assert abs(expected_cvr_loss("escm2-ips", WRONG_CTR_LOGIT) - TRUE_RISK) > 0.1


def test_ips_is_biased_where_the_floor_binds() -> None:
    # A floor trades bias for variance: rows with p below it weigh too little.
    assert expected_cvr_loss("escm2-ips", TRUE_CTR_LOGIT, floor=0.4) < TRUE_RISK - 0.1


@pytest.mark.parametrize("kind", ["naive", "naive+ctcvr"])
def test_naive_is_biased_by_selection(kind: str) -> None:
    # Even with the true propensity at hand: clicked rows are not like all rows.
    assert abs(expected_cvr_loss(kind, TRUE_CTR_LOGIT) - TRUE_RISK) > 0.05


@pytest.mark.parametrize("predicts", ["error", "label"])
def test_dr_is_unbiased_under_the_true_propensity_whatever_is_imputed(predicts: str) -> None:
    assert expected_cvr_loss("escm2-dr", TRUE_CTR_LOGIT, predicts=predicts) == pytest.approx(TRUE_RISK, abs=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.4])
@pytest.mark.parametrize("predicts", ["error", "label"])
def test_dr_is_unbiased_under_any_propensity_when_it_imputes_right(predicts: str, floor: float) -> None:
    seen = expected_cvr_loss("escm2-dr", WRONG_CTR_LOGIT, RIGHT[predicts], predicts=predicts, floor=floor)
    assert seen == pytest.approx(TRUE_RISK, abs=1e-12)


def test_dr_is_biased_by_the_product_of_both_errors() -> None:
    """bias(DR) = mean[(p/q - 1)(E delta - delta_hat)]."""
    gap = (TRUE_CTR / torch.sigmoid(WRONG_CTR_LOGIT) - 1) * (TRUE_ERROR - softplus(WRONG_IMPUTATION_LOGIT))
    assert abs(weighted_mean(gap)) > 0.01
    assert expected_cvr_loss("escm2-dr", WRONG_CTR_LOGIT) - TRUE_RISK == pytest.approx(weighted_mean(gap), abs=1e-12)


def test_dr_with_clipped_pseudo_labels_is_biased() -> None:
    # The price of a loss that is bounded below, said in the docstring of `pseudo_labels`.
    seen = expected_cvr_loss("escm2-dr", TRUE_CTR_LOGIT, predicts="label", clip_pseudo_labels=True)
    assert abs(seen - TRUE_RISK) > 0.01


def test_variance_of_dr_is_what_mrdr_weights_by() -> None:
    """For fixed labels Var = (sum w)^-2 sum w^2 p(1-p)/q^2 (delta - delta_hat)^2: p times MRDR's v = (1-q)/q^2 at q = p."""
    losses = cvr_loss_by_outcome("escm2-dr", TRUE_CTR_LOGIT, WRONG_IMPUTATION_LOGIT, FIXED_CVR)
    probability = outcomes(FIXED_CVR).probability
    mean = (probability * losses).sum()
    delta = bce_losses(CVR_LOGIT, FIXED_CVR)
    expected = WEIGHT**2 * (1 - TRUE_CTR) / TRUE_CTR * (delta - softplus(WRONG_IMPUTATION_LOGIT)) ** 2
    assert (probability * (losses - mean) ** 2).sum().item() == pytest.approx((expected.sum() / WEIGHT.sum() ** 2).item(), abs=1e-12)
