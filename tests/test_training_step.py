"""One step's loss: learned weights of terms, and what calibration leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from escm2rec.models.predictions import Predictions
from escm2rec.objectives.objective import Stage
from escm2rec.objectives.weights import Learned
from escm2rec.reader.batch import Batch
from escm2rec.training.step import Loss, StepOutput
from tests.objectives_world import IMPUTING, make_batch, make_objective, take_step

WEIGHT_OF = {"cvr": "lambda_c", "ctcvr": "lambda_g"}


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def learned_loss(group: dist.ProcessGroup, kind: str, **settings: Any) -> Loss:
    """The loss of an objective whose weights are all learned."""
    return Loss(make_objective(kind, lambda_c=Learned(), lambda_g=Learned(), **settings), group)


def of_batch(predictions: Predictions, rows: Any) -> Batch:
    numeric = torch.zeros(len(rows.click), 0)
    return Batch(None, None, numeric, rows.click, rows.conversion, rows.weight, num_rows=len(rows.click))


def step(loss: Loss, rows: Any, predictions: Predictions | None = None) -> tuple[Tensor, StepOutput]:
    predictions = rows.predictions if predictions is None else predictions
    result: tuple[Tensor, StepOutput] = loss(predictions, of_batch(predictions, rows))
    return result


def log_variance(loss: Loss, name: str) -> Tensor:
    parameter = loss.log_variances[name]
    assert isinstance(parameter, Tensor)
    return parameter


@pytest.mark.parametrize("kind", ["naive+ctcvr", "escm2-ips", "escm2-snips", "escm2-dr", "dcmt"])
@pytest.mark.parametrize("s", [0.0, 0.8])
def test_a_learned_weight_has_the_slope_of_its_formula(group: dist.ProcessGroup, kind: str, s: float) -> None:
    """d/ds = 1/2 - exp(-s) max(f, 0), and the towers see exp(-s) times the term: the loss is that of constant weights otherwise."""
    loss, rows = learned_loss(group, kind), make_batch()
    with torch.no_grad():
        for parameter in loss.log_variances.values():
            parameter.fill_(s)
    total, output = step(loss, rows)
    slopes = torch.autograd.grad(total, [*loss.log_variances.values(), rows.predictions.cvr_logit], retain_graph=True)
    assert set(loss.log_variances) == {"cvr", "ctcvr"}
    for name, slope in zip(loss.log_variances, slopes[:-1], strict=True):
        f, weight = output.losses[name].item(), torch.exp(torch.tensor(-s)).item()
        assert f > 0
        assert slope.item() == pytest.approx(0.5 - weight * f, abs=1e-6)
        assert output.term_weights[name].item() == pytest.approx(weight)
    weight = torch.exp(torch.tensor(-s)).item()
    constant = take_step(make_objective(kind, lambda_c=weight, lambda_g=weight), rows)
    assert constant.cvr_grad is not None
    assert torch.allclose(slopes[-1], constant.cvr_grad, atol=1e-7)


@pytest.mark.parametrize("name", ["cvr", "ctcvr"])
def test_a_learned_weight_rests_at_the_inverse_of_twice_its_term(group: dist.ProcessGroup, name: str) -> None:
    loss, rows = learned_loss(group, "escm2-ips"), make_batch()
    f = step(loss, rows)[1].losses[name]
    with torch.no_grad():
        log_variance(loss, name).copy_(torch.log(2 * f))
    total, output = step(loss, rows)
    (slope,) = torch.autograd.grad(total, log_variance(loss, name))
    assert output.term_weights[name].item() == pytest.approx(1 / (2 * f.item()))
    assert abs(slope.item()) < 1e-6

    # By descent from s = 0 too.
    loss = learned_loss(group, "escm2-ips")
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        step(loss, rows)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert torch.exp(-log_variance(loss, name)).item() == pytest.approx(1 / (2 * f.item()), rel=1e-3)


def test_a_batch_whose_term_is_negative_counts_as_zero_for_its_weight(group: dist.ProcessGroup) -> None:
    # A clicked row whose imputed error is far above its own: delta_hat + (delta - delta_hat) / q is below 0.
    rows = make_batch(1)
    low, high = (torch.full((1,), value, dtype=torch.float64, requires_grad=True) for value in (-2.0, 5.0))
    loss = learned_loss(group, "escm2-dr")
    total, output = step(loss, rows, Predictions(low, high, high))
    assert output.losses["cvr"] < 0
    slope, towers = torch.autograd.grad(total, [log_variance(loss, "cvr"), high])
    assert slope.item() == 0.5
    assert towers.isfinite().all()


@pytest.mark.parametrize("kind", IMPUTING)
def test_a_learned_weight_rests_while_its_term_is_not_there(group: dist.ProcessGroup, kind: str) -> None:
    loss, rows = learned_loss(group, kind), make_batch()
    loss.stage = Stage("imputation")
    total, _ = step(loss, rows)
    s = list(loss.log_variances.values())
    assert s
    assert torch.autograd.grad(total, s, allow_unused=True) == (None,) * len(s)


def test_a_step_whose_losses_are_not_finite_is_felt_by_nothing_where_it_may_be_skipped(group: dist.ProcessGroup) -> None:
    rows = make_batch()
    skips, goes_on = (Loss(make_objective("escm2-ips", lambda_g=Learned()), group, skips=skips) for skips in (True, False))
    finite, output = step(skips, rows)
    assert torch.equal(finite, step(goes_on, rows)[0])
    assert not output.skipped
    spoilt = rows.predictions._replace(cvr_logit=rows.predictions.cvr_logit.detach().clone().requires_grad_())
    spoilt.cvr_logit.data[0] = torch.inf
    for loss in (skips, goes_on):
        total, output = step(loss, rows, spoilt)
        assert not torch.stack(list(output.losses.values())).isfinite().all()
        assert output.losses["ctr"].isfinite(), "one term is enough"
        assert output.skipped == (loss is skips)
        slopes = torch.autograd.grad(total, [spoilt.cvr_logit, log_variance(loss, "ctcvr")], allow_unused=True)
        assert all(slope is None for slope in slopes) == (loss is skips)


def test_a_step_of_calibration_moves_slope_and_shift_alone(group: dist.ProcessGroup) -> None:
    loss, rows = Loss(make_objective("escm2-ips"), group, "platt"), make_batch()
    before = step(loss, rows)[1]
    loss.stage = Stage("calibration")
    total, output = step(loss, rows)
    assert total.requires_grad
    assert torch.autograd.grad(total, [*loss.parameters(), rows.predictions.ctr_logit], allow_unused=True)[-1] is None
    assert output.losses == {}
    assert loss.calibration.tolist() != [1.0, 0.0]
    loss.stage = Stage("cvr")
    after = step(loss, rows)[1]
    assert torch.equal(after.losses["ctr"], before.losses["ctr"])
    assert torch.equal(after.losses["ctcvr"], before.losses["ctcvr"])
    assert not torch.equal(after.losses["cvr"], before.losses["cvr"])
