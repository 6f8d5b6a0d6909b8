"""The loss of click and conversion together, on every impression (ESMM, Ma et al., SIGIR 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from escm2rec.objectives.bce import bce_losses


def ctcvr_logit(ctr_logit: Tensor, cvr_logit: Tensor) -> Tensor:
    """The logit of p_hat eta_hat, [B]: s = -log(exp(-a) + exp(-z) + exp(-a - z)).

    From 1 / (p_hat eta_hat) = (1 + exp(-a))(1 + exp(-z)). A logsumexp of three linear terms has neither a branch nor a
    difference of near numbers, so value and gradient keep their relative precision where log(1 - p_hat eta_hat) loses it.
    """
    return -torch.logsumexp(torch.stack([-ctr_logit, -cvr_logit, -ctr_logit - cvr_logit]), dim=0)


def ctcvr_losses(ctr_logit: Tensor, cvr_logit: Tensor, converted: Tensor) -> Tensor:
    """BCE(p_hat eta_hat, c) with c = o r, [B]. Gradient in z: (1 - eta_hat)(p_hat eta_hat - c) / (1 - p_hat eta_hat)."""
    return bce_losses(ctcvr_logit(ctr_logit, cvr_logit), converted)
