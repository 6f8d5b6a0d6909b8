"""Where every table lives: TorchRec's planner, with sharding types forced by the config where it asks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fbgemm_gpu.split_embedding_configs import SparseType
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.constants import MIN_CW_DIM
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ModuleSharder, ShardingPlan

from escm2rec.errors import ConfigError, RunError
from escm2rec.sharding.managed import ManagedSharder, managed_in
from escm2rec.sharding.shards import table_of

logger = logging.getLogger(__name__)
VALUE_BYTES = 24  # a row of a managed table: its value, its place, and when it was met last
ALL_TYPES = ["table_wise", "column_wise", "table_column_wise", "row_wise", "table_row_wise", "grid_shard", "data_parallel"]
BY_COLUMNS = ("column_wise", "table_column_wise", "grid_shard")
# Types that split columns are only taken when asked for: row-wise Adagrad then keeps a state per column shard, which is another optimizer,
# so the result would depend on the number of ranks.
DEFAULT_TYPES = {"cpu": ["table_wise"], "cuda": ["table_wise", "row_wise", "table_row_wise"]}


class RowWiseSharder(EmbeddingBagCollectionSharder):
    """Opens the row-wise types on CPU too, where TorchRec runs them but does not offer them.

    Opened for every table the planner would take row_wise everywhere, at half the speed: constraints close it for tables that did not ask.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """All sharding types, whatever the device."""
        return ALL_TYPES


def sharders(in_bfloat16: bool = False, sends: QCommsConfig | None = None) -> list[ModuleSharder[nn.Module]]:
    """The sharders of an escm2rec model, whose tables hand on float32 or bfloat16, and send that or what `sends` says."""
    codecs = None if sends is None else get_qcomm_codecs_registry(sends)
    tables = RowWiseSharder({"output_dtype": SparseType.BF16} if in_bfloat16 else None, codecs)
    return [tables, ManagedSharder(tables)]


def plan_tables(
    model: nn.Module,
    tables: list[str],
    forced: Mapping[str, str],
    world_size: int,
    local_world_size: int,
    device: str,
    memory_bytes: int,
    local_batch_size: int,
    in_bfloat16: bool = False,
) -> ShardingPlan:
    """The sharding plan of a model whose tables are on the meta device.

    `forced` gives a sharding type per table, '*' for all but managed ones, which are always cut by rows; `memory_bytes` is what each rank
    has. Raises RunError when no plan fits, ConfigError when a rank has no row of a managed table for values. A table of data_parallel is to
    fit on each rank, with its optimizer's state, and twice more for gradients.
    """
    managed = managed_in(model)
    forced = {**forced, **dict.fromkeys(managed, "row_wise")}
    constraints = {
        table: ParameterConstraints(sharding_types=_types(table, forced, device), compute_kernels=_kernels(table, forced))
        for table in tables
    }
    named = {table_of(f".{name}"): each for name, each in model.named_parameters() if ".embedding_bags." in f".{name}"}
    weights = {table: each.numel() * 4 for table, each in named.items()}
    whole = sum(size for table, size in weights.items() if _forced(table, forced) == "data_parallel")
    values = sum(VALUE_BYTES * -(-len(named[table]) // world_size) for table in managed)
    # Beside the gradients of tables on every rank, the buffer that these are summed in, and values: the planner counts none of them.
    room = max(0, memory_bytes - 2 * whole - values)
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=world_size,
            local_world_size=local_world_size,
            compute_device=device,
            hbm_cap=room if device == "cuda" else None,
            ddr_cap=room if device == "cpu" else None,
        ),
        batch_size=local_batch_size,
        constraints=constraints,
    )
    try:
        plan = planner.plan(model, sharders(in_bfloat16))
    except PlannerError as error:
        on_every_rank = f", {whole / 2**30:,.1f} of them on every rank, with twice as much for gradients (data_parallel)" if whole else ""
        raise RunError(
            f"no sharding plan fits {world_size} rank(s) of {memory_bytes / 2**30:.1f} GiB each: "
            f"the weights of the tables alone take {sum(weights.values()) / 2**30:,.1f} GiB{on_every_rank}",
            "use more ranks, smaller tables (max_size, hash_size, managed_size, model.embedding_dim) or other training.sharding",
        ) from error
    _refuse_few_rows(plan_as_json(plan)["tables"], managed)
    return plan


def _refuse_few_rows(tables: dict[str, Any], managed: set[str]) -> None:
    """ConfigError when a plan leaves a rank no row of a managed table for values: the last of a rank's is for those without one."""
    for table in sorted(managed):
        shards = tables[table]["shards"]
        rows, rank = min((shard["size"][0], shard["rank"]) for shard in shards)
        if rows < 2:
            raise ConfigError(
                f"the {sum(shard['size'][0] for shard in shards)} rows (managed_size) of table {table!r}, cut over {len(shards)} ranks, "
                f"leave rank {rank} {rows}, and it needs 2: one is for values that have none",
                "use fewer ranks, or give it a larger managed_size and preprocess again",
            )


def refuse_empty_shards(tables: dict[str, Any]) -> None:
    """ConfigError when a plan, as `plan_as_json` gives it, leaves a rank no row of a table that it cuts by rows.

    FBGEMM's tables on cores can predict so, and not be trained.
    """
    for table, planned in tables.items():
        empty = [shard["rank"] for shard in planned["shards"] if shard["size"][0] == 0]
        if empty:
            rows = sum(shard["size"][0] for shard in planned["shards"] if shard["offset"][1] == 0)
            cut = f"{planned['sharding_type']} cuts the {rows} rows of table {table!r} over {len(planned['ranks'])} ranks"
            raise ConfigError(
                f"training.sharding: {cut} and leaves rank {empty[0]} none, which cannot be trained on cores",
                f"name another type for it, such as {{{table}: table_wise}}, or use fewer ranks",
            )


def warn_of_uncut_columns(tables: dict[str, Any]) -> None:
    """Tell, once, of the tables of such a plan that are to be split by columns and lie in one piece (by rows, in pieces of all columns)."""
    uncut = {
        table: planned["sharding_type"]
        for table, planned in tables.items()
        if planned["sharding_type"] in BY_COLUMNS and len({shard["offset"][1] for shard in planned["shards"]}) == 1
    }
    if uncut:
        logger.warning(
            "training.sharding: %s keeps all columns of %s together: TorchRec makes no piece of less than %d columns, so only a table of "
            "twice as many or more (model.embedding_dim) is split by them",
            ", ".join(sorted(set(uncut.values()))),
            ", ".join(sorted(uncut)),
            MIN_CW_DIM,
        )


def plan_as_json(plan: ShardingPlan) -> dict[str, Any]:
    """A plan for people and for `plan.json`: per table its sharding type, kernel, ranks and shards."""
    tables: dict[str, Any] = {}
    for module in plan.plan.values():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        for table, sharding in module.items():
            shards = sharding.sharding_spec.shards if sharding.sharding_spec is not None else []
            tables[table] = {
                "sharding_type": sharding.sharding_type,
                "compute_kernel": sharding.compute_kernel,
                "ranks": sharding.ranks,
                "shards": [{"offset": list(s.shard_offsets), "size": list(s.shard_sizes), "rank": s.placement.rank()} for s in shards],
            }
    return {"tables": dict(sorted(tables.items()))}


def _types(table: str, forced: Mapping[str, str], device: str) -> list[str]:
    kind = _forced(table, forced)
    return DEFAULT_TYPES[device] if kind is None else [kind]


def _kernels(table: str, forced: Mapping[str, str]) -> list[str]:
    kernel = EmbeddingComputeKernel.DENSE if _forced(table, forced) == "data_parallel" else EmbeddingComputeKernel.FUSED
    return [kernel.value]


def _forced(table: str, forced: Mapping[str, str]) -> str | None:
    return forced.get(table, forced.get("*"))
