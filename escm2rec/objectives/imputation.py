"""How the imputation tower is trained, and what it may predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from escm2rec.objectives.bce import bce_losses, softplus

Predicts = Literal["error", "label"]
Weighting = Literal["dr-jl", "mrdr", "dr-bias", "dr-mse"]
ImputationLoss = Literal["squared", "bce"]


@dataclass(frozen=True)
class Imputation:
    """Settings of the imputation tower, h its logit.

    predicts            error: delta_hat = softplus(h); label: m = sigmoid(h), delta_hat = BCE(eta_hat, m)
    weighting           v of the imputation loss, see `imputation_weights`
    mse_mixture         share of dr-bias in dr-mse
    loss                squared, or bce (label only)
    normalise           divide the imputation loss by sum w o v instead of sum w
    clip_pseudo_labels  see `pseudo_labels` (label only)
    alternate           CVR and imputation steps in turn, `cvr_steps` of the one to one of the other; else both in each step
    """

    predicts: Predicts
    weighting: Weighting
    mse_mixture: float
    loss: ImputationLoss
    normalise: bool
    clip_pseudo_labels: bool
    alternate: bool
    cvr_steps: int


def imputation_weights(q: Tensor, weighting: Weighting, mse_mixture: float) -> Tensor:
    """v, [B], of propensities q [B].

    dr-jl 1/q (Wang et al., ICML 2019); mrdr (1-q)/q^2, for which the squared loss is the variance of DR (Guo et al., SIGIR 2021);
    dr-bias (1-q)^2/q^3; dr-mse a mixture of the last two, `mse_mixture` the share of dr-bias.
    """
    if weighting == "dr-jl":
        return 1 / q
    variance, bias = (1 - q) / q**2, (1 - q) ** 2 / q**3
    shares: dict[Weighting, float] = {"mrdr": 0.0, "dr-bias": 1.0, "dr-mse": mse_mixture}
    share = shares[weighting]
    return (1 - share) * variance + share * bias


def imputation_losses(imputation_logit: Tensor, cvr_logit: Tensor, conversion: Tensor, predicts: Predicts, loss: ImputationLoss) -> Tensor:
    """Error of the imputation per impression, [B], before o and v; only `imputation_logit` receives a gradient.

    error, squared  (delta - softplus(h))^2
    label, squared  (delta - BCE(eta_hat, m))^2 = z^2 (m - r)^2, which is blind at z = 0
    label, bce      BCE(m, r)
    """
    held = cvr_logit.detach()
    if predicts == "error":
        return (bce_losses(held, conversion) - softplus(imputation_logit)) ** 2
    if loss == "bce":
        return bce_losses(imputation_logit, conversion)
    return (held * (torch.sigmoid(imputation_logit) - conversion)) ** 2


def pseudo_label_counts(labels: Tensor) -> Tensor:
    """How many pseudo-labels [B] are outside [0, 1], by how much together, and how many there are, [3] in float64: to be added over
    ranks and steps."""
    beyond = (labels - labels.clamp(0, 1)).abs().double()
    return torch.stack([(beyond > 0).sum().double(), beyond.sum(), torch.full_like(beyond.sum(), labels.numel())])


def outside(counts: Tensor) -> tuple[float, float]:
    """Of added `pseudo_label_counts`: the share outside [0, 1] (of all with labels: where clicked, nearly always), and how far outside
    those are on average, about 1/q - 1; 0 of none."""
    number, beyond, rows = counts.tolist()
    return (float(number / rows) if rows else 0.0), (float(beyond / number) if number else 0.0)
