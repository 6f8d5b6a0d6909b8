"""`plan.json`: where every shard lies, what that is estimated to cost, and all that it was planned from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.planner.types import Shard, ShardingOption

from escm2rec.errors import DataError
from escm2rec.planning.cluster import Cluster
from escm2rec.planning.options import Floats, perf_of, storage_of
from escm2rec.planning.planner import KERNELS, Planned, Request
from escm2rec.planning.tables import Table
from escm2rec.sharding.planner import ALL_TYPES

Record = dict[str, Any]
PLAN_VERSION = 1
KEYS = {"world_size", "cluster", "batch_size", "optimizer", "dense_bytes", "planner", "allowed", "kernels", "estimate", "ranks", "tables"}
MS_AN_HOUR = 3_600_000
TIMES = {
    "lookup": "fwd_compute",
    "forward_communication": "fwd_comms",
    "backward": "bwd_compute",
    "backward_communication": "bwd_comms",
    "prefetch": "prefetch_compute",
}
"""Parts of a step, ms, and what TorchRec's estimate of a shard calls them."""
MEMORY = ("weights", "optimizer", "cache", "activations", "dense", "batches", "reserved")
"""Parts of a rank's memory, bytes: dense is what is no table, batches those that are read ahead, reserved what a GPU is left."""


def record_of(planned: Planned) -> Record:
    """The plan as JSON; `planned` has one."""
    request, chosen = planned.request, planned.chosen
    assert chosen is not None
    cluster, ranks = request.cluster, request.cluster.world_size
    times = {part: np.zeros(ranks) for part in TIMES}
    device, host = ({part: np.zeros(ranks) for part in MEMORY} for _ in range(2))
    for option in chosen:
        table = planned.tables[option.name]
        for shard in option.shards:
            assert shard.rank is not None
            for part, name in TIMES.items():
                times[part][shard.rank] += getattr(shard.perf, name)
            for memory, parts in zip((device, host), _shard_bytes(shard, option, table, request), strict=True):
                for part, size in parts.items():
                    memory[part][shard.rank] += size
    own = host if cluster.hardware.device == "cpu" else device
    for part, size in request.beside_shards.items():
        own[part] += size
    ms, taken = np.sum(list(times.values()), axis=0), np.sum(list(own.values()), axis=0)
    return {
        "kind": "plan",
        "version": PLAN_VERSION,
        "world_size": ranks,
        "cluster": cluster.as_json(),
        "batch_size": request.batch_size,
        "optimizer": request.optimizer,
        "dense_bytes": request.dense_bytes,
        "planner": request.planner,
        "allowed": {name: list(types) for name, types in request.allowed.items()},
        "kernels": None if request.kernels is None else list(request.kernels),
        "estimate": _estimate(ms, times, planned.bound) | _fullest(taken, cluster.device_bytes),
        "ranks": [
            {
                "rank": rank,
                "ms": {part: float(each[rank]) for part, each in times.items()},
                "bytes": {part: int(each[rank]) for part, each in device.items()},
                "host_bytes": {part: int(each[rank]) for part, each in host.items()},
            }
            for rank in range(ranks)
        ],
        "tables": {option.name: _table(option, planned.tables[option.name]) for option in sorted(chosen, key=lambda each: each.name)},
        "seconds": round(planned.seconds, 3),
    }


def _estimate(ms: Floats, times: dict[str, Floats], bound: float) -> dict[str, Any]:
    worst, mean = int(ms.argmax()), float(ms.mean())
    return {
        "step_ms": float(ms[worst]),
        "mean_ms": mean,
        "bound_ms": bound,
        "imbalance": float(ms[worst]) / mean if mean else 1.0,
        "worst_rank": worst,
        "limited_by": max(TIMES, key=lambda part: float(times[part][worst])),
    }


def _fullest(taken: Floats, capacity: int) -> dict[str, Any]:
    fullest = int(taken.argmax())
    return {"fullest_rank": fullest, "fullest_share": float(taken[fullest]) / capacity, "capacity_bytes": capacity}


def _table(option: ShardingOption, table: Table) -> dict[str, Any]:
    return {
        **table.model_dump(mode="json", exclude={"name"}),
        "sharding_type": option.sharding_type,
        "compute_kernel": option.compute_kernel,
        "ranks": [shard.rank for shard in option.shards],
        "shards": [{"offset": list(shard.offset), "size": list(shard.size), "rank": shard.rank} for shard in option.shards],
        "ms": sum(perf_of(shard) for shard in option.shards),
        "longest_ms": max(perf_of(shard) for shard in option.shards),
        "bytes": sum(storage_of(shard)[0] for shard in option.shards),
        "host_bytes": sum(storage_of(shard)[1] for shard in option.shards),
    }


def _shard_bytes(shard: Shard, option: ShardingOption, table: Table, request: Request) -> tuple[dict[str, int], dict[str, int]]:
    """What a shard takes of the device and of the host, by part; TorchRec's sums, taken apart."""
    on_device, on_host, _ = storage_of(shard)
    rows, columns = shard.size
    weights = rows * columns * table.row_bytes // table.dimension
    optimizer = math.ceil(weights * state_share(request.optimizer, table.dimension))
    if request.cluster.hardware.device == "cpu":
        return {}, {"weights": weights, "optimizer": optimizer, "activations": max(0, on_host - weights - optimizer)}
    if option.compute_kernel in ("fused", "dense"):
        return {"weights": weights, "optimizer": optimizer, "activations": max(0, on_device - weights - optimizer)}, {}
    if option.compute_kernel == "fused_uvm":
        return {"activations": on_device}, {"weights": weights, "optimizer": optimizer}
    share = option.cache_load_factor or UVM_CACHING_RATIO
    cache = math.ceil((weights + optimizer) * share) + math.ceil(rows * (4 + 16 * share))
    return {"cache": min(cache, on_device), "activations": max(0, on_device - cache)}, {"weights": weights, "optimizer": optimizer}


def state_share(optimizer: str, dimension: int) -> float:
    """Bytes of a table's optimizer state over bytes of its weights, as TorchRec counts them."""
    return {"sgd": 0.0, "rowwise_adagrad": 1 / dimension, "adagrad": 1.0, "adam": 2.0, "rowwise_adam": 1.0}[optimizer]


def cost_of(record: Record, prices: Mapping[str, float]) -> float | None:
    """Of a million impressions, for the tables' part of the steps alone, in the unit of the price of a rank and hour.

    `prices` are by hardware, before what the cluster itself says; None where neither knows one.
    """
    cluster = record["cluster"]
    price = prices.get(cluster["hardware"], cluster["price_per_hour"])
    return None if price is None else float(price * record["estimate"]["step_ms"] / MS_AN_HOUR / record["batch_size"] * 1e6)


def rate_of(record: Record) -> float | None:
    """Impressions of all ranks that the tables' part of the steps takes in a second; None where no time is estimated."""
    step_ms = record["estimate"]["step_ms"]
    return float(record["world_size"] * record["batch_size"] / step_ms * 1e3) if step_ms else None


def request_of(record: Record) -> Request:
    """What a plan was planned from."""
    names = set(Table.model_fields) - {"name"}
    tables = [Table(name=name, **{key: table[key] for key in names & table.keys()}) for name, table in record["tables"].items()]
    return Request(
        tables,
        Cluster.from_json(record["cluster"]),
        record["batch_size"],
        record["optimizer"],
        record["planner"],
        record["allowed"],
        record["kernels"],
        record["dense_bytes"],
    )


def read_plan(path: Path) -> Record:
    """A plan, by its file or its folder; DataError where there is none."""
    file = path / "plan.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        of_sweep = f"a sweep has its plans in {path / 'plans'}: give one of them" if (path / "sweep.json").is_file() else None
        raise DataError(f"no plan at {file}", of_sweep or "escm2rec plan --out FOLDER writes one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is no readable JSON: {error}", "plan again") from error
    if not isinstance(record, dict) or record.get("kind") != "plan" or not isinstance(record.get("version"), int):
        raise DataError(f"{file} holds no plan", "give a plan.json that escm2rec plan wrote; a run's says where its tables lie, not why")
    if record["version"] > PLAN_VERSION:
        raise DataError(f"{file} has layout version {record['version']}, this escm2rec reads up to {PLAN_VERSION}", "use a newer escm2rec")
    if missing := sorted(KEYS - record.keys()):
        raise DataError(f"{file} lacks {', '.join(missing)}", "it was changed after it was written: plan again")
    try:
        _check(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = "; ".join(str(error).splitlines()[:3])
        raise DataError(f"{file} is damaged: {type(error).__name__}: {said}", "it was changed after it was written: plan again") from error
    return record


def _check(record: Record) -> None:
    """What `explain`, `compare` and pages read of a plan, read once."""
    request = request_of(record)
    if not request.tables:
        raise ValueError("it has no tables")
    _finite(record["estimate"][name] for name in ("step_ms", "mean_ms", "bound_ms", "imbalance", "fullest_share", "capacity_bytes"))
    if len(record["ranks"]) != request.cluster.world_size or record["world_size"] != request.cluster.world_size:
        raise ValueError(f"{len(record['ranks'])} ranks, and a cluster of {request.cluster.world_size}")
    for rank in record["ranks"]:
        _finite(rank["ms"][part] for part in TIMES)
        _finite(rank[where][part] for where in ("bytes", "host_bytes") for part in MEMORY)
    for table in record["tables"].values():
        _finite(table[name] for name in ("ms", "longest_ms", "bytes", "host_bytes"))
        if table["sharding_type"] not in ALL_TYPES or table["compute_kernel"] not in KERNELS["cuda"]:
            raise ValueError(f"no sharding type {table['sharding_type']!r} with kernel {table['compute_kernel']!r}")
        for shard in table["shards"]:
            rank, numbers = shard["rank"], [*shard["offset"], *shard["size"]]
            if not (isinstance(rank, int) and 0 <= rank < request.cluster.world_size):
                raise ValueError(f"a shard on rank {rank!r} of {request.cluster.world_size}")
            if len(numbers) != 4 or not all(isinstance(each, int) and each >= 0 for each in numbers):
                raise ValueError(f"a shard with offset {shard['offset']!r} and size {shard['size']!r}")
        if not table["shards"] or [shard["rank"] for shard in table["shards"]] != table["ranks"]:
            raise ValueError("a table has no shards, or not on the ranks that it names")


def _finite(numbers: Iterable[Any]) -> None:
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(f"{number} where a number was")
