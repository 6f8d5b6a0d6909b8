"""What a managed table costs a step: to find the rows of a batch's values, and to give rows to those that have none.

    python -m benchmarks.managed

Of tables of 100,000 and 1,000,000 rows on one rank, with 8,192 values a step: `known` (all have a row), `growing` (a hundredth is new, and
there are free rows), `full` (a hundredth is new, and takes rows of others). `torchrec_ms` is TorchRec's module as it is, `ours_ms`
escm2rec's, which are given the same values in turn; both keep the same values. On one thread. Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from torch import Tensor
from torchrec.modules.mc_modules import LRU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from benchmarks.machine import facts
from escm2rec.schema import MANAGED_IDS
from escm2rec.sharding.managed import ValueRows

IDS, STEPS = 8_192, 20
KINDS = {"ours": ValueRows, "torchrec": MCHManagedCollisionModule}


def values_of(first: int, count: int) -> Tensor:
    """Hashes of whole numbers, spread as those of a log are."""
    return (torch.arange(first, first + count) * -7046029254386353131) & (MANAGED_IDS - 1)


def step(module: MCHManagedCollisionModule, values: Tensor) -> float:
    """Milliseconds of one step."""
    began = time.perf_counter()
    module({"table": JaggedTensor(values, lengths=torch.ones(len(values), dtype=torch.int32))})
    module.evict()
    return 1e3 * (time.perf_counter() - began)


def measure(rows: int, case: str) -> dict[str, float]:
    """Medians of both."""
    modules = {name: kind(rows, torch.device("cpu"), LRU_EvictionPolicy(), 1, MANAGED_IDS) for name, kind in KINDS.items()}
    held = rows // 2 if case == "growing" else rows - 1
    for module in modules.values():
        step(module, values_of(0, held))
    draws = torch.Generator().manual_seed(1)
    taken: dict[str, list[float]] = {name: [] for name in modules}
    for number in range(STEPS):
        values = values_of(0, held)[torch.randint(held, (IDS,), generator=draws)]
        if case != "known":
            new = IDS // 100
            values[:new] = values_of(rows + number * new, new)
        for name, module in modules.items():
            taken[name].append(step(module, values))
    ours, theirs = modules.values()
    assert torch.equal(ours._mch_sorted_raw_ids, theirs._mch_sorted_raw_ids), "the same values"
    assert torch.equal(ours._mch_last_access_iter[:held], theirs._mch_last_access_iter[:held])
    assert len(ours._mch_remapped_ids_mapping.unique()) == rows, "each row once"
    return {f"{name}_ms": round(statistics.median(times[2:]), 2) for name, times in taken.items()}


def main() -> None:
    """Measure and print."""
    results = [
        {"rows": rows, "case": case, **measure(rows, case)} for rows in (100_000, 1_000_000) for case in ("known", "growing", "full")
    ]
    print(json.dumps({"machine": facts(), "values_a_step": IDS, "results": results}, indent=1))


if __name__ == "__main__":
    main()
