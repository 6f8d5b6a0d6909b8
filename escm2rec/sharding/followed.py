"""A plan that was made before, as `escm2rec plan` writes it: checked against the model, and followed."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.planner.utils import placement
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from escm2rec.config import ShardingKind
from escm2rec.errors import ConfigError
from escm2rec.sharding.managed import managed_in
from escm2rec.sharding.shards import table_of

AGAIN = "plan again: escm2rec plan --config CONFIG --data DATA --cluster {cluster} --out FOLDER"


def follow(path: Path, model: nn.Module, world_size: int, local_world_size: int, device: str) -> ShardingPlan:
    """The plan at `path`, a file or the folder it is in, for a model whose tables are on the meta device.

    ConfigError where it is for other tables, other ranks or another device.
    """
    record = _read(path)
    cluster = f"{world_size // local_world_size}x{local_world_size}:HARDWARE"
    hint = AGAIN.format(cluster=cluster)
    if record.world_size != world_size:
        raise ConfigError(f"the plan at {path} is for {record.world_size} rank(s), and there are {world_size}", hint)
    if (planned := record.cluster.get("device", device)) != device:
        raise ConfigError(f"the plan at {path} is for device {planned!r}, and ranks have {device!r}", hint)
    named = {table_of(f".{name}"): (name, each) for name, each in model.named_parameters() if ".embedding_bags." in f".{name}"}
    shapes = {table: tuple(each.shape) for table, (_, each) in named.items()}
    _check_tables(record, shapes, managed_in(model), device, path, hint)
    plan: dict[str, EmbeddingModuleShardingPlan] = {}
    for table, (name, _) in named.items():
        module = name.split(".embedding_bags.")[0].removesuffix("._embedding_module")
        plan.setdefault(module, EmbeddingModuleShardingPlan())[table] = _sharding(record.tables[table], local_world_size, device)
    return ShardingPlan(dict(plan))


class _Shard(BaseModel):
    model_config = ConfigDict(strict=True)

    offset: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
    size: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
    rank: int = Field(ge=0)


class _Table(BaseModel):
    model_config = ConfigDict(strict=True)

    sharding_type: ShardingKind
    compute_kernel: Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"]
    ranks: list[int]
    shards: list[_Shard]


class _Plan(BaseModel):
    """What is read of a plan: one of `escm2rec plan`, or the one that a run left."""

    model_config = ConfigDict(strict=True)

    kind: Literal["plan"] = "plan"
    version: Literal[1] = 1
    world_size: int = Field(ge=1)
    cluster: dict[str, Any] = {}
    tables: dict[str, _Table] = Field(min_length=1)


def _read(path: Path) -> _Plan:
    file = path / "plan.json" if path.is_dir() else path
    try:
        return _Plan.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"training.plan: {file} cannot be read: {error.strerror}", "give the plan.json that escm2rec plan wrote"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"training.plan: {file} holds no plan: {where}: {first['msg']}", "give one that escm2rec plan wrote") from error


def _check_tables(plan: _Plan, there: Mapping[str, tuple[int, ...]], managed: Set[str], device: str, path: Path, hint: str) -> None:
    if missing := sorted(there.keys() - plan.tables.keys()):
        raise ConfigError(f"the plan at {path} has no table {', '.join(missing)}, which the data set has", hint)
    if more := sorted(plan.tables.keys() - there.keys()):
        raise ConfigError(f"the plan at {path} has a table {', '.join(more)}, which the data set has not", hint)
    for name, (rows, columns) in there.items():
        table = plan.tables[name]
        where = f"the plan at {path}, table {name!r}"
        shards = [(shard.offset, shard.size) for shard in table.shards]
        covered = sum({tuple(offset): height * width for offset, (height, width) in shards}.values())
        is_whole = table.sharding_type == "data_parallel"  # on every rank, so that a run's plan tells no shards
        if covered != rows * columns and not (is_whole and not shards):
            raise ConfigError(f"{where}: its shards cover {covered:,} numbers, it has {rows:,} rows of {columns}", hint)
        if any(offset[0] + size[0] > rows or offset[1] + size[1] > columns for offset, size in shards):
            raise ConfigError(f"{where}: a shard ends beyond its {rows:,} rows of {columns}", hint)
        ranks = {*table.ranks, *(shard.rank for shard in table.shards)}
        if not ranks <= set(range(plan.world_size)) or (shards and [shard.rank for shard in table.shards] != table.ranks):
            raise ConfigError(f"{where}: its shards lie on ranks {sorted(ranks)}, of {plan.world_size}", hint)
        if (table.compute_kernel == "dense") != is_whole or (device == "cpu" and table.compute_kernel not in ("fused", "dense")):
            raise ConfigError(f"{where}: kernel {table.compute_kernel} does not go with {table.sharding_type} on device {device}", hint)
        if name in managed and table.sharding_type != "row_wise":
            raise ConfigError(f"{where}: it is {table.sharding_type}, and managed tables are always row_wise", hint)


def _sharding(table: _Table, local_world_size: int, device: str) -> ParameterSharding:
    spec = None  # of data_parallel, which is not cut
    if table.sharding_type != "data_parallel":
        shards = [ShardMetadata(shard.offset, shard.size, placement(device, shard.rank, local_world_size)) for shard in table.shards]
        spec = EnumerableShardingSpec(shards)
    return ParameterSharding(
        sharding_spec=spec, sharding_type=table.sharding_type, compute_kernel=table.compute_kernel, ranks=list(table.ranks)
    )
