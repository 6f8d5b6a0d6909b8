"""Fully connected ReLU layers, and a tower of them that ends in one logit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.fx
from torch import Tensor, nn


def relu_layers(num_inputs: int, hidden: Sequence[int]) -> nn.Sequential:
    """Linear layers of the widths `hidden`, each followed by ReLU: [B, num_inputs] -> [B, hidden[-1]]; no widths is the identity."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise((num_inputs, *hidden)):
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
    return nn.Sequential(*layers)


@torch.fx.wrap  # a trace would not hold the context
def exact_linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer in the precision of its weights, under autocast too."""
    with torch.autocast(inputs.device.type, enabled=False):
        return nn.functional.linear(inputs.to(weight.dtype), weight, bias)


class Tower(nn.Module):
    """ReLU layers and a linear one to a single logit: [B, num_inputs] -> [B].

    The last one is in the precision of its weights under autocast too: bfloat16 tells logits of -5 apart by 0.03, rates by 3%.
    """

    def __init__(self, num_inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.layers = relu_layers(num_inputs, hidden)
        self.output = nn.Linear((num_inputs, *hidden)[-1], 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, num_inputs] -> logits [B]."""
        hidden: Tensor = self.layers(inputs)
        return exact_linear(hidden, self.output.weight, self.output.bias).squeeze(-1)

    @torch.no_grad()
    def set_base_rate(self, rate: float) -> None:
        """Set the output bias to logit(rate), so that training starts near the base rate instead of at 0.5."""
        if not 0 < rate < 1:
            raise ValueError(f"a base rate must be above 0 and below 1, is {rate:g}")
        self.output.bias.fill_(math.log(rate) - math.log1p(-rate))
