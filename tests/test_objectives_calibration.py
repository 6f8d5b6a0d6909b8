"""The calibration of the propensity: it finds the slope and shift that were there, on any cut of the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from escm2rec.objectives.calibration import NEWTON_STEPS, CalibrationKind, calibration_sums, newton_step
from escm2rec.objectives.propensity import propensity


def fit(logit: Tensor, click: Tensor, kind: CalibrationKind, weight: Tensor | None = None, parts: int = 1) -> Tensor:
    """As training does it, with the rows on so many ranks."""
    found, weight = torch.tensor([1.0, 0.0]), torch.ones_like(logit) if weight is None else weight
    for _ in range(NEWTON_STEPS):
        ranks = zip(logit.chunk(parts), click.chunk(parts), weight.chunk(parts), strict=True)
        found = newton_step(found, torch.stack([calibration_sums(*rank, found) for rank in ranks]).sum(dim=0), kind)
    return found


def world(slope: float, shift: float, rows: int = 40_000) -> tuple[Tensor, Tensor]:
    """Logits, and clicks whose logit is slope a + shift."""
    generator = torch.Generator().manual_seed(0)
    logit = 1.5 * torch.randn(rows, generator=generator) - 2
    return logit, (torch.rand(rows, generator=generator) < torch.sigmoid(slope * logit + shift)).float()


@pytest.mark.parametrize(("slope", "shift"), [(1.0, 0.0), (0.5, 0.3), (1.7, -0.5)])
def test_platt_finds_slope_and_shift(slope: float, shift: float) -> None:
    found = fit(*world(slope, shift), "platt")
    assert found.tolist() == pytest.approx([slope, shift], abs=0.06)
    assert fit(*world(slope, shift), "platt", parts=7).tolist() == pytest.approx(found.tolist(), abs=1e-6)


def test_temperature_moves_the_slope_alone() -> None:
    slope, shift = fit(*world(0.5, 0.0), "temperature").tolist()
    assert shift == 0
    assert slope == pytest.approx(0.5, abs=0.03)


def test_a_weight_is_a_number_of_impressions() -> None:
    # Negatives kept at rate 1/4 with weight 4 give the calibration of all.
    logit, click = world(0.7, 0.2)
    kept = (click > 0) | (torch.rand(len(click), generator=torch.Generator().manual_seed(1)) < 0.25)
    weight = torch.where(click > 0, 1.0, 4.0)[kept]
    assert fit(logit[kept], click[kept], "platt", weight).tolist() == pytest.approx([0.7, 0.2], abs=0.08)
    assert fit(logit[kept], click[kept], "platt")[1] > 1.0, "without the weight the shift takes the sampling for clicks"


@pytest.mark.parametrize("clicks", [0.0, 1.0])
def test_a_batch_of_one_label_has_a_finite_fit(clicks: float) -> None:
    logit = torch.tensor([-80.0, -3.0, 0.0, 80.0])
    for kind in ("temperature", "platt"):
        assert fit(logit, torch.full((4,), clicks), kind).isfinite().all()
        assert fit(logit[:0], torch.zeros(0), kind).tolist() == [1.0, 0.0]


def test_calibration_changes_q_and_nothing_else() -> None:
    logit = torch.tensor([-3.0, 0.0, 2.0], requires_grad=True)
    q = propensity(logit, floor=0.1, calibration=torch.tensor([0.5, -1.0]))
    assert q.tolist() == pytest.approx([0.1, 0.2689414, 0.5])
    assert not q.requires_grad
    assert propensity(logit, 0.1, constant=0.04, calibration=torch.tensor([0.5, -1.0])).tolist() == pytest.approx([0.04] * 3)
