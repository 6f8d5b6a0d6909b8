"""The entire-space risk that a log says: right on average, cut anyhow, and by the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from escm2rec.evaluation.entire_risk import RiskEstimates, risk_estimates, risk_sums
from escm2rec.objectives.bce import bce_losses

GENERATOR = torch.Generator().manual_seed(0)
ROWS = 4_000
A, NOISE, M = (torch.randn(ROWS, generator=GENERATOR, dtype=torch.float64) for _ in range(3))
Z = NOISE - A  # worst where clicks are likely
TRUE_Q, TRUE_CVR = torch.sigmoid(0.7 * A - 1), torch.sigmoid(0.8 * A - 1)
WEIGHT = 0.5 + torch.rand(ROWS, generator=GENERATOR, dtype=torch.float64)
TRUE_RISK = ((WEIGHT * bce_losses(Z, TRUE_CVR)).sum() / WEIGHT.sum()).item()


def labels(seed: int) -> tuple[Tensor, Tensor]:
    """Clicks, and conversions that are NaN where there is no click: nothing may read them."""
    generator = torch.Generator().manual_seed(1_000 + seed)  # not that of the features
    click, r = (torch.rand(ROWS, generator=generator, dtype=torch.float64) < rate for rate in (TRUE_Q, TRUE_CVR))
    return click.double(), torch.where(click, r.double(), float("nan"))


def estimate(seed: int, q: Tensor = TRUE_Q, imputed: Tensor = M) -> RiskEstimates:
    return risk_estimates(risk_sums(Z, *labels(seed), WEIGHT, q, imputed))


def test_estimates_follow_their_formulas_however_the_rows_are_cut() -> None:
    click, conversion = labels(0)
    o, r, m = click, conversion.nan_to_num(), torch.sigmoid(M)
    delta, imputed = (label * torch.log1p(torch.exp(-Z)) + (1 - label) * torch.log1p(torch.exp(Z)) for label in (r, m))
    snips = (WEIGHT * o / TRUE_Q * delta).sum() / (WEIGHT * o / TRUE_Q).sum()
    robust = imputed + o * (delta - imputed) / TRUE_Q
    dr = (WEIGHT * robust).sum() / WEIGHT.sum()
    error = ((WEIGHT * (robust - dr)) ** 2).sum().sqrt() / WEIGHT.sum()
    inverse = WEIGHT * o / TRUE_Q
    snips_error = ((inverse * (delta - snips)) ** 2).sum().sqrt() / inverse.sum()
    expected = [snips.item(), snips_error.item(), dr.item(), error.item()]
    assert estimate(0) == pytest.approx(expected, rel=1e-9)
    parts = [risk_sums(*part) for part in zip(*(torch.split(x, 700) for x in (Z, click, conversion, WEIGHT, TRUE_Q, M)), strict=True)]
    assert len(parts) == 6
    assert risk_estimates(torch.stack(parts).sum(dim=0)) == pytest.approx(expected, rel=1e-9)


def test_a_difference_is_that_of_the_estimates_and_more_certain_than_either() -> None:
    """Of two models that see the same impressions: the same difference, an error far below that of each risk, and right over 60 draws."""
    near = Z + 0.1 * NOISE
    truth = TRUE_RISK - ((WEIGHT * bce_losses(near, TRUE_CVR)).sum() / WEIGHT.sum()).item()
    found = []
    for seed in range(60):
        drawn = (*labels(seed), WEIGHT, TRUE_Q, M)
        other, over = risk_estimates(risk_sums(near, *drawn)), risk_estimates(risk_sums(Z, *drawn, beside=near))
        own = estimate(seed)
        assert (over.snips, over.dr) == pytest.approx((own.snips - other.snips, own.dr - other.dr), abs=1e-9)  # type: ignore[operator]
        assert over.dr_standard_error < own.dr_standard_error / 4  # type: ignore[operator]
        assert over.snips_standard_error < own.snips_standard_error / 4  # type: ignore[operator]
        found.append(over)
    values = torch.tensor(found, dtype=torch.float64)
    errors = values[:, ::2] - truth
    assert (errors.mean(dim=0).abs() < 4 * errors.std(dim=0) / 60**0.5).all()
    assert (errors.std(dim=0) / values[:, 1::2].mean(dim=0)).tolist() == pytest.approx([1, 1], rel=0.35)


def test_estimates_are_right_on_average_and_know_their_errors() -> None:
    """Over 60 draws of the labels: each within 4 standard errors of the truth; a naive mean over clicks is not."""
    found = torch.tensor([estimate(seed) for seed in range(60)], dtype=torch.float64)
    errors = found[:, ::2] - TRUE_RISK
    assert (errors.mean(dim=0).abs() < 4 * errors.std(dim=0) / 60**0.5).all()
    assert (errors.std(dim=0) / found[:, 1::2].mean(dim=0)).tolist() == pytest.approx([1, 1], rel=0.35)
    clicked = torch.stack([bce_losses(Z, conversion)[click > 0].mean() for click, conversion in map(labels, range(60))])
    assert abs(clicked.mean() - TRUE_RISK) > 8 * clicked.std() / 60**0.5


def test_dr_is_right_under_a_wrong_propensity_when_it_imputes_right() -> None:
    found = torch.tensor(
        [estimate(seed, q=torch.full_like(TRUE_Q, 0.3), imputed=torch.logit(TRUE_CVR))[::2] for seed in range(60)], dtype=torch.float64
    )
    errors = found - TRUE_RISK
    standard = errors.std(dim=0) / 60**0.5
    assert abs(errors[:, 1].mean()) < 4 * standard[1]
    assert abs(errors[:, 0].mean()) > 4 * standard[0]


def test_what_does_not_exist_is_none() -> None:
    none = torch.zeros(0)
    assert risk_estimates(risk_sums(none, none, none, none, none, none)) == (None, None, None, None)
    unclicked = risk_estimates(risk_sums(Z, torch.zeros(ROWS), torch.zeros(ROWS), WEIGHT, TRUE_Q, M))
    assert unclicked.snips is None
    assert unclicked.snips_standard_error is None
    assert unclicked.dr is not None


def test_few_clicks_in_effect_have_no_standard_error() -> None:
    """Nine clicks of equal weight say as little of their spread as 500 of which one has nearly all the weight; of DR too."""
    q, ones = torch.full((ROWS,), 0.2), torch.ones(ROWS)
    click = torch.zeros(ROWS)
    click[7] = 1
    one = risk_estimates(risk_sums(Z, click, click, ones, q, M))
    assert one.snips == pytest.approx(bce_losses(Z, click)[7].item())
    for number in (1, 9, 10, 500):
        click = (torch.arange(ROWS) < number).float()
        told = risk_estimates(risk_sums(Z, click, click, ones, q, M))
        assert (told.snips_standard_error is None) == (told.dr_standard_error is None) == (number < 10)
        assert told.dr is not None
    heavy = torch.where(torch.arange(ROWS) == 3, 1e-4, 0.2)
    told = risk_estimates(risk_sums(Z, click, click, ones, heavy, M))
    assert (told.snips_standard_error, told.dr_standard_error) == (None, None)
    none = risk_estimates(risk_sums(Z, torch.zeros(ROWS), click, ones, q, M))
    assert (none.snips, none.dr_standard_error) == (None, None)
