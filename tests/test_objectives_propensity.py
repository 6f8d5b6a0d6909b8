"""The propensity as a weight, and the figures that say whether to trust it."""

from __future__ import annotations

import pytest
import torch

from escm2rec.objectives.imputation import outside, pseudo_label_counts
from escm2rec.objectives.propensity import PropensitySums, propensity, propensity_report, propensity_sums

Q = torch.tensor([0.1, 0.2, 0.5, 0.1])
CLICK = torch.tensor([1, 1, 0, 1])
WEIGHT = torch.tensor([1.0, 2.0, 5.0, 1.0])


def test_propensity_is_floored_and_held() -> None:
    logit = torch.logit(torch.tensor([0.01, 0.3, 0.9])).requires_grad_()
    q = propensity(logit, floor=0.05)
    torch.testing.assert_close(q, torch.tensor([0.05, 0.3, 0.9]))
    assert not q.requires_grad
    assert propensity(logit, floor=0.05, constant=0.04).tolist() == pytest.approx([0.04] * 3)


def test_propensity_is_never_zero() -> None:
    # sigmoid(-200) is: then one row would make the loss infinite.
    assert (propensity(torch.tensor([-200.0]), floor=0.0) > 0).all()
    assert (propensity(torch.tensor([0.0]), floor=0.0, constant=0.0) > 0).all()
    assert propensity(torch.tensor([-4.0], dtype=torch.bfloat16), floor=0.0).dtype == torch.float32


def test_report_by_hand() -> None:
    # W = 10, 10, 0, 10.
    report = propensity_report(propensity_sums(Q, CLICK, WEIGHT, floor=0.1))
    assert report.num_clicked == 3
    assert report.effective_sample_size == pytest.approx(3)
    assert report.effective_share == pytest.approx(1)
    assert report.floor_share == pytest.approx(2 / 3)
    assert report.mean_weight == pytest.approx(30 / 9)
    assert report.largest_share == pytest.approx(1 / 3)
    assert report.floor_binds_for_most


def test_floor_does_not_bind_in_warm_up() -> None:
    # There q is the base CTR, even where that lies below an absolute floor.
    logit = torch.full((4,), -5.0)
    shares = []
    for constant in (0.04, None):
        q = propensity(logit, floor=0.1, constant=constant)
        shares.append(propensity_report(propensity_sums(q, CLICK, WEIGHT, floor=0.1)).floor_share)
    assert shares == [0, 1]


def test_one_heavy_row_shows() -> None:
    report = propensity_report(propensity_sums(torch.tensor([0.001, 0.5, 0.5]), torch.ones(3), torch.ones(3), floor=0.0))
    assert report.effective_share == pytest.approx(1004**2 / (1000**2 + 4 + 4) / 3)
    assert report.largest_share == pytest.approx(1000 / 1004)
    assert not report.floor_binds_for_most


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    parts = [propensity_sums(Q[rows], CLICK[rows], WEIGHT[rows], 0.1) for rows in (slice(0, 1), slice(1, 1), slice(1, 4))]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    whole = propensity_sums(Q, CLICK, WEIGHT, 0.1)
    assert isinstance(merged, PropensitySums)
    torch.testing.assert_close(merged.added, whole.added)
    assert merged.largest == whole.largest


def test_report_without_clicks_says_that_there_is_nothing_to_say() -> None:
    report = propensity_report(propensity_sums(Q, torch.zeros(4), WEIGHT, 0.1))
    assert (report.num_clicked, report.effective_sample_size, report.mean_weight) == (0, 0, 0)
    assert report.effective_share is None
    assert report.floor_share is None
    assert report.largest_share is None
    assert not report.floor_binds_for_most
    assert propensity_report(propensity_sums(Q[:0], CLICK[:0], WEIGHT[:0], 0.1)).mean_weight is None


def test_true_propensity_makes_a_mean_weight_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    p = 0.05 + 0.9 * torch.rand(200_000, generator=generator)
    click = torch.rand(200_000, generator=generator) < p
    report = propensity_report(propensity_sums(p, click, torch.ones_like(p), floor=0.0))
    assert report.mean_weight == pytest.approx(1, abs=0.01)


def test_pseudo_labels_outside_are_counted_and_measured() -> None:
    counts = pseudo_label_counts(torch.tensor([-0.25, 0.0, 0.5, 1.0, 3.0])) + pseudo_label_counts(torch.tensor([0.5]))
    assert counts.tolist() == [2, 2.25, 6]
    assert outside(counts) == pytest.approx((1 / 3, (0.25 + 2.0) / 2))
    assert outside(pseudo_label_counts(torch.zeros(0))) == (0, 0)
