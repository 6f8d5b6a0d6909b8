"""Progressive layered extraction against its formula, written out row by row and expert by expert."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from escm2rec.models.backbone import Main
from escm2rec.models.ple import Ple

NUM_INPUTS, NUM_TASK_EXPERTS, NUM_SHARED_EXPERTS, HIDDEN = 6, 2, 3, (5, 4)
Vector = npt.NDArray[np.float64]
Weights = dict[str, Vector]


def weights(module: nn.Module) -> Weights:
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def experts(values: Weights, prefix: str, count: int, x: Vector) -> list[Vector]:
    """Each expert's output: two ReLU layers."""
    outputs = []
    for expert in range(count):
        hidden = x
        for layer in (0, 2):
            name = f"{prefix}experts.{expert}.{layer}"
            hidden = np.maximum(values[f"{name}.weight"] @ hidden + values[f"{name}.bias"], 0)
        outputs.append(hidden)
    return outputs


def mixture(values: Weights, prefix: str, x: Vector, outputs: list[Vector]) -> Vector:
    """The outputs, weighted by softmax(W x)."""
    scores = np.exp(values[f"{prefix}gate.logits.weight"] @ x)
    assert len(scores) == len(outputs)
    mixed = np.zeros_like(outputs[0])
    for score, output in zip(scores, outputs, strict=True):
        mixed += score / scores.sum() * output
    return mixed


def reference(backbone: Ple, gate: nn.Module, task: Main | None, num_levels: int, x: Vector) -> Vector:
    """What one task makes of one row, all modules of all levels spelled out."""
    below, own = weights(backbone), weights(gate)
    features: dict[str, Vector] = {"ctr": x, "cvr": x, "shared": x, "further": x}
    for level in range(num_levels):
        is_last = level == num_levels - 1
        shared = experts(below, "" if is_last else f"lower.{level}.", NUM_SHARED_EXPERTS, features["shared"])
        if task is None or is_last:
            prefix = f"levels.{level if task is None else 0}."
            name = task or "further"
            mine = experts(own, prefix, NUM_TASK_EXPERTS, features[name])
            made = mixture(own, prefix, features[name], mine + shared)
            if is_last:
                return made
            features["further"] = made
        mains = {name: experts(below, f"lower.{level}.{name}.", NUM_TASK_EXPERTS, features[name]) for name in ("ctr", "cvr")}
        mixed = {name: mixture(below, f"lower.{level}.{name}.", features[name], mains[name] + shared) for name in mains}
        features["shared"] = mixture(below, f"lower.{level}.", features["shared"], mains["ctr"] + mains["cvr"] + shared)
        features |= mixed
    raise AssertionError("there is a last level")


@pytest.mark.parametrize("num_levels", [1, 2, 3])
@pytest.mark.parametrize("task", ["ctr", "cvr", None])
def test_a_task_reads_what_the_formula_says(num_levels: int, task: Main | None) -> None:
    torch.manual_seed(0)
    backbone = Ple(NUM_INPUTS, num_levels, NUM_TASK_EXPERTS, NUM_SHARED_EXPERTS, HIDDEN).double()
    gate = backbone.gate(task).double()
    inputs = 3 * torch.randn(5, NUM_INPUTS, dtype=torch.float64)
    seen = gate(inputs, backbone(inputs)).detach().numpy()
    expected = np.stack([reference(backbone, gate, task, num_levels, row) for row in inputs.numpy()])
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(seen, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("num_levels", "width"), [(1, 3), (2, 8), (3, 11)])
def test_shared_holds_the_shared_experts_of_every_level_after_what_the_main_tasks_made(num_levels: int, width: int) -> None:
    backbone = Ple(NUM_INPUTS, num_levels, NUM_TASK_EXPERTS, NUM_SHARED_EXPERTS, HIDDEN)
    for rows in (0, 5):
        assert backbone(torch.randn(rows, NUM_INPUTS)).shape == (rows, width, backbone.num_outputs)


def test_a_further_tower_pays_for_experts_at_every_level_and_a_main_task_for_the_last() -> None:
    backbone = Ple(NUM_INPUTS, 3, NUM_TASK_EXPERTS, NUM_SHARED_EXPERTS, HIDDEN)
    assert {task: len(backbone.gate(task).levels) for task in ("ctr", "cvr", None)} == {"ctr": 1, "cvr": 1, None: 3}
