"""Inverse propensity scores in both spaces: clicked impressions with their labels, unclicked ones with imputed labels."""

from __future__ import annotations

import torch

from escm2rec.objectives.bce import bce_losses
from escm2rec.objectives.estimator import Estimator, Settings
from escm2rec.objectives.reduction import LossTerm, mean_of
from escm2rec.objectives.rows import Rows, required


def two_space_term(rows: Rows, settings: Settings) -> LossTerm:
    """(1/N) sum w [o delta / q + beta (1 - o) / (1 - q) BCE(eta_hat, m)], m held and fitted on clicks only.

    1 + beta times the risk on all impressions under the true q and a true m. With 0 for the labels of the unclicked instead,
    its minimiser is eta / (1 + beta): half the CVR at beta = 1 (docs/method.md).
    """
    m = torch.sigmoid(required(rows.imputation_logit, "imputation").detach())
    clicked = rows.click * rows.delta / rows.q
    unclicked = (1 - rows.click) / rows.unclicked_q * bce_losses(rows.cvr_logit, m)
    return mean_of(rows.weight * (clicked + settings.beta * unclicked), rows.weight)


ESTIMATOR = Estimator(
    two_space_term,
    ctcvr=False,
    weighs=True,
    towers=frozenset({"imputation"}),
    labels_only=True,
    reads=frozenset({"beta"}),
)
