"""What a log says of the CVR risk on all impressions: mean BCE(eta_hat, r), though r is recorded on clicked impressions alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from escm2rec.objectives.bce import bce_losses
from escm2rec.objectives.estimators.escm2_dr import dr_losses
from escm2rec.objectives.estimators.escm2_ips import ips_losses

MARGIN = 1.0
"""A model takes the place of another when its risk is below the other's by more standard errors of the difference than this."""
LEAST_EFFECTIVE = 10.0
"""Clicked impressions in effect, (sum w/q)^2 / sum (w/q)^2, from which on their spread is told: of ten it is known to a quarter."""
JUDGE_FLOOR = 0.1
"""Floor of the propensity that judges, times the base CTR, whatever floor the judged were trained with: one would favour its own."""


class RiskEstimates(NamedTuple):
    """Of a model's risk, or of how much it is above another's, in nats; None where there is no row, or for snips no click.

    snips   sum w (o/q) delta / sum w o/q
    dr      (1/N) sum w [delta_hat + o (delta - delta_hat) / q]

    Each with its standard error, impressions taken for independent, q and the imputed labels for known; None of fewer clicked
    impressions in effect than `LEAST_EFFECTIVE`.
    """

    snips: float | None
    snips_standard_error: float | None
    dr: float | None
    dr_standard_error: float | None


def risk_sums(
    cvr_logit: Tensor, click: Tensor, conversion: Tensor, weight: Tensor, q: Tensor, imputed_logit: Tensor, beside: Tensor | None = None
) -> Tensor:
    """What `risk_estimates` is made of, [2, 5] in float64, to be added over batches and ranks; all arguments [B].

    `q` and `imputed_logit` (of the imputed label m, delta_hat = BCE(eta_hat, m)) must not have been fitted on these impressions. With
    `beside`, CVR logits of another model, of the difference: this model's risk less the other's.
    """
    clicked = click > 0
    o, w = clicked.double(), weight.double()
    r = torch.where(clicked, conversion.double(), 0)  # an unclicked row's conversion may be NaN
    z, weights, m = cvr_logit.double(), q.double(), torch.sigmoid(imputed_logit.double())
    delta, imputed = bce_losses(z, r), bce_losses(z, m)
    if beside is not None:  # both estimates are linear in delta and delta_hat
        other = beside.double()
        delta, imputed = delta - bce_losses(other, r), imputed - bce_losses(other, m)
    inverse = w * o / weights
    return torch.stack([_ratio_sums(w * ips_losses(delta, o, weights), inverse), _ratio_sums(w * dr_losses(delta, imputed, o, weights), w)])


def risk_estimates(sums: Tensor) -> RiskEstimates:
    """The estimates of sums that were added over all rows."""
    (_, weights, _, _, squares), _ = sums.tolist()
    told = squares > 0 and weights * weights / squares >= LEAST_EFFECTIVE
    snips, dr = (_ratio(each, told) for each in sums.tolist())
    return RiskEstimates(*snips, *dr)


def _ratio_sums(above: Tensor, below: Tensor) -> Tensor:
    return torch.stack([above.sum(), below.sum(), (above**2).sum(), (above * below).sum(), (below**2).sum()])


def _ratio(sums: list[float], told: bool) -> tuple[float | None, float | None]:
    """sum a / sum b and, if it is told, its standard error, sqrt(sum (a - ratio b)^2) / sum b."""
    above, below, squared, product, squares = sums
    if not below:
        return None, None
    ratio = above / below
    if not told:
        return ratio, None
    spread = squared - 2 * ratio * product + ratio * ratio * squares
    return ratio, max(spread, 0.0) ** 0.5 / below
