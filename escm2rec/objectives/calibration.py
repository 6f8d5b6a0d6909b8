"""The calibration of a propensity: slope and shift of its logit, fitted to clicks that trained nothing."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from escm2rec.objectives.bce import full_precision

CalibrationKind = Literal["temperature", "platt"]
NEWTON_STEPS = 8
LONGEST_STEP = 1.0  # of slope and shift each: a full Newton step can leap where few rows decide


def calibration_sums(logit: Tensor, click: Tensor, weight: Tensor, calibration: Tensor) -> Tensor:
    """Gradient (slope, shift) and Hessian (slope slope, slope shift, shift shift) of sum w BCE(sigmoid(slope a + shift), o), [5].

    Of a rank's rows, [B] each; in float64, to be added over ranks. `calibration` is (slope, shift).
    """
    a, w = full_precision(logit.detach()).double(), weight.double()
    p = torch.sigmoid(calibration[0].double() * a + calibration[1].double())
    error, curvature = w * (p - (click > 0).double()), w * p * (1 - p)
    return torch.stack([(error * a).sum(), error.sum(), (curvature * a * a).sum(), (curvature * a).sum(), curvature.sum()])


def newton_step(calibration: Tensor, sums: Tensor, kind: CalibrationKind) -> Tensor:
    """The next (slope, shift), [2], from `calibration_sums` over all ranks.

    Temperature scaling (Guo et al., ICML 2017) moves the slope alone, Platt scaling both. A normal prior of variance 1 around (1, 0)
    counts like one impression, so a batch without a click has a fit too.
    """
    prior = calibration.new_tensor([1.0, 0.0]).double()
    gradient = sums[:2] + calibration.double() - prior
    hessian = torch.stack([sums[2:4], sums[3:5]]) + torch.eye(2, dtype=torch.float64, device=sums.device)
    step = torch.linalg.solve(hessian, gradient) if kind == "platt" else torch.stack([gradient[0] / hessian[0, 0], gradient.new_zeros(())])
    return (calibration.double() - step.clamp(-LONGEST_STEP, LONGEST_STEP)).to(calibration.dtype)
