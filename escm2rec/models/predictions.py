"""What the model says of a batch of impressions."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Predictions(NamedTuple):
    """One named record in every mode; logits are unbounded and of shape [B]. What only some objectives need is None without them.

    ctr_logit             a, with p_hat = sigmoid(a) the predicted P(click | x)
    cvr_logit             z, with eta_hat = sigmoid(z) the predicted P(conversion | x, do(click)), on every impression
    imputation_logit      h, what the objective makes delta_hat of (softplus(h), or a label m = sigmoid(h))
    counterfactual_logit  of the predicted P(no conversion | x, do(click)), by a tower of its own
    propensity_logit      of P(click | x) once more, by a tower that trains nothing else
    inputs                [B, K], what the towers read: pooled embeddings and numeric features
    """

    ctr_logit: Tensor
    cvr_logit: Tensor
    imputation_logit: Tensor | None = None
    counterfactual_logit: Tensor | None = None
    propensity_logit: Tensor | None = None
    inputs: Tensor | None = None
