"""A plan that was made before, as `escm2rec plan` writes it: checked against the model, and followed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torchrec.distributed.planner.utils import placement
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from escm2rec.errors import ConfigError
from escm2rec.sharding.shards import table_of

AGAIN = "plan again: escm2rec plan --config CONFIG --data DATA --cluster {cluster} --out FOLDER"


def follow(path: Path, model: nn.Module, world_size: int, local_world_size: int, device: str) -> ShardingPlan:
    """The plan at `path`, a file or the folder it is in, for a model whose tables are on the meta device.

    ConfigError where it is for other tables, other ranks or another device.
    """
    record = _read(path)
    cluster = f"{world_size // local_world_size}x{local_world_size}:HARDWARE"
    if record["world_size"] != world_size:
        raise ConfigError(
            f"the plan at {path} is for {record['world_size']} ranks, and there are {world_size}", AGAIN.format(cluster=cluster)
        )
    if record.get("cluster", {}).get("device", device) != device:
        raise ConfigError(
            f"the plan at {path} is for device {record['cluster']['device']!r}, and ranks have {device!r}", AGAIN.format(cluster=cluster)
        )
    named = {table_of(f".{name}"): (name, each) for name, each in model.named_parameters() if ".embedding_bags." in f".{name}"}
    _check_tables(record["tables"], {table: tuple(each.shape) for table, (_, each) in named.items()}, path, AGAIN.format(cluster=cluster))
    plan: dict[str, EmbeddingModuleShardingPlan] = {}
    for table, (name, _) in named.items():
        module = name.split(".embedding_bags.")[0].removesuffix("._embedding_module")
        plan.setdefault(module, EmbeddingModuleShardingPlan())[table] = _sharding(record["tables"][table], local_world_size, device)
    return ShardingPlan(dict(plan))


def _read(path: Path) -> dict[str, Any]:
    file = path / "plan.json" if path.is_dir() else path
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        sharded = {
            name: [(shard["rank"], shard["size"], shard["offset"]) for shard in table["shards"]] for name, table in record["tables"].items()
        }
        assert sharded
        assert isinstance(record["world_size"], int)
    except (OSError, ValueError) as error:
        raise ConfigError(f"training.plan: {file} cannot be read: {error}", "give the plan.json that escm2rec plan wrote") from error
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(f"training.plan: {file} holds no plan", "give the plan.json that escm2rec plan wrote") from error
    return record


def _check_tables(planned: Mapping[str, Any], there: Mapping[str, tuple[int, ...]], path: Path, hint: str) -> None:
    if missing := sorted(there.keys() - planned.keys()):
        raise ConfigError(f"the plan at {path} has no table {', '.join(missing)}, which the data set has", hint)
    if more := sorted(planned.keys() - there.keys()):
        raise ConfigError(f"the plan at {path} has a table {', '.join(more)}, which the data set has not", hint)
    for table, shape in there.items():
        shards = planned[table]["shards"]
        covered = sum({tuple(shard["offset"]): shard["size"][0] * shard["size"][1] for shard in shards}.values())
        is_whole = planned[table]["sharding_type"] == "data_parallel"  # on every rank, so a run's plan tells no shards
        if covered != shape[0] * shape[1] and not (is_whole and not shards):
            raise ConfigError(
                f"the plan at {path} covers {covered:,} numbers of table {table!r}, which has {shape[0]:,} rows of {shape[1]}", hint
            )


def _sharding(table: Mapping[str, Any], local_world_size: int, device: str) -> ParameterSharding:
    spec = None  # of data_parallel, which is not cut
    if table["sharding_type"] != "data_parallel":
        shards = [
            ShardMetadata(list(shard["offset"]), list(shard["size"]), placement(device, shard["rank"], local_world_size))
            for shard in table["shards"]
        ]
        spec = EnumerableShardingSpec(shards)
    return ParameterSharding(
        sharding_spec=spec, sharding_type=table["sharding_type"], compute_kernel=table["compute_kernel"], ranks=list(table["ranks"])
    )
