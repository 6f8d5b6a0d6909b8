"""What stands between the inputs and the towers: a shared bottom, or a mixture of experts.

A backbone maps inputs to what all tasks share, and makes for each task a gate of its own that reads it:

    shared = backbone(inputs)                   the same for all tasks
    features = gate(inputs, shared)             [B, backbone.num_outputs], for one task; gate = backbone.gate()

A gate belongs to its task, not to the backbone: so the imputation tower can have one that no other loss trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from escm2rec.models.tower import relu_layers


class SharedBottom(nn.Module):
    """One network under all towers: inputs [B, num_inputs] -> shared [B, num_outputs]; without `hidden`, the inputs themselves."""

    def __init__(self, num_inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.num_outputs = (num_inputs, *hidden)[-1]
        self.layers = relu_layers(num_inputs, hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, num_inputs] -> [B, num_outputs]."""
        shared: Tensor = self.layers(inputs)
        return shared

    def gate(self) -> OpenGate:
        """A new gate, which lets everything through."""
        return OpenGate()


class Mmoe(nn.Module):
    """Experts of a multi-gate mixture (Ma et al., KDD 2018): inputs [B, num_inputs] -> shared [B, E, num_outputs]."""

    def __init__(self, num_inputs: int, num_experts: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.num_outputs = (num_inputs, *hidden)[-1]
        self.experts = nn.ModuleList(relu_layers(num_inputs, hidden) for _ in range(num_experts))

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, num_inputs] -> [B, E, num_outputs]."""
        return torch.stack([expert(inputs) for expert in self.experts], dim=1)

    def gate(self) -> SoftmaxGate:
        """A new gate for one task."""
        return SoftmaxGate(self.num_inputs, len(self.experts))


class OpenGate(nn.Module):
    """Every task reads the same: (inputs, shared [B, D]) -> shared."""

    def forward(self, inputs: Tensor, shared: Tensor) -> Tensor:
        """-> shared, as it is."""
        return shared


class SoftmaxGate(nn.Module):
    """A task's mixture of experts: (inputs [B, num_inputs], shared [B, E, D]) -> sum_e g_e shared_e, [B, D], g = softmax(W inputs)."""

    def __init__(self, num_inputs: int, num_experts: int) -> None:
        super().__init__()
        self.logits = nn.Linear(num_inputs, num_experts, bias=False)

    def shares(self, inputs: Tensor) -> Tensor:
        """g: [B, num_inputs] -> [B, E]; each row sums to 1."""
        return torch.softmax(self.logits(inputs), dim=-1)

    def forward(self, inputs: Tensor, shared: Tensor) -> Tensor:
        """-> [B, D]."""
        return (self.shares(inputs).unsqueeze(-1) * shared).sum(dim=1)


Backbone = SharedBottom | Mmoe
Gate = OpenGate | SoftmaxGate
