"""Tables that every rank holds whole (`data_parallel`), stepped as FBGEMM steps those that are split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.optim.keyed import KeyedOptimizer

from escm2rec.config import TrainingConfig
from escm2rec.sharding.shards import table_of
from escm2rec.training.optimizer import average

EPSILON = 1e-8  # FBGEMM's; torch's and TorchRec's Adagrad take 1e-10


class WholeTables(KeyedOptimizer):
    """Steps tables of which each rank holds all rows: after every batch, by the mean of the ranks' gradients.

    `tables` are theirs by name, alike on the ranks of `group` (None: there is one), which give them gradients in the same batches. TorchRec
    gives such tables no optimizer. The steps are those of FBGEMM for SGD and Adagrad, row-wise or not, where a row without a gradient, as
    that of an id which the global batch does not have, stays; the mean is what the gradients of split tables are scaled to as well. Adam
    moves a row that was looked up even where its gradient is 0, which is not known here: the config refuses it.

    The state has FBGEMM's names and shapes, so that a checkpoint fits any plan.
    """

    def __init__(self, tables: Mapping[str, Tensor], training: TrainingConfig, group: dist.ProcessGroup | None = None) -> None:
        self._kind, self._group, self._tables = training.sparse_optimizer, group, list(tables.values())
        state = {table: self._first_state(table_of(name), table) for name, table in tables.items()}
        super().__init__(tables, state, [{"params": self._tables, "lr": training.sparse_learning_rate}])

    def _first_state(self, name: str, table: Tensor) -> dict[str, Tensor]:
        if self._kind == "sgd":
            return {}
        shape = table.shape[:1] if self._kind == "rowwise_adagrad" else table.shape
        return {f"{name}.momentum1": torch.zeros(shape, device=table.device)}

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Drop the gradients, whatever the dense part accumulates."""
        for table in self._tables:
            table.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of each table, but after a batch that trained nothing, of which there are no gradients."""
        tables = [table for table in self._tables if table.grad is not None]
        if not tables:
            return
        gradients = [table.grad for table in tables if table.grad is not None]
        average(gradients, self._group)
        (group,) = self.param_groups
        for table, gradient in zip(tables, gradients, strict=True):
            if self._kind == "sgd":
                table.sub_(gradient, alpha=group["lr"])
                continue
            (momentum,) = self.state[table].values()
            rows = self._kind == "rowwise_adagrad"
            momentum.add_(gradient.square().mean(dim=1) if rows else gradient.square())
            scale = group["lr"] / (momentum.sqrt() + EPSILON)
            table.sub_(gradient.mul_(scale[:, None] if rows else scale))
