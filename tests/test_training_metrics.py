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
            assert metrics.record(step, 0)["propensity_floor_share"] == (1 if floor > 0.5 else 0)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warnings
    for message in said:
        assert message.startswith("up to step 1 the floor of the propensity bound for 100% of the clicked impressions")
        assert message.endswith("lower objective.propensity.floor, or make it relative (floor_kind)")
