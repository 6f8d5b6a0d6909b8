"""ESCM2-DR (Wang et al., SIGIR 2022): the doubly robust CVR loss beside L_CTCVR."""

from __future__ import annotations

import torch
from torch import Tensor

from escm2rec.objectives.bce import bce_losses, softplus
from escm2rec.objectives.estimator import Estimator, Settings
from escm2rec.objectives.reduction import LossTerm, mean_of
from escm2rec.objectives.rows import Rows, required


def dr_losses(delta: Tensor, delta_hat: Tensor, click: Tensor, q: Tensor) -> Tensor:
    """delta_hat + o (delta - delta_hat) / q, [B]; over N (DR-JL, Wang et al., ICML 2019).

    Its mean over clicks is the risk on all impressions under the true q, or under any q where E[delta - delta_hat | x] = 0.
    """
    return delta_hat + click * (delta - delta_hat) / q


def pseudo_labels(m: Tensor, conversion: Tensor, click: Tensor, q: Tensor, clip: bool) -> Tensor:
    """m + (o / q)(r - m), [B]: the label whose BCE is the doubly robust loss with delta_hat = BCE(sigmoid(z), m).

    It lies outside [0, 1] on every clicked row with q < 1, where its BCE has no lower bound. `clip` cuts it to [0, 1]: to r where
    clicked and m elsewhere, whatever q is. That bounds the loss, and leaves it unbiased only where m is the true CVR.
    """
    labels = m + click * (conversion - m) / q
    return labels.clamp(0, 1) if clip else labels


def dr_term(rows: Rows, settings: Settings) -> LossTerm:
    """(1/N) sum w [delta_hat + o (delta - delta_hat) / q], with what the imputation tower says held."""
    held = required(rows.imputation_logit, "imputation").detach()
    if settings.imputation.predicts == "error":
        losses = dr_losses(rows.delta, softplus(held), rows.click, rows.q)
    else:
        labels = pseudo_labels(torch.sigmoid(held), rows.conversion, rows.click, rows.q, settings.imputation.clip_pseudo_labels)
        losses = bce_losses(rows.cvr_logit, labels)
    return mean_of(rows.weight * losses, rows.weight)


ESTIMATOR = Estimator(dr_term, weighs=True, towers=frozenset({"imputation"}), pseudo_labels=True)
