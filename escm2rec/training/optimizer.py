"""How parameters are stepped: fused tables inside the backward pass, everything else but tables by AdamW, both by one schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from escm2rec.config import SparseOptimizer, TrainingConfig
from escm2rec.sharding.model import dense_parameters
from escm2rec.training.checkpoint import load_into

EMA_WARM_UP = 10  # the first averages follow the weights at once: of t steps they forget as many as 9 / (t + 10) says


class DenseOptimizer(KeyedOptimizerWrapper):
    """AdamW for what is no table: after every so many steps, by the mean of their gradients, clipped, with a moving average kept.

    The mean is over the ranks of `group` too (None: there is one), whose parameters are alike: their gradients are summed in one buffer, in
    the order of the parameters. DistributedDataParallel lays its buffers out anew after the first step; which rank is added first depends
    on the place in a buffer, so of three ranks or more a resumed training would not be the undisturbed one.

    A step that `is_skipped` when its gradients would be there has none: the mean is of the others, and of none nothing is stepped.

    The state is made now, as AdamW's first step would: lazily made, it could not be restored before that step, and a tower not yet
    stepped would have none to save. The average, `ema`, is part of it.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        training: TrainingConfig,
        group: dist.ProcessGroup | None = None,
        is_skipped: Callable[[], bool] = lambda: False,
    ) -> None:
        rate, decay = training.dense_learning_rate, training.dense_weight_decay
        self._parameters = list(parameters.values())
        # Fused: one kernel for all of them on a GPU, one pass on a CPU.
        super().__init__(parameters, lambda each: torch.optim.AdamW(each, lr=rate, weight_decay=decay, fused=True))
        self._training = training
        self._trains, self._completes, self._done = True, True, 0
        self._group = group
        self._is_skipped, self._summed = is_skipped, 0  # how many steps the gradients are of
        self.gradient_norm: Tensor | None = None  # before the last step clipped it
        self.holds_gradients = False  # that wait for those of the next steps: a checkpoint would lose them
        for parameter in self._parameters:
            self.state[parameter] = {
                "step": torch.tensor(0.0, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            if training.ema_decay is not None:
                self.state[parameter]["ema"] = parameter.detach().clone()

    def expect(self, trained: int | None, is_last: bool) -> None:
        """Say which of the steps that train comes next, 0, 1, ..., and whether it is the last; None for one that trains nothing."""
        self._trains = trained is not None
        if trained is not None:
            self._done, place = divmod(trained, self._training.gradient_accumulation_steps)
            self._completes = is_last or place == self._training.gradient_accumulation_steps - 1

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Drop the gradients, unless those of the next step are to be added to them."""
        if not self.holds_gradients:
            super().zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of AdamW, where the gradients for it are complete."""
        if not self._trains:
            return
        self._summed += not self._is_skipped()
        self.holds_gradients = not self._completes
        if self.holds_gradients:
            return
        summed, self._summed = self._summed, 0
        if not summed:
            return
        average([parameter.grad for parameter in self._parameters if parameter.grad is not None], self._group, summed)
        if self._training.clip_gradient_norm is not None:
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._training.clip_gradient_norm)
        super().step(closure)
        if self._training.ema_decay is not None:
            decay = min(self._training.ema_decay, (1 + self._done) / (EMA_WARM_UP + self._done))
            torch._foreach_lerp_([self.state[each]["ema"] for each in self._parameters], self._parameters, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the parameters are their moving averages, where the config asks for them."""
        if self._training.ema_decay is None:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self._set([self.state[parameter]["ema"] for parameter in self._parameters])
        try:
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self._parameters, values)


def average(gradients: list[Tensor], group: dist.ProcessGroup | None, summed: int = 1) -> None:
    """Sums of so many steps' gradients to their mean over steps and ranks, in place; ranks have them of the same parameters."""
    ranks = 1 if group is None else dist.get_world_size(group)
    if ranks > 1:
        buffer = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(buffer, group=group)
        parts = torch.split(buffer, [gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])
    if ranks * summed > 1:
        torch._foreach_div_(gradients, ranks * summed)


class TableSteps:
    """Tells tables that step by Adam how many steps they did: FBGEMM counts every forward pass, those that only predict too.

    Its count, which corrects Adam's first moments, is in no checkpoint of TorchRec's.
    """

    def __init__(self, module: DistributedModelParallel, kind: SparseOptimizer) -> None:
        self._tables: list[SplitTableBatchedEmbeddingBagsCodegen] = []
        if kind in ("adam", "rowwise_adam"):
            lookups = (lookup for each in module.modules() for lookup in getattr(each, "_lookups", ()))
            kernels = (kernel for lookup in lookups for kernel in lookup.modules())
            self._tables = [kernel for kernel in kernels if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen)]

    def expect(self, done: int) -> None:
        """Say how many steps tables did before the next one."""
        for table in self._tables:
            table.iter_cpu.fill_(done)
            table.iter.fill_(done)


def combined_optimizer(module: DistributedModelParallel, whole: KeyedOptimizer, dense: DenseOptimizer) -> CombinedOptimizer:
    """The optimizer of all of a sharded model; `whole` is of the tables that are not fused, named as the others."""
    return CombinedOptimizer([("tables", module.fused_optimizer), ("tables", whole), ("dense", dense)])


def load_averages(folder: Path, module: DistributedModelParallel) -> None:
    """Give a model the moving averages of its dense part, from a checkpoint that has them; DataError as in `load_checkpoint`."""
    load_into({"optimizer": {"state": {f"dense.{name}": {"ema": each} for name, each in dense_parameters(module).items()}}}, folder)


def rate_factor(step: int, total: int, training: TrainingConfig) -> float:
    """What the learning rates of step 0, 1, ... of `total` are multiplied by, in (0, 1].

    With W = `warmup_steps` it rises as (step + 1) / W, then falls with p = (step - W) / (total - W) as 1 - p (linear), as
    (1 + cos(pi p)) / 2 (cosine), or stays.
    """
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / (total - training.warmup_steps)
    if training.learning_rate_decay == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - progress if training.learning_rate_decay == "linear" else 1.0
