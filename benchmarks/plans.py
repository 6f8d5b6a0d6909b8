"""Estimated against measured: the time of a step of plans that differ, on real ranks.

    python -m benchmarks.plans --ranks 2          # on the cores

The hardware entry of these ranks is calibrated first, by `escm2rec plan calibrate`. Then tables are sharded by one plan after another
(table-wise in balance, at random and on one rank, by rows, by columns, whole on every rank, mixtures, what the planner chooses), each built
by `follow`, and a step, forward and backward with row-wise Adagrad, is timed, plans in turn: the median of steps, of the slowest rank. Told
are Spearman's rank correlation of estimate and measurement, and how far the estimate is off, with the calibrated entry and with the
built-in one that is nearest. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.stats import spearmanr
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.types import ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.machine import facts
from escm2rec.planning.cluster import parse_cluster
from escm2rec.planning.options import perf_of
from escm2rec.planning.planner import Planned, Request, find_plan, search_space
from escm2rec.planning.record import Record, record_of
from escm2rec.planning.tables import Table, Tables
from escm2rec.sharding.followed import follow
from escm2rec.sharding.planner import sharders
from escm2rec.sharding.runtime import Runtime, distributed_runtime

BATCH_SIZE = 2_048
NEAREST = "cpu-epyc-7763"
STEPS, ROUNDS, WARM = 5, 4, 2
TABLES = [
    Table(name=f"table_{number}", rows=rows, dimension=dimension, pooling_factor=ids)
    for number, (rows, dimension, ids) in enumerate(
        [
            *((400_000, 64, 1), (300_000, 128, 4), (200_000, 256, 2), (100_000, 256, 8), (50_000, 64, 20), (150_000, 128, 1)),
            *((20_000, 256, 1), (5_000, 64, 4), (1_000, 128, 2), (250_000, 64, 10), (80_000, 128, 12), (2_000, 64, 1)),
        ]
    )
]
SMALL = {table.name for table in TABLES if table.rows <= 20_000}
Places = Callable[[ShardingOption], list[int]]


def plans_of(request: Request) -> dict[str, Record]:
    """Plans by name."""
    space, ranks = search_space(request), request.cluster.world_size
    options = {(option.name, option.sharding_type): option for option in space if option.compute_kernel in ("fused", "dense")}

    def one(types: Callable[[Table], str], places: Places) -> Record:
        chosen = [options[table.name, types(table)] for table in TABLES]
        for option in chosen:
            spread = option.sharding_type in ("row_wise", "data_parallel")
            for shard, rank in zip(option.shards, range(ranks) if spread else places(option), strict=True):
                shard.rank = rank
        return record_of(Planned(request, chosen, space, np.zeros((ranks, 3)), 0.0, 0.0))

    def on(rank: int) -> Places:
        return lambda option: [rank] * len(option.shards)

    def at_random(seed: int) -> Places:
        draw = np.random.default_rng(seed)
        return lambda option: draw.integers(ranks, size=len(option.shards)).tolist()

    def in_turn(option: ShardingOption) -> list[int]:
        return [(int(option.name.removeprefix("table_")) + i) % ranks for i in range(len(option.shards))]

    plans = {
        "priced": record_of(find_plan(request)),
        "table_wise, on rank 0": one(lambda _: "table_wise", on(0)),
        "table_wise, in turn": one(lambda _: "table_wise", in_turn),
        "row_wise": one(lambda _: "row_wise", in_turn),
        "column_wise, in turn": one(lambda _: "column_wise", in_turn),
        "column_wise, on rank 1": one(lambda _: "column_wise", on(1)),
        "data_parallel": one(lambda _: "data_parallel", in_turn),
        "small ones data_parallel, others table_wise": one(lambda t: "data_parallel" if t.name in SMALL else "table_wise", in_turn),
        "small ones data_parallel, others row_wise": one(lambda t: "data_parallel" if t.name in SMALL else "row_wise", in_turn),
        "large ones row_wise, others table_wise": one(lambda t: "row_wise" if t.rows > 100_000 else "table_wise", in_turn),
        "long lists row_wise, others on rank 0": one(lambda t: "row_wise" if t.pooling_factor >= 8 else "table_wise", on(0)),
    }
    return plans | {f"table_wise, at random {seed}": one(lambda _: "table_wise", at_random(seed)) for seed in range(5)}


def estimate(record: Record, space: Sequence[ShardingOption]) -> float:
    """Ms of the slowest rank of a plan, by the prices of a search space."""
    load = np.zeros(record["world_size"])
    for option in space:
        planned = record["tables"][option.name]
        if (option.sharding_type, option.compute_kernel) == (planned["sharding_type"], planned["compute_kernel"]):
            np.add.at(load, planned["ranks"], [perf_of(shard) for shard in option.shards])
    return float(load.max())


class Model(nn.Module):
    """The tables, and a loss that depends on all that they give."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Tables(TABLES, "rowwise_adagrad")

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        """A loss, []."""
        assert self.embeddings.collection is not None
        loss: torch.Tensor = self.embeddings.collection(ids).values().square().mean()
        return loss


def batch_of(runtime: Runtime) -> KeyedJaggedTensor:
    """One batch of this rank."""
    draw = torch.Generator().manual_seed(runtime.rank)
    ids = [torch.randint(table.rows, (BATCH_SIZE * int(table.pooling_factor),), generator=draw) for table in TABLES]
    lengths = torch.cat([torch.full((BATCH_SIZE,), int(table.pooling_factor)) for table in TABLES])
    return KeyedJaggedTensor([table.name for table in TABLES], torch.cat(ids), lengths=lengths).to(runtime.device)


def work(plans: Path) -> None:
    """One rank: each plan built and stepped, in turn; rank 0 prints the times."""
    with distributed_runtime() as runtime:
        batch, told = batch_of(runtime), json.loads(plans.read_text())
        times: dict[str, list[float]] = {name: [] for name in told}
        for number in range(ROUNDS):
            for name in list(told)[:: -1 if number % 2 else 1]:
                times[name] += _steps(Path(told[name]), batch, runtime)
        medians = torch.tensor([statistics.median(each) for each in times.values()], dtype=torch.float64)
        dist.all_reduce(medians, dist.ReduceOp.MAX, group=runtime.group)
        if runtime.is_main:
            print("RESULT " + json.dumps(dict(zip(times, medians.tolist(), strict=True))), flush=True)


def _steps(plan: Path, batch: KeyedJaggedTensor, runtime: Runtime) -> list[float]:
    model = Model()
    followed = follow(plan, model, runtime.world_size, runtime.local_world_size, runtime.device.type)
    env = ShardingEnv.from_process_group(runtime.group)
    sharded = DistributedModelParallel(model, env=env, device=runtime.device, plan=followed, sharders=sharders())
    times = []
    for step in range(WARM + STEPS):
        dist.barrier(group=runtime.group)
        began = time.perf_counter()
        sharded(batch).backward()
        for parameter in sharded.parameters():
            parameter.grad = None
        if step >= WARM:
            times.append(1e3 * (time.perf_counter() - began))
    return times


def launch(ranks: int, *arguments: str) -> str:
    """What ranks of torchrun printed."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    start = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        *arguments,
    ]
    return subprocess.run(start, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": threads}).stdout


def main() -> None:
    """Calibrate, measure, compare and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.worker is not None:
        work(arguments.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        entry = Path(folder) / "hardware.yaml"
        launch(arguments.ranks, "escm2rec", "plan", "calibrate", "--out", str(entry))
        calibrated = Request(TABLES, parse_cluster(f"1x{arguments.ranks}:this-machine", entry), BATCH_SIZE)
        plans = plans_of(calibrated)
        files = {name: str(Path(folder) / f"{number}.json") for number, name in enumerate(plans)}
        for name, record in plans.items():
            Path(files[name]).write_text(json.dumps(record))
        (Path(folder) / "plans.json").write_text(json.dumps(files))
        printed = launch(arguments.ranks, "benchmarks.plans", "--worker", str(Path(folder) / "plans.json"))
        (line,) = [line for line in printed.splitlines() if line.startswith("RESULT ")]
        measured: dict[str, float] = json.loads(line.removeprefix("RESULT "))
        built_in = Request(TABLES, parse_cluster(f"1x{arguments.ranks}:{NEAREST}"), BATCH_SIZE)
        spaces = {"calibrated": search_space(calibrated), NEAREST: search_space(built_in)}
        found = {name: _against(measured, {plan: estimate(plans[plan], space) for plan in plans}) for name, space in spaces.items()}
        hardware: dict[str, Any] = calibrated.cluster.hardware.model_dump(mode="json", exclude={"sources"})
    print(json.dumps({"machine": facts(), "ranks": arguments.ranks, "plans": len(measured), "hardware": hardware, **found}, indent=1))


def _against(measured: dict[str, float], estimated: dict[str, float]) -> dict[str, Any]:
    ratios = [estimated[name] / measured[name] for name in measured]
    return {
        "spearman": round(float(spearmanr([measured[name] for name in measured], [estimated[name] for name in measured]).statistic), 3),
        "estimate_over_measured_median": round(statistics.median(ratios), 3),
        "off_by_factor_median": round(statistics.median(max(each, 1 / each) for each in ratios), 3),
        "off_by_factor_most": round(max(max(each, 1 / each) for each in ratios), 3),
        "ms": {name: {"measured": round(measured[name], 2), "estimated": round(estimated[name], 3)} for name in measured},
    }


if __name__ == "__main__":
    main()
