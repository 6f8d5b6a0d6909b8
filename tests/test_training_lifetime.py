"""Figures over all impressions that trained since step 1: against the functions of `evaluate`, on any number of ranks, and resumed.

That they are bit for bit those of an undisturbed training on real ranks, and that skipped steps count nothing, is part of
`test_training.py` and `test_training_divergence.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from escm2rec.errors import StopError
from escm2rec.sharding.runtime import Runtime
from escm2rec.training.lifetime import COUNTS, TASKS, Lifetime
from escm2rec.training.metrics import TrainingMetrics, quality
from escm2rec.training.step import StepOutput
from escm2rec.training.train import train
from tests.encoded import config, write_dataset
from tests.training_calls import train_until_told

FIGURES = [f"{task}_{figure}" for task in TASKS for figure in ("log_loss", "calibration")]


def make_rows(seed: int, num_rows: int, scale: float = 2.0) -> Tensor:
    """As `StepOutput.rows`; some conversions lie where there was no click."""
    draws = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, num_rows, generator=draws) - 1
    labels = (torch.rand(2, num_rows, generator=draws) < 0.3).float()
    return torch.cat([logits, labels, 0.5 + torch.rand(1, num_rows, generator=draws)])


def lives(steps: list[Tensor], world_size: int, stored: list[list[float]] | None = None) -> list[Lifetime]:
    """Those of all ranks, each with its share of the rows of each step, shared."""
    every = [Lifetime(Runtime(rank, world_size, world_size, torch.device("cpu"), None), stored) for rank in range(world_size)]  # type: ignore[arg-type]
    for step in steps:
        for rank, life in enumerate(every):
            life.add(step[:, rank::world_size])
    added = torch.stack([life.placed() for life in every]).sum(dim=0)
    for life in every:
        life.share(added)
    return every


@pytest.mark.parametrize("scale", [2.0, 60.0])
def test_figures_are_those_of_all_rows_at_once(scale: float) -> None:
    steps = [make_rows(seed, 301, scale) for seed in range(5)]
    rows = torch.cat(steps, dim=1)
    (life,) = lives(steps, 1)
    found, want = life.figures(), quality(rows.numpy())
    click, conversion = rows[2], rows[3]
    assert [found[f"lifetime_{name}"] for name in COUNTS] == [5 * 301, int(click.sum()), int((click * conversion).sum())]
    for name in FIGURES:
        assert found[f"lifetime_{name}"] == pytest.approx(want[name], rel=1e-12), name


def test_ranks_have_the_same_figures_and_go_on_from_what_was_stored() -> None:
    steps = [make_rows(seed, 300) for seed in range(6)]
    (alone,) = lives(steps, 1)
    want = alone.figures()
    for world_size in (1, 2, 3):
        undisturbed = lives(steps, world_size)
        assert all(life.figures() == undisturbed[0].figures() for life in undisturbed)
        assert undisturbed[0].figures() == pytest.approx(want, rel=1e-12)
        stored = json.loads(json.dumps(lives(steps[:4], world_size)[0].table.tolist()))
        assert torch.equal(lives(steps[4:], world_size, stored)[0].table, undisturbed[0].table), "bit for bit"
        for other in {1, 2, 3} - {world_size}:
            assert lives(steps[4:], other, stored)[0].figures() == pytest.approx(want, rel=1e-12)


def test_what_has_no_rows_has_no_figures() -> None:
    (life,) = lives([], 1)
    found = life.figures()
    assert [found.pop(f"lifetime_{name}") for name in COUNTS] == [0, 0, 0]
    assert all(math.isnan(value) for value in found.values())


def test_a_training_tells_them_of_every_step_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In records of one step and of several, before and after a stop: what is computed of all rows at once."""
    data = write_dataset(tmp_path / "set", {"train": 10 * 256 - 37, "validation": 600})
    seen: list[np.ndarray[Any, Any]] = []
    add = TrainingMetrics.add

    def add_and_keep(self: TrainingMetrics, output: StepOutput) -> None:
        add(self, output)
        seen.append(output.rows().numpy().copy())

    monkeypatch.setattr(TrainingMetrics, "add", add_and_keep)
    overrides = ["training.log_every_steps=3"]
    with pytest.raises(StopError, match="after step 5 of 10"):
        train_until_told(str(data), str(tmp_path / "run"), overrides, at_step=3, of_rank=0)
    train(config(*overrides), data, tmp_path / "run", resume=True)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 5, 6, 9, 10]
    assert len(seen) == 10
    for record in records:
        rows = np.concatenate(seen[: record["step"]], axis=1)
        want = quality(rows)
        assert record["lifetime_rows"] == rows.shape[1] == sum(each["rows"] for each in records if each["step"] <= record["step"])
        assert record["lifetime_clicks"] == want["window_clicks"]
        assert {name: record[f"lifetime_{name}"] for name in FIGURES} == pytest.approx({name: want[name] for name in FIGURES}, rel=1e-12)
