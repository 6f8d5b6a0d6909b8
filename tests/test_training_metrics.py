"""What training says of its propensity."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from escm2rec.reader.batch import Batch
from escm2rec.sharding.runtime import Runtime
from escm2rec.training.metrics import TrainingMetrics
from escm2rec.training.step import Loss
from tests.objectives_world import make_batch, make_objective


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(("floor", "weighs", "warnings"), [(0.99, True, 1), (0.01, True, 0), (0.99, False, 0)])
def test_a_floor_that_binds_for_most_is_told_once(
    group: dist.ProcessGroup, caplog: pytest.LogCaptureFixture, floor: float, weighs: bool, warnings: int
) -> None:
    """Where the objective weighs by q, and whatever later records say."""
    metrics = TrainingMetrics(Runtime(0, 1, 1, torch.device("cpu"), group), weighs)
    loss, rows = Loss(make_objective("escm2-ips", floor=floor), group), make_batch()
    batch = Batch(None, None, torch.zeros(len(rows.click), 0), rows.click, rows.conversion, rows.weight, num_rows=len(rows.click))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            metrics.add(loss(rows.predictions, batch)[1])
            assert metrics.record(step, 0).result()["propensity_floor_share"] == (1 if floor > 0.5 else 0)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warnings
    for message in said:
        assert message.startswith("up to step 1 the floor of the propensity bound for 100% of the clicked impressions")
        assert message.endswith("lower objective.propensity.floor, or make it relative (floor_kind)")


def test_a_record_of_no_step_holds_what_it_is_given(group: dist.ProcessGroup) -> None:
    """As where the model is measured after a step that was skipped."""
    metrics = TrainingMetrics(Runtime(0, 1, 1, torch.device("cpu"), group), weighs=False)
    told = {"step": 7, "epoch": 1, "rows": 0, "validation_ctr_auc": 0.7}
    assert metrics.record(7, 1, {"validation_ctr_auc": 0.7, "validation_cvr_auc": float("nan")}).result() == told


@pytest.mark.parametrize(("clip", "scale", "warnings"), [(False, 50.0, 1), (True, 50.0, 0), (False, 0.0, 0)])
def test_a_loss_below_zero_is_told_once(
    group: dist.ProcessGroup, caplog: pytest.LogCaptureFixture, clip: bool, scale: float, warnings: int
) -> None:
    """Of rows learned by heart: with pseudo-labels that are not clipped their loss falls without end."""
    metrics = TrainingMetrics(Runtime(0, 1, 1, torch.device("cpu"), group), weighs=True)
    objective = make_objective("escm2-dr", predicts="label", loss="bce", alternate=False, floor=0.01, clip_pseudo_labels=clip)
    loss, rows = Loss(objective, group), make_batch()
    batch = Batch(None, None, torch.zeros(len(rows.click), 0), rows.click, rows.conversion, rows.weight, num_rows=len(rows.click))
    learned = torch.where(rows.click > 0, scale * (2 * rows.conversion - 1), 0.0)
    predictions = rows.predictions._replace(cvr_logit=learned.to(rows.predictions.cvr_logit))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            metrics.add(loss(predictions, batch)[1])
            record = metrics.record(step, 0).result()
            assert (record["least_loss_cvr"] < 0) == bool(warnings)
            assert record["pseudo_labels_excess"] > 0
    said = [record.getMessage() for record in caplog.records if "CVR loss" in record.getMessage()]
    assert len(said) == warnings
    assert all("set objective.imputation.clip_pseudo_labels: true" in message for message in said)
