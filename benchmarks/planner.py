"""Time of a plan and what it is worth: our search against TorchRec's proposers, by the same estimates.

    python -m benchmarks.planner

Sets of tables (`benchmarks/table_sets.py`) on clusters of up to 128 GPUs, kernels of the host's memory among the options. Told are
seconds, the estimated ms of the slowest rank, and that over the bound that no plan can beat. TorchRec's default, which is four proposers
one after another, is run where it ends in minutes. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from benchmarks.machine import facts
from benchmarks.table_sets import criteo_multi_hot, power_law
from escm2rec.planning.cluster import parse_cluster
from escm2rec.planning.options import perf_of
from escm2rec.planning.planner import PlannerName, Request, find_plan
from escm2rec.planning.tables import Table

BATCH_SIZE = 4_096
SETS: dict[str, tuple[list[Table], str, tuple[PlannerName, ...]]] = {
    "criteo multi-hot, 8 H100": (criteo_multi_hot(), "1x8:h100-80gb", ("priced", "torchrec", "greedy", "uniform")),
    "criteo multi-hot, 4 A100 of 40 GB": (criteo_multi_hot(), "2x2:a100-40gb", ("priced", "torchrec", "greedy", "uniform")),
    "40 tables, 4 H100 with 24 GB": (power_law(40, 2), "1x4:h100-80gb,memory_gib=24", ("priced", "torchrec", "greedy", "uniform")),
    "100 tables, 64 H100": (power_law(100, 1), "8x8:h100-80gb", ("priced", "torchrec")),
    "1,000 tables, 128 H100": (power_law(1_000, 1), "16x8:h100-80gb", ("priced",)),
}


def measure(tables: list[Table], cluster: str, planner: PlannerName) -> dict[str, Any]:
    """One plan."""
    planned = find_plan(Request(tables, parse_cluster(cluster), BATCH_SIZE, planner=planner))
    told: dict[str, Any] = {"seconds": round(planned.seconds, 2), "options": len(planned.search_space)}
    if planned.chosen is None:
        return told | {"fits": False}
    load = np.zeros(planned.request.cluster.world_size)
    for option in planned.chosen:
        np.add.at(load, [shard.rank for shard in option.shards], [perf_of(shard) for shard in option.shards])
    return told | {"step_ms": round(float(load.max()), 4), "over_bound": round(float(load.max()) / planned.bound, 4)}


def main() -> None:
    """Plan all, and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=3, help="of our search, whose time is told as the median")
    repeats = options.parse_args().repeats
    results = {}
    for name, (tables, cluster, planners) in SETS.items():
        gib = round(sum(table.weight_bytes for table in tables) / 2**30, 1)
        found: dict[str, Any] = {planner: measure(tables, cluster, planner) for planner in planners}
        again = [found["priced"]["seconds"], *(measure(tables, cluster, "priced")["seconds"] for _ in range(repeats - 1))]
        found["priced"]["seconds"] = float(np.median(again))
        results[name] = {"tables": len(tables), "weights_gib": gib, "cluster": cluster, **found}
    print(json.dumps({"machine": facts(), "batch_size": BATCH_SIZE, "sets": results}, indent=1))


if __name__ == "__main__":
    main()
