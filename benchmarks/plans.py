"""Estimated against measured: the time of a step of plans that differ, on real ranks.

    python -m benchmarks.plans --ranks 2          # on the cores

The hardware entry of these ranks is calibrated first, by `escm2rec plan calibrate`. Then tables are sharded by one plan after another
(table-wise in balance, at random and on one rank, by rows, by columns, whole on every rank, mixtures, what the planner chooses), each built
and stepped as `train` does it, with row-wise Adagrad, and timed, plans in turn: the median of steps, of the slowest rank. Once where all
rows are looked up alike, and once where row k is looked up 1 / k as often as the first. Told are Spearman's rank correlation of estimate
and measurement, and how far the estimate is off: with the calibrated entry, with the built-in one that is nearest, and, of rows that are
not looked up alike, without the popularity that tells so. Prints one JSON object.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn
from torchrec.distributed.planner.types import ShardingOption
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.machine import facts
from escm2rec.config import TrainingConfig
from escm2rec.planning.cluster import parse_cluster
from escm2rec.planning.options import perf_of
from escm2rec.planning.planner import Planned, Request, find_plan, search_space
from escm2rec.planning.record import Record, record_of
from escm2rec.planning.tables import Table
from escm2rec.sharding.model import ShardedModel, shard_model, whole_tables
from escm2rec.sharding.runtime import Runtime, distributed_runtime
from escm2rec.training.whole_tables import WholeTables

BATCH_SIZE = 2_048
NEAREST = "cpu-epyc-7763"
STEPS, ROUNDS, WARM = 4, 8, 1
TABLES = [
    Table(name=f"table_{number}", rows=rows, dimension=dimension, pooling_factor=ids)
    for number, (rows, dimension, ids) in enumerate(
        [
            *((400_000, 64, 1), (300_000, 128, 4), (200_000, 256, 2), (100_000, 256, 8), (50_000, 64, 20), (150_000, 128, 1)),
            *((20_000, 256, 1), (5_000, 64, 4), (1_000, 128, 2), (250_000, 64, 10), (80_000, 128, 12), (2_000, 64, 1)),
        ]
    )
]
RANKS_OF_ROWS = np.unique(np.geomspace(1, max(table.rows for table in TABLES), 60).astype(np.int64))
SMALL = {table.name for table in TABLES if table.rows <= 20_000}
Places = Callable[[ShardingOption], list[int]]


def popular(table: Table) -> Table:
    """The same, row k looked up 1 / k as often as the first."""
    shares = np.cumsum(1 / np.arange(1, table.rows + 1))
    places = [*RANKS_OF_ROWS[table.rows > RANKS_OF_ROWS].tolist(), table.rows]
    return table.model_copy(update={"popularity": tuple((place, float(shares[place - 1] / shares[-1])) for place in places)})


KINDS = {"alike": TABLES, "popular": [popular(table) for table in TABLES]}


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
        configs = [
            EmbeddingBagConfig(name=each.name, num_embeddings=each.rows, embedding_dim=each.dimension, feature_names=[each.name])
            for each in TABLES
        ]
        self.embeddings = EmbeddingBagCollection(configs, device=torch.device("meta"))

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        """A loss, []."""
        loss: torch.Tensor = self.embeddings(ids).values().square().mean()
        return loss


def batch_of(tables: Sequence[Table], runtime: Runtime) -> KeyedJaggedTensor:
    """One batch of this rank."""
    draw = np.random.default_rng(runtime.rank)
    ids = [_ids(table, draw) for table in tables]
    lengths = torch.cat([torch.full((BATCH_SIZE,), int(table.pooling_factor)) for table in tables])
    return KeyedJaggedTensor([table.name for table in tables], torch.from_numpy(np.concatenate(ids)), lengths=lengths).to(runtime.device)


def _ids(table: Table, draw: np.random.Generator) -> NDArray[np.int64]:
    """As its popularity has it."""
    rows, shares = zip((0, 0.0), *(table.popularity or ((table.rows, 1.0),)), strict=True)
    found = np.interp(draw.random(BATCH_SIZE * int(table.pooling_factor)), shares, rows)
    return np.asarray(np.minimum(found, table.rows - 1), np.int64)


def work(plans: Path) -> None:
    """One rank: all plans built, then stepped in turn; rank 0 prints the times."""
    with distributed_runtime() as runtime:
        batches, told = {kind: batch_of(tables, runtime) for kind, tables in KINDS.items()}, json.loads(plans.read_text())
        built = {name: Built.of(Path(plan), runtime) for name, plan in told.items()}
        found = {kind: _times(built, batch, runtime) for kind, batch in batches.items()}
        if runtime.is_main:
            print("RESULT " + json.dumps(found), flush=True)


def _times(built: dict[str, Built], batch: KeyedJaggedTensor, runtime: Runtime) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in built}
    for number in range(ROUNDS):
        for name in list(built)[:: -1 if number % 2 else 1]:
            times[name] += [built[name].step_ms(batch, runtime) for _ in range(WARM + STEPS)][WARM:]
    medians = torch.tensor([statistics.median(each) for each in times.values()], dtype=torch.float64)
    dist.all_reduce(medians, dist.ReduceOp.MAX, group=runtime.group)
    return dict(zip(times, medians.tolist(), strict=True))


@dataclass(frozen=True)
class Built:
    """Tables sharded as a plan says, and stepped as `train` does it."""

    sharded: ShardedModel
    whole: WholeTables

    @classmethod
    def of(cls, plan: Path, runtime: Runtime) -> Built:
        """Of the plan in a file."""
        training = TrainingConfig()
        sharded = shard_model(
            Model(),
            [table.name for table in TABLES],
            runtime,
            seed=0,
            init_std=0.01,
            optimizer=training.sparse_optimizer,
            learning_rate=training.sparse_learning_rate,
            local_batch_size=BATCH_SIZE,
            forced={},
            in_bfloat16=False,
            followed=plan,
        )
        return cls(sharded, WholeTables(whole_tables(sharded), training, runtime.group))

    def step_ms(self, batch: KeyedJaggedTensor, runtime: Runtime) -> float:
        """Of one step, which all ranks begin together."""
        dist.barrier(group=runtime.group)
        began = time.perf_counter()
        self.whole.zero_grad()
        self.sharded.module(batch).backward()
        self.whole.step()
        return 1e3 * (time.perf_counter() - began)


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
        measured: dict[str, dict[str, float]] = json.loads(line.removeprefix("RESULT "))
        built_in = parse_cluster(f"1x{arguments.ranks}:{NEAREST}")
        spaces = {kind: search_space(replace(calibrated, tables=tables)) for kind, tables in KINDS.items()}
        nearest = search_space(replace(calibrated, cluster=built_in))

        def against(kind: str, space: list[ShardingOption]) -> dict[str, Any]:
            return _against(measured[kind], {plan: estimate(plans[plan], space) for plan in plans})

        found = {
            "calibrated": against("alike", spaces["alike"]),
            NEAREST: against("alike", nearest),
            "popular": against("popular", spaces["popular"]),
            "popular, not told": against("popular", spaces["alike"]),
        }
        hardware: dict[str, Any] = calibrated.cluster.hardware.model_dump(mode="json", exclude={"sources"})
    print(json.dumps({"machine": facts(), "ranks": arguments.ranks, "plans": len(plans), "hardware": hardware, **found}, indent=1))


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
