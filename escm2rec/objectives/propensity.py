"""The propensity as a weight, and what says whether it is one worth weighting by."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from escm2rec.objectives.bce import full_precision

# With it q^-3, times a squared error of 80^2, over 2^30 impressions, is still finite in float32 (6e36 of 3e38).
LEAST_PROPENSITY = 1e-8


def propensity(ctr_logit: Tensor, floor: float, constant: float | None = None, calibration: Tensor | None = None) -> Tensor:
    """q = stop_gradient(max(p_hat, floor)), [B], of CTR logits [B]; `constant` replaces p_hat and floor, as in warm-up.

    `calibration` [2] makes p_hat = sigmoid(slope a + shift) of (slope, shift): as a weight only, what is predicted stays.
    Depends on the impression alone, never on the batch it came in. Never below `LEAST_PROPENSITY`, whatever the floor.
    """
    logit = full_precision(ctr_logit.detach())
    if constant is not None:
        return torch.full_like(logit, max(constant, LEAST_PROPENSITY))
    if calibration is not None:
        logit = calibration[0] * logit + calibration[1]
    return torch.sigmoid(logit).clamp(min=max(floor, LEAST_PROPENSITY))


class PropensitySums(NamedTuple):
    """What a `PropensityReport` is made of, over any rows; in float64.

    added    [5], to be added over ranks and steps: sum w, number of clicked rows, of clicked rows at the floor,
             sum W, sum W^2, with W = w o / q
    largest  scalar, whose maximum is to be taken over ranks and steps: max W
    """

    added: Tensor
    largest: Tensor

    def merge(self, other: PropensitySums) -> PropensitySums:
        """The sums over both sets of rows."""
        return PropensitySums(self.added + other.added, torch.maximum(self.largest, other.largest))


class PropensityReport(NamedTuple):
    """How far the weighting can be trusted; None where there is no row to say it of.

    effective_sample_size   (sum W)^2 / sum W^2, W = w o / q
    effective_share         the same over the number of clicked rows
    floor_share             share of clicked rows at the floor
    mean_weight             sum W / sum w; 1 under the true propensity
    largest_share           max W / sum W
    """

    num_clicked: int
    effective_sample_size: float
    effective_share: float | None
    floor_share: float | None
    mean_weight: float | None
    largest_share: float | None

    @property
    def floor_binds_for_most(self) -> bool:
        """Whether weights are constant for most clicked rows, so that the objective is nearly naive, scaled."""
        return self.floor_share is not None and self.floor_share > 0.5


def propensity_sums(q: Tensor, click: Tensor, weight: Tensor, floor: float) -> PropensitySums:
    """Sums over the impressions of a batch, from q, click and impression weight [B] and the floor that made q; B may be 0."""
    clicked = click > 0
    # Equal, not at most: the base CTR of warm-up may lie below an absolute floor, which does not bind then.
    at_floor = clicked & (q == max(floor, LEAST_PROPENSITY))
    w, o = weight.double(), clicked.double()
    weights = w * o / q.double()
    added = torch.stack([w.sum(), o.sum(), at_floor.double().sum(), weights.sum(), (weights**2).sum()])
    return PropensitySums(added, torch.cat([weights, weights.new_zeros(1)]).max())


def propensity_report(sums: PropensitySums) -> PropensityReport:
    """The report of sums that were reduced over all ranks."""
    rows, clicked, at_floor, weight, squared_weight = sums.added.tolist()
    effective = weight**2 / squared_weight if squared_weight else 0.0
    return PropensityReport(
        num_clicked=int(clicked),
        effective_sample_size=effective,
        effective_share=effective / clicked if clicked else None,
        floor_share=at_floor / clicked if clicked else None,
        mean_weight=weight / rows if rows else None,
        largest_share=sums.largest.item() / weight if weight else None,
    )
