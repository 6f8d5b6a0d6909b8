"""DCMT (Zhu et al., ICDE 2023, arXiv 2302.06141): a tower for conversions and one for no conversion, tied to each other.

A baseline: the unclicked are taken for no conversions by the second tower, so it estimates no risk.
"""

from __future__ import annotations

import torch

from escm2rec.objectives.bce import softplus
from escm2rec.objectives.estimator import Estimator, Settings
from escm2rec.objectives.reduction import LossTerm, mean_of
from escm2rec.objectives.rows import Rows, required


def dcmt_term(rows: Rows, settings: Settings) -> LossTerm:
    """(1/N) sum w [o delta / q + (1 - o) BCE(eta_star, 1) / (1 - q) + lambda |1 - eta_hat - eta_star|], lambda `consistency`."""
    counterfactual = required(rows.counterfactual_logit, "counterfactual")
    clicked = rows.click * rows.delta / rows.q
    unclicked = (1 - rows.click) * softplus(-counterfactual) / rows.unclicked_q
    apart = (1 - torch.sigmoid(rows.cvr_logit) - torch.sigmoid(counterfactual)).abs()
    return mean_of(rows.weight * (clicked + unclicked + settings.consistency * apart), rows.weight)


ESTIMATOR = Estimator(dcmt_term, weighs=True, towers=frozenset({"counterfactual"}), reads=frozenset({"consistency"}))
