"""Schedules, clipping, accumulated gradients, moving averages, and the optimizers of tables, against what their definition says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from escm2rec.config import TrainingConfig
from escm2rec.training.optimizer import DenseOptimizer, rate_factor
from tests.encoded import write_dataset
from tests.ranks import run_ranks

RATE = 0.01


def training(**settings: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"dense_learning_rate": RATE, **settings})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 0.75, 0.5, 0.25]),
        ({"learning_rate_decay": "none"}, [1, 1, 1, 1]),
        ({"learning_rate_decay": "cosine"}, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ({"warmup_steps": 2}, [0.5, 1, 1, 0.5]),
        ({"warmup_steps": 3, "learning_rate_decay": "none"}, [1 / 3, 2 / 3, 1, 1]),
    ],
)
def test_learning_rates_rise_then_fall(settings: dict[str, Any], expected: list[float]) -> None:
    assert [rate_factor(step, 4, training(**settings)) for step in range(4)] == pytest.approx(expected)


def stepped(
    gradients: list[list[float]], train: list[int | None], last: int | None = None, **settings: Any
) -> tuple[list[list[float]], DenseOptimizer]:
    """The values of one parameter of two numbers after each step of these gradients, as a training loop would make them."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = DenseOptimizer({"w": parameter}, training(**settings))
    seen = []
    for place, (gradient, number) in enumerate(zip(gradients, train, strict=True)):
        optimizer.expect(number, is_last=place == last)
        optimizer.zero_grad()
        (parameter * torch.tensor(gradient)).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append(parameter.tolist())
    return seen, optimizer


def adamw(gradients: list[list[float]]) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(2))
    plain = torch.optim.AdamW([parameter], lr=RATE, weight_decay=0.0)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        plain.step()
    return parameter.tolist()


def test_a_skipped_step_is_no_part_of_the_mean_and_alone_steps_nothing() -> None:
    """Of three pairs of steps: the first one's second is skipped, both of the second one, the first of the last."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    skipped = [False, True, True, True, True, False]
    gradients: list[list[float]] = [[1.0, 2.0], [], [], [], [], [7.0, 5.0]]
    now = iter(skipped)
    optimizer = DenseOptimizer({"w": parameter}, training(gradient_accumulation_steps=2, ema_decay=0.05), None, lambda: next(now))
    seen = []
    for number, gradient in enumerate(gradients):
        optimizer.expect(number, is_last=False)
        optimizer.zero_grad()
        if gradient:
            (parameter * torch.tensor(gradient)).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append((parameter.tolist(), optimizer.state[parameter]["ema"].tolist(), optimizer.state[parameter]["step"].item()))
    assert [values for values, _, _ in seen[1::2]] == [
        pytest.approx(adamw(means)) for means in ([[1.0, 2.0]], [[1.0, 2.0]], [[1.0, 2.0], [7.0, 5.0]])
    ]
    assert seen[1] == seen[2] == seen[3], "nor are moments or average"


def test_gradients_of_several_steps_are_averaged_into_one() -> None:
    """The third is one that trains nothing and leaves no trace; the last step takes what there is, of one step alone."""
    gradients = [[1.0, 2.0], [3.0, -1.0], [9.0, 9.0], [4.0, 4.0], [0.0, 2.0], [7.0, 5.0]]
    seen, optimizer = stepped(gradients, [0, 1, None, 2, 3, 4], last=5, gradient_accumulation_steps=2)
    means = [[2.0, 0.5], [2.0, 3.0], [7.0, 5.0]]
    assert seen[0] == [0.0, 0.0]
    assert seen[1] == seen[2] == seen[3] == pytest.approx(adamw(means[:1]))
    assert seen[4] == pytest.approx(adamw(means[:2]))
    assert seen[5] == pytest.approx(adamw(means))
    assert not optimizer.holds_gradients


def test_a_step_that_waits_holds_gradients() -> None:
    """So that no checkpoint is made there."""
    _, optimizer = stepped([[1.0, 2.0]], [0], gradient_accumulation_steps=2)
    assert optimizer.holds_gradients


def test_gradients_are_clipped_to_a_norm_over_all() -> None:
    seen, optimizer = stepped([[0.3, 0.4], [3.0, 4.0]], [0, 1], clip_gradient_norm=1.0)
    assert seen[1] == pytest.approx(adamw([[0.3, 0.4], [0.6, 0.8]]))
    assert float(optimizer.gradient_norm or 0) == pytest.approx(5.0), "what it was"


def test_the_moving_average_follows_its_definition_and_comes_and_goes() -> None:
    gradients = [[1.0, -1.0]] * 30
    seen, optimizer = stepped(gradients, list(range(30)), ema_decay=0.7)
    (parameter,) = optimizer.params.values()
    expected = 0.0
    for step, value in enumerate(seen):
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value[0]
    with optimizer.averaged():
        assert parameter[0].item() == pytest.approx(expected, rel=1e-5)
    assert parameter.tolist() == seen[-1], "bit for bit"


def test_without_a_moving_average_nothing_is_swapped() -> None:
    seen, optimizer = stepped([[1.0, 1.0]], [0])
    (parameter,) = optimizer.params.values()
    with optimizer.averaged():
        assert parameter.tolist() == seen[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": 8 * 256, "validation": 500})


def test_every_optimizer_of_tables_takes_the_same_steps_under_every_plan(data: Path, tmp_path: Path) -> None:
    """On one rank and more, rows split, whole on every rank, and with split columns where the state is one an element or none.

    The dense part steps half as often, and tables do not; each optimizer takes its own steps.
    """
    settings = ["training.sparse_learning_rate=0.5", "training.warmup_steps=2", "training.gradient_accumulation_steps=2"]
    plans = {1: ["planner", "row_wise", "column_wise", "data_parallel"], 3: ["data_parallel"]}
    plans[2] = plans[1]
    losses: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for ranks in (1, 2, 3):
        calls, keys = [], []
        for kind in ("rowwise_adagrad", "adagrad", "sgd"):
            for plan in plans[ranks]:
                if (kind, plan) == ("rowwise_adagrad", "column_wise"):
                    continue
                keys.append((kind, plan, ranks))
                sharding = [] if plan == "planner" else [f"training.sharding={{'*': {plan}}}"]
                overrides = [*settings, *sharding, f"training.sparse_optimizer={kind}", "objective.kind=escm2-ips"]
                out = tmp_path / "-".join(map(str, keys[-1]))
                calls.append(("tests.training_calls:train_run", {"data": str(data), "out": str(out), "overrides": overrides}))
        for key, result in zip(keys, run_ranks(ranks, calls, tmp_path / f"ranks-{ranks}"), strict=True):
            records = (json.loads(line) for line in (Path(result["run"]) / "metrics.jsonl").read_text().splitlines())
            losses[key] = [{name: each[name] for name in each if name.startswith("loss_")} for each in records]
    assert len(losses) == 25
    for (kind, plan, ranks), seen in losses.items():
        expected = losses[(kind, "planner", 1)]
        assert len(seen) == len(expected) == 8
        for step, (each, want) in enumerate(zip(seen, expected, strict=True), 1):
            assert each == pytest.approx(want, abs=1e-5), (kind, plan, ranks, step)
    assert len({round(each[-1]["loss_ctr"], 5) for each in losses.values()}) >= 3, "three optimizers, three trainings"


def test_adam_of_tables_counts_the_steps_that_train(data: Path, tmp_path: Path) -> None:
    """FBGEMM's own count goes on by every forward pass, those of measuring too, and begins anew in a resumed run."""
    settings = ["training.evaluate_every_steps=2", "training.checkpoint_every_steps=4"]
    call: dict[str, Any] = {"data": str(data), "out": str(tmp_path / "run"), "overrides": settings}
    counts = "tests.training_calls:count_of_tables"
    cut = ("tests.training_calls:cut_off", {"run": str(tmp_path / "run"), "step": 8})
    calls = [(counts, {**call, "kind": "rowwise_adagrad"}), (counts, {**call, "kind": "adam"}), cut]
    own, ours, _, resumed = run_ranks(1, [*calls, (counts, {**call, "kind": "adam", "resume": True})], tmp_path / "ranks")
    measured = 2  # passes over the validation split, which has rows for two
    assert own == [8 + 4 * measured] * 2, "the two groups of tables count by themselves"
    assert ours == resumed == [7 + 1 + measured] * 2, "told of 7 before the last step, and measured once more after it"


def test_an_optimizer_of_gpus_is_refused_on_cores(data: Path, tmp_path: Path) -> None:
    call = {"data": str(data), "out": str(tmp_path / "run"), "overrides": ["training.sparse_optimizer=adam"]}
    (result,) = run_ranks(1, [("tests.training_calls:train_run", call)], tmp_path / "ranks")
    assert result["message"].startswith("training.sparse_optimizer: adam steps tables on a GPU alone, and this rank trains on cores")


def test_a_warm_up_longer_than_the_training_is_refused(data: Path, tmp_path: Path) -> None:
    call = {"data": str(data), "out": str(tmp_path / "run"), "overrides": ["training.warmup_steps=8"]}
    (result,) = run_ranks(1, [("tests.training_calls:train_run", call)], tmp_path / "ranks")
    assert result["message"].startswith("training.warmup_steps is 8, and the training has 8 steps")
