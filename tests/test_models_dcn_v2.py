"""Deep & cross network v2 against its formulas, written out row by row, layer by layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from escm2rec.models.dcn_v2 import DcnV2

NUM_INPUTS, NUM_CROSS_LAYERS, RANK, NUM_EXPERTS = 6, 3, 2, 4
Vector = npt.NDArray[np.float64]
Weights = dict[str, Vector]


def randomised(backbone: DcnV2) -> Weights:
    """Its weights by name, drawn anew so that no bias is left at 0."""
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.double().parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return {name: parameter.detach().numpy() for name, parameter in backbone.named_parameters()}


def relu(values: Vector) -> Vector:
    return np.maximum(values, 0)


def crossed(w: Weights, layer: int, x: Vector, rank: int | None, num_experts: int) -> Vector:
    """What is multiplied by the inputs in one cross layer, [N]."""
    bias = w[f"cross.bias.{layer}"].ravel()
    if rank is None:
        made = w[f"cross.kernels.{layer}"] @ x
    elif num_experts == 1:
        made = w[f"cross.W_kernels.{layer}"] @ (w[f"cross.V_kernels.{layer}"] @ x)
    else:
        scores = np.exp([w[f"cross.gates.{expert}.weight"][0] @ x for expert in range(num_experts)])
        made = np.zeros(NUM_INPUTS)
        for expert in range(num_experts):
            u, c, v = (w[f"cross.{name}_kernels.{layer}"][expert] for name in "UCV")
            made += scores[expert] / scores.sum() * (u @ relu(c @ relu(v @ x)))
    return made + bias


@pytest.mark.parametrize(("rank", "num_experts"), [(None, 1), (RANK, 1), (RANK, NUM_EXPERTS)])
@pytest.mark.parametrize("hidden", [(), (5, 4)])
def test_layers_read_the_crosses_that_the_formula_says(rank: int | None, num_experts: int, hidden: tuple[int, ...]) -> None:
    backbone = DcnV2(NUM_INPUTS, NUM_CROSS_LAYERS, rank, num_experts, hidden)
    w = randomised(backbone)
    inputs = torch.randn(5, NUM_INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shared = backbone(inputs)
    assert shared.shape == (5, backbone.num_outputs)
    expected = []
    for row in inputs.numpy():
        x = row
        for layer in range(NUM_CROSS_LAYERS):
            x = row * crossed(w, layer, x, rank, num_experts) + x
        for layer in range(len(hidden)):
            x = relu(w[f"layers.{2 * layer}.weight"] @ x + w[f"layers.{2 * layer}.bias"])
        expected.append(x)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(shared.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(backbone.gate()(inputs, shared), shared)
