"""What each CVR loss is on average, by enumerating every outcome of a small population through the code that trains.

Each impression is unclicked, clicked without or clicked with conversion: 3^5 outcomes, each with its exact probability. The table of
docs/method.md is made of it: `python -m tests.test_objectives_unbiased` writes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from escm2rec.models.predictions import Predictions
from escm2rec.objectives.bce import bce_losses, softplus
from escm2rec.objectives.objective import Objective, Stage
from escm2rec.objectives.reduction import LossTerm, local_sums, reduce_terms
from tests.objectives_world import KINDS, make_objective

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


def term_by_outcome(name: str, objective: Objective, true_cvr: Tensor, logits: Sequence[Tensor], inputs: Tensor | None = None) -> LossTerm:
    """A term of all outcomes at once, its columns [K, N, C], of the logits [N] of `Predictions` in their order."""
    world = outcomes(true_cvr)
    num_outcomes = len(world.click)
    predictions = Predictions(*(logit.repeat(num_outcomes) for logit in logits))
    predictions = predictions._replace(inputs=None if inputs is None else inputs.repeat(num_outcomes, 1))
    labels = world.click.flatten(), world.conversion.flatten(), WEIGHT.repeat(num_outcomes)
    term = objective.terms(predictions, *labels, stage=Stage("cvr"))[name]
    return term._replace(columns=term.columns.view(num_outcomes, NUM_ROWS, -1))


def cvr_by_outcome(kind: str, ctr_logit: Tensor, imputation_logit: Tensor, true_cvr: Tensor, **settings: Any) -> LossTerm:
    """The CVR term of all outcomes; a propensity tower says what the CTR tower says, a counterfactual one 1 - m."""
    logits = ctr_logit, CVR_LOGIT, imputation_logit, -imputation_logit, ctr_logit
    return term_by_outcome("cvr", make_objective(kind, **settings), true_cvr, logits)


def cvr_loss_by_outcome(kind: str, ctr_logit: Tensor, imputation_logit: Tensor, true_cvr: Tensor, **settings: Any) -> Tensor:
    """The reduced CVR loss of each outcome, [K]."""
    cvr = cvr_by_outcome(kind, ctr_logit, imputation_logit, true_cvr, **settings)
    reduced = []
    for columns in cvr.columns:
        term = {"cvr": cvr._replace(columns=columns)}
        reduced.append(reduce_terms(term, local_sums(term), world_size=1)[1]["cvr"])
    return torch.stack(reduced)


def expected_sums(kind: str, ctr_logit: Tensor, **settings: Any) -> Tensor:
    """The mean over outcomes of the sums that a CVR loss is made of, [C]: their ratio is what the loss tends to on many impressions."""
    cvr = cvr_by_outcome(kind, ctr_logit, WRONG_IMPUTATION_LOGIT, TRUE_CVR, **settings)
    return outcomes(TRUE_CVR).probability @ cvr.columns.sum(dim=1)


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


class CvrLoss(NamedTuple):
    """A row of the table: a CVR loss as some kinds have it.

    kinds     the objectives whose CVR loss it is
    settings  of `make_objective`
    multiple  of the risk that it estimates
    unbiased  cells of the table without bias, from left to right
    """

    kinds: tuple[str, ...]
    settings: dict[str, Any]
    unbiased: tuple[bool, bool, bool, bool]
    multiple: float = 1.0


LABEL, CLIPPED, FLOORED = {"predicts": "label"}, {"predicts": "label", "clip_pseudo_labels": True}, {"floor": 0.4}
DR, BETA = ("multi-dr", "escm2-dr"), 0.5
NEVER, TRUE_Q, EITHER = (False, False, False, False), (True, True, False, False), (True, True, True, False)
RIGHT_IMPUTATION, BOTH = (True, False, True, False), (True, False, False, False)
CVR_LOSSES: dict[str, CvrLoss] = {
    "naive": CvrLoss(("naive", "naive+ctcvr"), {}, NEVER),
    "IPS": CvrLoss(("multi-ipw", "escm2-ips"), {}, TRUE_Q),
    "IPS, floor 0.4": CvrLoss(("multi-ipw", "escm2-ips"), FLOORED, NEVER),
    "SNIPS": CvrLoss(("escm2-snips",), {}, NEVER),
    "DR of errors": CvrLoss(DR, {}, EITHER),
    "DR of errors, floor 0.4": CvrLoss(DR, FLOORED, RIGHT_IMPUTATION),
    "DR of labels": CvrLoss(DR, LABEL, EITHER),
    "DR of labels, floor 0.4": CvrLoss(DR, LABEL | FLOORED, RIGHT_IMPUTATION),
    "DR of labels, clipped": CvrLoss(DR, CLIPPED, RIGHT_IMPUTATION),
    "imputed labels alone": CvrLoss(("direct",), {}, RIGHT_IMPUTATION),
    "StableDR's prediction": CvrLoss(("stable-dr",), {}, NEVER),
    f"two-space, beta {BETA}": CvrLoss(("two-space",), {"beta": BETA}, BOTH, 1 + BETA),
    f"two-space, beta {BETA}, floor 0.4": CvrLoss(("two-space",), {"beta": BETA} | FLOORED, NEVER, 1 + BETA),
    "DCMT": CvrLoss(("dcmt",), {}, NEVER),
}
UNBIASED = 1e-9
WORLDS = ("true q, true imputation", "true q, wrong imputation", "wrong q, true imputation", "wrong q, wrong imputation")


@cache
def biases(name: str, kind: str) -> tuple[float, ...]:
    """Bias of a CVR loss in each of `WORLDS`."""
    row = CVR_LOSSES[name]
    predicts = make_objective(kind, **row.settings).settings.imputation.predicts
    # The counterfactual tower of dcmt says 1 - m: its imputation is right where m is.
    imputations = RIGHT["label" if kind == "dcmt" else predicts], WRONG_IMPUTATION_LOGIT
    return tuple(
        expected_cvr_loss(kind, ctr_logit, imputation, **row.settings) - row.multiple * TRUE_RISK
        for ctr_logit in (TRUE_CTR_LOGIT, WRONG_CTR_LOGIT)
        for imputation in imputations
    )


@pytest.mark.parametrize("name", CVR_LOSSES)
def test_what_is_unbiased_and_when(name: str) -> None:
    for kind in CVR_LOSSES[name].kinds:
        for bias, unbiased, world in zip(biases(name, kind), CVR_LOSSES[name].unbiased, WORLDS, strict=True):
            assert (abs(bias) < UNBIASED) is unbiased, (kind, world, bias)
            assert unbiased or abs(bias) > 1e-3, (kind, world, bias)


def test_every_cvr_loss_has_a_row() -> None:
    held = {kind for row in CVR_LOSSES.values() for kind in row.kinds}
    assert held == set(KINDS) - {"esmm"}
    assert make_objective("esmm").estimator.cvr is None


METHOD = Path(__file__).parents[1] / "docs" / "method.md"
BEGIN = "<!-- table of biases: written by `python -m tests.test_objectives_unbiased` -->\n"
END = "<!-- end of the table of biases -->\n"


def table_of_biases() -> str:
    """The table of docs/method.md, in Markdown."""
    lines = [f"| CVR loss | of | {' | '.join(WORLDS)} |", "|" + "---|" * (2 + len(WORLDS))]
    for name, row in CVR_LOSSES.items():
        cells = ["unbiased" if abs(bias) < UNBIASED else f"{bias:+.3f}" for bias in biases(name, row.kinds[0])]
        lines.append(f"| {name} | {', '.join(f'`{kind}`' for kind in row.kinds)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + table_of_biases() + END + after


def test_the_table_of_the_documentation_is_what_was_computed() -> None:
    page = METHOD.read_text(encoding="utf-8")
    assert page == with_table(page), "docs/method.md holds another table of biases: python -m tests.test_objectives_unbiased writes it"
    changed = page.replace("| unbiased |", "| +0.000 |", 1)
    assert changed != page
    assert with_table(changed) == page
    assert f"true risk {TRUE_RISK:.3f}" in page


def test_ips_is_biased_where_the_floor_binds() -> None:
    # A floor trades bias for variance: rows with p below it weigh too little.
    assert expected_cvr_loss("escm2-ips", TRUE_CTR_LOGIT, floor=0.4) < TRUE_RISK - 0.1


def test_dr_is_biased_by_the_product_of_both_errors() -> None:
    """bias(DR) = mean[(p/q - 1)(E delta - delta_hat)]."""
    gap = (TRUE_CTR / torch.sigmoid(WRONG_CTR_LOGIT) - 1) * (TRUE_ERROR - softplus(WRONG_IMPUTATION_LOGIT))
    assert abs(weighted_mean(gap)) > 0.01
    assert expected_cvr_loss("escm2-dr", WRONG_CTR_LOGIT) - TRUE_RISK == pytest.approx(weighted_mean(gap), abs=1e-12)


def test_variance_of_dr_is_what_mrdr_weights_by() -> None:
    """For fixed labels Var = (sum w)^-2 sum w^2 p(1-p)/q^2 (delta - delta_hat)^2: p times MRDR's v = (1-q)/q^2 at q = p."""
    losses = cvr_loss_by_outcome("escm2-dr", TRUE_CTR_LOGIT, WRONG_IMPUTATION_LOGIT, FIXED_CVR)
    probability = outcomes(FIXED_CVR).probability
    mean = (probability * losses).sum()
    delta = bce_losses(CVR_LOGIT, FIXED_CVR)
    expected = WEIGHT**2 * (1 - TRUE_CTR) / TRUE_CTR * (delta - softplus(WRONG_IMPUTATION_LOGIT)) ** 2
    assert (probability * (losses - mean) ** 2).sum().item() == pytest.approx((expected.sum() / WEIGHT.sum() ** 2).item(), abs=1e-12)


def test_clipping_takes_the_propensity_out_of_pseudo_labels() -> None:
    # A clicked row's label is at or past its own end, whatever q is: clipped it is r, and that of an unclicked row is m.
    world, m = outcomes(TRUE_CVR), torch.sigmoid(WRONG_IMPUTATION_LOGIT)
    label = world.click * world.conversion + (1 - world.click) * m
    expected = (WEIGHT * bce_losses(CVR_LOGIT, label)).sum(dim=1) / WEIGHT.sum()
    for ctr_logit in (TRUE_CTR_LOGIT, WRONG_CTR_LOGIT):
        seen = cvr_loss_by_outcome("escm2-dr", ctr_logit, WRONG_IMPUTATION_LOGIT, TRUE_CVR, **CLIPPED)
        assert torch.allclose(seen, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["escm2-snips", "stable-dr"])
def test_self_normalised_losses_tend_to_the_risk_even_of_a_propensity_that_is_wrong_by_a_factor(kind: str) -> None:
    # Biased on few clicks, as the table says: a ratio of means is not the mean of ratios.
    for ctr_logit in (TRUE_CTR_LOGIT, torch.logit(TRUE_CTR / 2)):
        losses, weights = expected_sums(kind, ctr_logit)
        assert (losses / weights).item() == pytest.approx(TRUE_RISK, abs=1e-12)
    losses, weights = expected_sums(kind, -TRUE_CTR_LOGIT)
    assert abs(losses / weights - TRUE_RISK) > 0.01


def test_dcmt_trains_the_cvr_tower_as_ips_does_but_for_its_tie() -> None:
    # Biased as a risk: the second tower's loss is no part of one. Its slope in z is that of IPS, plus lambda's.
    ips, dcmt = (expected_slope(kind, TRUE_CTR_LOGIT, consistency=0.0) for kind in ("escm2-ips", "dcmt"))
    assert torch.allclose(dcmt, ips, rtol=0, atol=1e-12)
    assert torch.allclose(ips, WEIGHT / WEIGHT.sum() * (torch.sigmoid(CVR_LOGIT) - TRUE_CVR), rtol=0, atol=1e-12)
    tied = expected_slope("dcmt", TRUE_CTR_LOGIT, consistency=1e-3)
    assert 0 < (tied - ips).abs().max() <= 1e-3


def expected_slope(kind: str, ctr_logit: Tensor, **settings: Any) -> Tensor:
    """Gradient in each row's CVR logit of the mean CVR loss over all outcomes, [N], for losses over N."""
    cvr_logit = CVR_LOGIT.clone().requires_grad_()
    logits = ctr_logit, cvr_logit, WRONG_IMPUTATION_LOGIT, -WRONG_IMPUTATION_LOGIT, ctr_logit
    losses = term_by_outcome("cvr", make_objective(kind, **settings), TRUE_CVR, logits).columns[:, :, 0]
    mean = (outcomes(TRUE_CVR).probability.unsqueeze(1) * losses).sum() / WEIGHT.sum()
    (slope,) = torch.autograd.grad(mean, cvr_logit)
    return slope


CONTRAST_INPUTS = torch.tensor([[0.3, -1.0], [1.2, 0.4], [-0.7, 2.0], [0.1, 0.0], [2.2, -0.6]], dtype=torch.float64)


@pytest.mark.parametrize(("own_logit", "balanced"), [(TRUE_CTR_LOGIT, True), (WRONG_CTR_LOGIT, False)])
def test_the_balancing_contrast_has_mean_zero_under_the_true_propensity_alone(own_logit: Tensor, balanced: bool) -> None:
    """E sum w (o / p - (1 - o) / (1 - p)) phi, with p of the propensity tower: the term is the squared norm of what varies around it."""
    logits = WRONG_CTR_LOGIT, CVR_LOGIT, WRONG_IMPUTATION_LOGIT, CVR_LOGIT, own_logit
    term = term_by_outcome("balance", make_objective("multi-ipw", lambda_balance=1.0), TRUE_CVR, logits, CONTRAST_INPUTS)
    mean = (outcomes(TRUE_CVR).probability @ term.columns.sum(dim=1))[:-1]
    assert len(mean) == 1 + CONTRAST_INPUTS.shape[1]
    assert bool((mean.abs() < UNBIASED).all()) is balanced
    assert balanced or (mean.abs() > 1e-2).all()


def test_a_propensity_that_meets_its_constraint_makes_stable_dr_the_self_normalised_dr_loss() -> None:
    """With mean (o/q)(delta_hat - mean delta_hat) = 0: SNIPS = mean delta_hat + sum (o/q)(delta - delta_hat) / sum o/q."""
    click = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    conversion = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    imputed = softplus(WRONG_IMPUTATION_LOGIT)
    apart = imputed - weighted_mean(imputed)
    assert apart[0] * apart[1] < 0, "some weights balance the clicked rows"
    inverse = torch.tensor([4.0, 0.0, 1.2, 2.0, 2.0], dtype=torch.float64)
    lacking = (WEIGHT * click * inverse * apart)[[0, 2]].sum()
    inverse[1] = -lacking / (WEIGHT * apart)[1]
    assert inverse.min() > 1
    own_logit = torch.logit(1 / inverse)

    predictions = Predictions(TRUE_CTR_LOGIT, CVR_LOGIT, WRONG_IMPUTATION_LOGIT, None, own_logit)
    terms = make_objective("stable-dr").terms(predictions, click, conversion, WEIGHT, Stage("joint"))
    _, values = reduce_terms(terms, local_sums(terms), world_size=1)
    assert values["stability"].item() < 1e-24
    weights = WEIGHT * click / torch.sigmoid(own_logit)
    gap = (weights * (bce_losses(CVR_LOGIT, conversion) - imputed)).sum() / weights.sum()
    assert values["cvr"].item() == pytest.approx(weighted_mean(imputed) + gap.item(), abs=1e-12)


if __name__ == "__main__":
    METHOD.write_text(with_table(METHOD.read_text(encoding="utf-8")), encoding="utf-8")
