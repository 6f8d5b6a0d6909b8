"""What a log says of the CVR risk on all impressions: mean BCE(eta_hat, r), though r is recorded on clicked impressions alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from escm2rec.objectives.bce import bce_losses
from escm2rec.objectives.estimators.escm2_dr import dr_losses
from escm2rec.objectives.estimators.escm2_ips import ips_losses


class RiskEstimates(NamedTuple):
    """Of a model's risk, in nats; None where there is no row, or for snips no click.

    snips              sum w (o/q) delta / sum w o/q
    dr                 (1/N) sum w [delta_hat + o (delta - delta_hat) / q]
    dr_standard_error  of dr, impressions taken for independent
    """

    snips: float | None
    dr: float | None
    dr_standard_error: float | None


def risk_sums(cvr_logit: Tensor, click: Tensor, conversion: Tensor, weight: Tensor, q: Tensor, imputed_logit: Tensor) -> Tensor:
    """What `risk_estimates` is made of, [7] in float64, to be added over batches and ranks; all arguments [B].

    `q` and `imputed_logit` (of the imputed label m, delta_hat = BCE(eta_hat, m)) must not have been fitted on these impressions.
    """
    clicked = click > 0
    o, w = clicked.double(), weight.double()
    r = torch.where(clicked, conversion.double(), 0)  # an unclicked row's conversion may be NaN
    z, weights = cvr_logit.double(), q.double()
    delta, imputed = bce_losses(z, r), bce_losses(z, torch.sigmoid(imputed_logit.double()))
    robust = dr_losses(delta, imputed, o, weights)
    columns = [w, w * o / weights, w * ips_losses(delta, o, weights), w * robust, w**2, w**2 * robust, (w * robust) ** 2]
    return torch.stack([column.sum() for column in columns])


def risk_estimates(sums: Tensor) -> RiskEstimates:
    """The estimates of sums that were added over all rows."""
    rows, weight, snips, robust, squares, product, squared = sums.tolist()
    if not rows:
        return RiskEstimates(None, None, None)
    dr = robust / rows
    spread = squared - 2 * dr * product + dr * dr * squares
    return RiskEstimates(snips / weight if weight else None, dr, max(spread, 0.0) ** 0.5 / rows)
