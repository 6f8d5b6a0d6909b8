"""Speed of training at the reference shape, end to end from Parquet against the same model fed from memory, on 1 and on 2 ranks.

    python -m benchmarks.train --ranks 1 2

The reference shape: 20 tables of 1M x 16, 29 ids a row, three towers 320-128-64-1, global batch 8,192 (`benchmarks/reference.py`).
parquet: what `train` does, metrics included. memory: TorchRec's pipeline alone over batches that lie in memory, no metrics. The two run in
turn in the same processes; a round's ratio is rows/s of the one over the other. Prints one JSON object.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from benchmarks.machine import facts
from benchmarks.reference import reference_schema, write_reference_data
from escm2rec.config import Config, parse_config
from escm2rec.reader.batch import Batch
from escm2rec.reader.dataset import Dataset
from escm2rec.sharding.runtime import distributed_runtime
from escm2rec.training.trainer import Trainer

GLOBAL_BATCH = 8192


def reference_config() -> Config:
    """The towers of the reference; every step trains all three, so that steps can be compared."""
    features = [{"name": feature.name, "kind": feature.kind} for feature in reference_schema().features]
    return parse_config(
        {
            "data": {"source": {"kind": "table"}, "split": {"by": "hash", "train": 1.0}, "features": features},
            "model": {"embedding_dim": 16, "tower_hidden": [128, 64]},
            "objective": {"kind": "escm2-dr"},
            "training": {"global_batch_size": GLOBAL_BATCH},
        }
    )


def from_parquet(trainer: Trainer) -> float:
    """Seconds of one epoch as `train` runs it, without checkpoints."""
    trainer.step = 0
    dist.barrier()
    began = time.perf_counter()
    for _ in trainer.records():
        pass
    dist.barrier()
    return time.perf_counter() - began


def from_memory(trainer: Trainer, batches: list[Batch]) -> float:
    """Seconds of the same steps by TorchRec's pipeline alone."""
    pipeline = TrainPipelineSparseDist(trainer.module, trainer.optimizer, trainer.runtime.device, execute_all_batches=True)
    source: Iterator[Batch] = iter(batches)
    dist.barrier()
    began = time.perf_counter()
    for _ in batches:
        pipeline.progress(source)
    dist.barrier()
    return time.perf_counter() - began


def work(data: Path, rounds: int) -> None:
    """One rank: rounds of both in turn; rank 0 prints the result."""
    with distributed_runtime() as runtime, tempfile.TemporaryDirectory() as out:
        trainer = Trainer(reference_config(), Dataset.open(data), Path(out), runtime)
        batches = list(trainer.reader.epoch(0))
        from_memory(trainer, batches[:5])  # warm-up
        seconds = [(from_parquet(trainer), from_memory(trainer, batches)) for _ in range(rounds)]
        rows = trainer.reader.num_rows
        result = {
            "ranks": runtime.world_size,
            "threads_a_rank": torch.get_num_threads(),
            "steps": trainer.total_steps,
            "parquet_rows_per_s": [round(rows / parquet) for parquet, _ in seconds],
            "memory_rows_per_s": [round(rows / memory) for _, memory in seconds],
            "ratio_by_round": [round(memory / parquet, 3) for parquet, memory in seconds],
            "median_ratio": round(statistics.median(memory / parquet for parquet, memory in seconds), 3),
        }
        if runtime.is_main:
            print("RESULT " + json.dumps(result), flush=True)


def launch(ranks: int, data: Path, rounds: int) -> dict[str, Any]:
    """Start this file on so many ranks; its result."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *start, "-m", "benchmarks.train", "--worker", str(data), "--rounds", str(rounds)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=240)
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.worker is not None:
        work(arguments.worker, arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_reference_data(data, arguments.steps * GLOBAL_BATCH)
        results = [launch(ranks, data, arguments.rounds) for ranks in arguments.ranks]
    print(json.dumps({"machine": facts(), "global_batch_size": GLOBAL_BATCH, "by_ranks": results}, indent=1))


if __name__ == "__main__":
    main()
