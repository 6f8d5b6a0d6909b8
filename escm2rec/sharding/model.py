"""The sharded model: built on the meta device, planned, sharded over the ranks and given its initial weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.optimizers import PartialRowWiseAdam
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from escm2rec.config import SparseOptimizer
from escm2rec.errors import ConfigError
from escm2rec.sharding.followed import follow
from escm2rec.sharding.initialise import initialise_tables
from escm2rec.sharding.managed import sharded_managed
from escm2rec.sharding.planner import plan_tables, sharders
from escm2rec.sharding.runtime import Runtime, on_main

logger = logging.getLogger(__name__)
OPTIMIZERS: dict[SparseOptimizer, tuple[type[torch.optim.Optimizer], bool]] = {
    "rowwise_adagrad": (RowWiseAdagrad, True),
    "adagrad": (torch.optim.Adagrad, True),
    "sgd": (torch.optim.SGD, True),
    "adam": (torch.optim.Adam, False),
    "rowwise_adam": (PartialRowWiseAdam, False),
}
"""Of each: what TorchRec turns into FBGEMM's fused one, and whether that runs on a CPU too."""


# Gradients of a mean over B impressions are as small as 1 / B: float16 would make them 0.
HALF_BYTES = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.BF16)


@dataclass(frozen=True)
class ShardedModel:
    """A model sharded over the ranks, and the plan it follows."""

    module: DistributedModelParallel
    plan: ShardingPlan


def shard_model(
    module: nn.Module,
    tables: list[str],
    runtime: Runtime,
    *,
    seed: int,
    init_std: float,
    optimizer: SparseOptimizer,
    learning_rate: float,
    local_batch_size: int,
    forced: Mapping[str, str],
    in_bfloat16: bool,
    in_half_bytes: bool = False,
    followed: Path | None = None,
) -> ShardedModel:
    """Shard `module`, whose tables are on the meta device and whose dense part is alike on all ranks.

    Tables take `optimizer` inside the backward pass, but for `whole_tables`, which take none here; ConfigError where this device has none
    such. `in_bfloat16` says that tables on a GPU hand on what they pool in bfloat16, and are handed gradients in it (they add in float32);
    FBGEMM's tables on a CPU cannot. With `in_half_bytes` ranks send each other 16 bits for a number. `followed` is a plan that was made
    before; else one is made here, with sharding types `forced`.
    """
    embeddings = [parameter for name, parameter in module.named_parameters() if ".embedding_bags." in name]
    kind, on_cpu = OPTIMIZERS[optimizer]
    if runtime.device.type == "cpu" and not on_cpu:
        raise ConfigError(
            f"training.sparse_optimizer: {optimizer} steps tables on a GPU alone, and this rank trains on cores",
            "choose rowwise_adagrad, adagrad or sgd",
        )
    apply_optimizer_in_backward(kind, embeddings, {"lr": learning_rate})
    in_bfloat16 = in_bfloat16 and runtime.device.type == "cuda"
    ranks = runtime.world_size, runtime.local_world_size, runtime.device.type

    def plan_them() -> ShardingPlan:
        if followed is not None:
            plan = follow(followed, module, *ranks)
            logger.info("tables are sharded as the plan at %s says", followed)
            return plan
        return plan_tables(module, tables, forced, *ranks, runtime.memory_bytes(), max(1, local_batch_size), in_bfloat16)

    plan = on_main(runtime, plan_them)
    sharded = DistributedModelParallel(
        module,
        env=ShardingEnv.from_process_group(runtime.group),
        device=runtime.device,
        plan=plan,
        sharders=sharders(in_bfloat16, HALF_BYTES if in_half_bytes else None),
        init_data_parallel=False,  # what is no table is each rank's own: `DenseOptimizer` averages its gradients
    )
    _unwrap(sharded)
    sharded.module.to(runtime.device)
    initialise_tables(sharded, seed, init_std)
    for managed in sharded_managed(sharded):
        managed.begin = seed, init_std
    return ShardedModel(sharded, plan)


def _unwrap(sharded: DistributedModelParallel) -> None:
    """Free the tables that every rank holds whole of DistributedDataParallel: `WholeTables` averages their gradients."""
    for module in sharded.modules():
        if isinstance(module, ShardedEmbeddingBagCollection):
            lookups = module._lookups
            module._lookups = [each.module if isinstance(each, DistributedDataParallel) else each for each in lookups]


def whole_tables(sharded: ShardedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters of the tables that every rank holds whole."""
    names = {
        f"{path}.embedding_bags.{table}.weight"
        for path, module in sharded.plan.plan.items()
        for table, planned in module.items()
        if planned.sharding_type == "data_parallel"
    }
    return {name: parameter for name, parameter in sharded.module.named_parameters() if name in names}


def dense_parameters(module: nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that a dense optimizer steps: all but the tables."""
    return {name: parameter for name, parameter in module.named_parameters() if ".embedding_bags." not in name}
