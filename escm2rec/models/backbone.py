"""What stands between the inputs and the towers: what every backbone is, a shared bottom, and a mixture of experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from escm2rec.models.tower import relu_layers

Main = Literal["ctr", "cvr"]


class Gate(nn.Module, ABC):
    """What one task makes of the backbone: (inputs [B, num_inputs], shared as its backbone gives it) -> [B, backbone.num_outputs]."""

    @abstractmethod
    def forward(self, inputs: Tensor, shared: Tensor) -> Tensor:
        """-> features of the task, [B, backbone.num_outputs]."""


class Backbone(nn.Module, ABC):
    """Maps inputs to what all tasks share, one tensor, and makes for each task a gate of its own that reads it.

        shared = backbone(inputs)           the same for all tasks
        features = gate(inputs, shared)     for one task; gate = backbone.gate("ctr"), .gate("cvr"), or .gate() for a further tower

    A gate belongs to its task, not to the backbone: so the imputation tower can have one that no other loss trains. Nothing in the backbone
    depends on which further towers there are.
    """

    num_outputs: int

    @abstractmethod
    def gate(self, main: Main | None = None) -> Gate:
        """A new gate, for one of the two main tasks or for a further tower."""


class SharedBottom(Backbone):
    """One network under all towers: inputs [B, num_inputs] -> shared [B, num_outputs]; without `hidden`, the inputs themselves."""

    def __init__(self, num_inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.num_outputs = (num_inputs, *hidden)[-1]
        self.layers = relu_layers(num_inputs, hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, num_inputs] -> [B, num_outputs]."""
        shared: Tensor = self.layers(inputs)
        return shared

    def gate(self, main: Main | None = None) -> OpenGate:
        """A new gate, which lets everything through."""
        return OpenGate()


class Mmoe(Backbone):
    """Experts of a multi-gate mixture (Ma et al., KDD 2018): inputs [B, num_inputs] -> shared [B, E, num_outputs]."""

    def __init__(self, num_inputs: int, num_experts: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.num_outputs = (num_inputs, *hidden)[-1]
        self.experts = Experts(num_inputs, num_experts, hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, num_inputs] -> [B, E, num_outputs]."""
        shared: Tensor = self.experts(inputs)
        return shared

    def gate(self, main: Main | None = None) -> SoftmaxGate:
        """A new gate for one task."""
        return SoftmaxGate(self.num_inputs, len(self.experts))


class Experts(nn.ModuleList):
    """E networks of the same shape, side by side: [B, num_inputs] -> [B, E, D]."""

    def __init__(self, num_inputs: int, num_experts: int, hidden: Sequence[int]) -> None:
        super().__init__(relu_layers(num_inputs, hidden) for _ in range(num_experts))

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, num_inputs] -> [B, E, D]."""
        return torch.stack([expert(inputs) for expert in self], dim=1)


class OpenGate(Gate):
    """Every task reads the same: (inputs, shared [B, D]) -> shared."""

    def forward(self, inputs: Tensor, shared: Tensor) -> Tensor:
        """-> shared, as it is."""
        return shared


class SoftmaxGate(Gate):
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
