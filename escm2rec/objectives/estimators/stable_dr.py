"""StableDR (Li et al., ICLR 2023, arXiv 2205.04701): a propensity that keeps the doubly robust loss bounded; without L_CTCVR.

Three losses, in one step or in a cycle of three: imputation (`imputation.py`; the paper's sum w o (delta - delta_hat)^2 / q with
`predicts: error`, by default the BCE of labels over q); propensity, this file; prediction, the self-normalised loss, which equals the
self-normalised doubly robust one, mean delta_hat + sum (o/q)(delta - delta_hat) / sum o/q, where the propensity meets the
constraint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from escm2rec.objectives.bce import bce_losses, softplus
from escm2rec.objectives.estimator import Estimator, Settings
from escm2rec.objectives.estimators.escm2_snips import snips_term
from escm2rec.objectives.propensity import LEAST_PROPENSITY
from escm2rec.objectives.reduction import LossTerm, divide
from escm2rec.objectives.rows import Rows, required


def stability_term(rows: Rows, settings: Settings) -> LossTerm:
    """[(1/N) sum w (o / p)(delta_hat - mean delta_hat)]^2, p of the propensity tower with gradient, delta_hat held, its mean over N."""
    h = required(rows.imputation_logit, "imputation").detach()
    imputed = softplus(h) if settings.imputation.predicts == "error" else bce_losses(rows.cvr_logit.detach(), torch.sigmoid(h))
    p = torch.sigmoid(required(rows.propensity_logit, "propensity")).clamp(min=max(rows.floor, LEAST_PROPENSITY))
    inverse = rows.weight * rows.click / p
    columns = torch.stack([inverse * imputed, inverse, rows.weight * imputed, rows.weight], dim=1)
    return LossTerm(columns, _squared_covariance, settings.stability)


def _squared_covariance(sums: Tensor) -> Tensor:
    """Of the sums of (o/p) delta_hat, o/p, delta_hat and 1: [mean (o/p) delta_hat - mean (o/p) mean delta_hat]^2."""
    product, inverse, imputed = divide(sums[:3], sums[3]).unbind()
    covariance = product - inverse * imputed
    return covariance * covariance


ESTIMATOR = Estimator(
    snips_term,
    ctcvr=False,
    weighs=True,
    towers=frozenset({"imputation", "propensity"}),
    propensity_terms=lambda rows, settings: {"stability": stability_term(rows, settings)},
    reads=frozenset({"stability"}),
)
