"""Binary cross entropy of logits, per impression."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def full_precision(values: Tensor) -> Tensor:
    """Values in float32, or in float64 where they are that already: losses are never computed in less."""
    return values if values.dtype == torch.float64 else values.float()


def softplus(logit: Tensor) -> Tensor:
    """log(1 + exp(logit)), [B]; unlike torch's, which is the identity above 20, exact in float64 too."""
    return -functional.logsigmoid(-logit)


def bce_losses(logit: Tensor, label: Tensor) -> Tensor:
    """BCE(sigmoid(logit), label) = label softplus(-logit) + (1 - label) softplus(logit), [B].

    Linear in `label`, which need not lie in [0, 1]. Not softplus(logit) - label logit: that cancels to 0 at a logit of 17
    in float32.
    """
    return -(label * functional.logsigmoid(logit) + (1 - label) * functional.logsigmoid(-logit))
