"""Progressive layered extraction: shared experts and each task's own, level upon level (Tang et al., RecSys 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from escm2rec.models.backbone import Backbone, Experts, Gate, Main, SoftmaxGate


class Ple(Backbone):
    """The shared experts of all levels, and below the last level the two main tasks' experts, which feed them.

    Expert module k (ctr, cvr or shared; m_k experts) reads at level j what its gate made of the level below, and at level 1 the inputs x:

        g_{k,j} = sum_e softmax(W_{k,j} g_{k,j-1})_e S_{k,j,e},    g_{k,0} = x

    with S_{k,j} the outputs of the task's own and the shared experts of level j, and for k = shared of the ctr, cvr and shared ones (not at
    the last level, where nothing would read it). A task's features are its g at the last level.

    What only one task reads is its gate's: the main tasks' experts of the last level, and all experts of a further tower, which reads
    the shared ones and feeds none. (The main tasks' W of the level below the last are here all the same: a further tower's loss, where it
    may reach shared, gives them a gradient of zero.) Every expert has the widths `hidden`, so that shared is one tensor, with S shared
    experts a level:

        shared [B, L S, num_outputs] of L = 1 levels, [B, 2 + L S, num_outputs] of more: g_{ctr,L-1}, g_{cvr,L-1}, then level by level
    """

    def __init__(self, num_inputs: int, num_levels: int, num_task_experts: int, num_shared_experts: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.num_task_experts = num_task_experts
        self.hidden = tuple(hidden)
        self.num_outputs = (num_inputs, *hidden)[-1]
        self.level_inputs = (num_inputs, *[self.num_outputs] * (num_levels - 1))
        *lower, last = self.level_inputs
        self.lower = nn.ModuleList(ExtractionLevel(width, num_task_experts, num_shared_experts, hidden) for width in lower)
        self.experts = Experts(last, num_shared_experts, hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, num_inputs] -> [B, L S or 2 + L S, num_outputs]."""
        ctr = cvr = shared = inputs
        outputs: list[Tensor] = []
        for level in self.lower:
            experts, ctr, cvr, shared = level(ctr, cvr, shared)
            outputs.append(experts)
        outputs.append(self.experts(shared))
        return torch.cat([ctr.unsqueeze(1), cvr.unsqueeze(1), *outputs] if len(self.lower) else outputs, dim=1)

    def gate(self, main: Main | None = None) -> ExtractionGate:
        """A new gate with experts of its own: at the last level for a main task, at all levels for a further tower."""
        start = ("ctr", "cvr").index(main) if main is not None and len(self.lower) else None
        widths = self.level_inputs if start is None else self.level_inputs[-1:]
        return ExtractionGate(widths, self.num_task_experts, len(self.experts), self.hidden, start)


class ExtractionLevel(nn.Module):
    """A level below the last: its shared experts, the main tasks' parts, and a gate over all of their experts."""

    def __init__(self, num_inputs: int, num_task_experts: int, num_shared_experts: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.experts = Experts(num_inputs, num_shared_experts, hidden)
        self.ctr = TaskExtraction(num_inputs, num_task_experts, num_shared_experts, hidden)
        self.cvr = TaskExtraction(num_inputs, num_task_experts, num_shared_experts, hidden)
        self.gate = SoftmaxGate(num_inputs, 2 * num_task_experts + num_shared_experts)

    def forward(self, ctr: Tensor, cvr: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Each module's [B, num_inputs] -> shared experts [B, S, D], and what ctr, cvr and the shared experts read next, [B, D] each."""
        experts = self.experts(shared)
        ctr_experts, next_ctr = self.ctr(ctr, experts)
        cvr_experts, next_cvr = self.cvr(cvr, experts)
        return experts, next_ctr, next_cvr, self.gate(shared, torch.cat([ctr_experts, cvr_experts, experts], dim=1))


class TaskExtraction(nn.Module):
    """One task's part of one level: experts of its own, and a gate that mixes them with the shared ones."""

    def __init__(self, num_inputs: int, num_task_experts: int, num_shared_experts: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.experts = Experts(num_inputs, num_task_experts, hidden)
        self.gate = SoftmaxGate(num_inputs, num_task_experts + num_shared_experts)

    def forward(self, features: Tensor, shared_experts: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, num_inputs], shared_experts [B, S, D]) -> own experts [B, E, D], and the mixture of both [B, D]."""
        experts = self.experts(features)
        return experts, self.gate(features, torch.cat([experts, shared_experts], dim=1))


class ExtractionGate(Gate):
    """A task's own way through the last `len(level_inputs)` levels, from the inputs or, with `start`, from shared[:, start]."""

    def __init__(
        self, level_inputs: Sequence[int], num_task_experts: int, num_shared_experts: int, hidden: Sequence[int], start: int | None
    ) -> None:
        super().__init__()
        self.num_shared_experts = num_shared_experts
        self.start = start
        self.levels = nn.ModuleList(TaskExtraction(width, num_task_experts, num_shared_experts, hidden) for width in level_inputs)

    def forward(self, inputs: Tensor, shared: Tensor) -> Tensor:
        """(inputs [B, num_inputs], shared as Ple gives it) -> [B, D]."""
        features = inputs if self.start is None else shared[:, self.start]
        # The shared experts of the last level are the last of shared, those of the level below stand before them, and so on.
        first = shared.shape[1] - len(self.levels) * self.num_shared_experts
        for position, level in enumerate(self.levels):
            begin = first + position * self.num_shared_experts
            _, features = level(features, shared[:, begin : begin + self.num_shared_experts])
        return features
