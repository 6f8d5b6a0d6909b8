"""The direct method: imputed labels alone teach the CVR tower, on every impression; without L_CTCVR."""

from __future__ import annotations

import torch

from escm2rec.objectives.bce import bce_losses
from escm2rec.objectives.estimator import Estimator, Settings
from escm2rec.objectives.reduction import LossTerm, mean_of
from escm2rec.objectives.rows import Rows, required


def direct_term(rows: Rows, settings: Settings) -> LossTerm:
    """(1/N) sum w BCE(eta_hat, m), m held: the risk on all impressions where m is the true CVR, whatever the propensity."""
    m = torch.sigmoid(required(rows.imputation_logit, "imputation").detach())
    return mean_of(rows.weight * bce_losses(rows.cvr_logit, m), rows.weight)


# It weighs: the imputation is fitted with weights of 1/q.
ESTIMATOR = Estimator(direct_term, ctcvr=False, weighs=True, towers=frozenset({"imputation"}), labels_only=True)
