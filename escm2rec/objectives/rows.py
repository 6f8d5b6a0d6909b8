"""A batch as the losses see it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from escm2rec.objectives.bce import bce_losses


class Rows(NamedTuple):
    """Impressions in full precision, [B] each; what is not there is None.

    ctr_logit, cvr_logit   a and z
    click, conversion      o and r, 0 or 1; r is 0 where o is, whatever was recorded
    weight                 impression weight w
    q                      propensity as a weight, held
    floor                  the least that q, and 1 - q where it divides, may be
    imputation_logit       h: of the imputed error or label
    counterfactual_logit   of eta_star, the probability of no conversion (dcmt)
    propensity_logit       of a propensity tower apart from the CTR tower
    inputs                 [B, K], what the towers read, held
    """

    ctr_logit: Tensor
    cvr_logit: Tensor
    click: Tensor
    conversion: Tensor
    weight: Tensor
    q: Tensor
    floor: float
    imputation_logit: Tensor | None = None
    counterfactual_logit: Tensor | None = None
    propensity_logit: Tensor | None = None
    inputs: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """BCE(eta_hat, r), [B]; an error of the model on clicked rows only."""
        return bce_losses(self.cvr_logit, self.conversion)

    @property
    def unclicked_q(self) -> Tensor:
        """max(1 - q, floor), [B]: the propensity of no click as a weight."""
        return (1 - self.q).clamp(min=self.floor)


def required(logit: Tensor | None, tower: str) -> Tensor:
    """The logit of a tower that an estimator cannot do without; ValueError when the head was built without it."""
    if logit is None:
        raise ValueError(f"this objective needs predictions with a {tower} logit: build the head with the tower {tower!r}")
    return logit
