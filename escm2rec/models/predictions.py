"""What the model says of a batch of impressions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Predictions(NamedTuple):
    """One named record in every mode; logits are unbounded and of shape [B].

    ctr_logit         a, with p_hat = sigmoid(a) the predicted P(click | x)
    cvr_logit         z, with eta_hat = sigmoid(z) the predicted P(conversion | x, do(click)), on every impression
    imputation_logit  h, what the objective makes delta_hat of (softplus(h), or a label m = sigmoid(h)); None without that tower
    """

    ctr_logit: Tensor
    cvr_logit: Tensor
    imputation_logit: Tensor | None
