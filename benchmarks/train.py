"""Speed of training from Parquet, with all that `train` does, against the same model fed from memory by TorchRec's pipeline alone.

    python -m benchmarks.train --ranks 1 2          # on the cores: the reference shape
    python -m benchmarks.train --shape dlrm         # on a GPU: DLRM's

reference: 20 tables of 1M x 16, 29 ids a row, three towers 320-128-64-1, global batch 8,192. dlrm: 26 tables of 1M x 128, one id each,
three towers 3,328-128-64-1, global batches of 8,192 and 65,536, in float32 and bfloat16 (`benchmarks/reference.py` has the data).

bare: TorchRec's pipeline over batches that lie in memory, no metrics. metrics: `train` over those batches. parquet: `train` from Parquet.
checkpoint: that, and one checkpoint begun half way (`checkpoint_s`: how much longer than the `parquet` of its round; `written_s`: until
it was whole). They run in turn, every other round backwards, in the same processes; a ratio is of the rows/s of one round. On a machine
whose speed changes by the minute many rounds of few steps say more (`--steps 60 --rounds 12 --no-checkpoint`). What a round begins with
would then weigh in: `step_*` are of the steps after the first 5 alone, mean and median.

On a GPU also what the tables must move a step, at the least (rows that are looked up: read, and read and written by the optimizer, once
each; pooled outputs and their gradients: written and read once), as a share of what a copy moves in that time; and the kernels that take
longest. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from benchmarks.machine import facts
from benchmarks.reference import reference_schema, write_reference_data
from escm2rec.config import Config, parse_config
from escm2rec.reader.batch import Batch
from escm2rec.reader.dataset import Dataset
from escm2rec.schema import Schema
from escm2rec.sharding.runtime import Runtime, distributed_runtime
from escm2rec.training import trainer as trainer_module
from escm2rec.training.checkpoint import Checkpoints
from escm2rec.training.owner import Owner
from escm2rec.training.trainer import Trainer

KINDS = ("bare", "metrics", "parquet", "checkpoint")
PROFILED_STEPS, KERNELS = 10, 12
FIRST_STEPS = 5  # of an epoch: while its first batches are read


@dataclass(frozen=True)
class Shape:
    """What is trained."""

    schema: Schema
    dim: int
    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    rows: int
    epochs: int
    decode_threads: int


SHAPES = {
    "reference": Shape(reference_schema(), 16, (8_192,), ("float32",), 240 * 8_192, 1, 1),
    "dlrm": Shape(reference_schema(26, 0), 128, (8_192, 65_536), ("float32", "bfloat16"), 64 * 65_536, 2, 8),
}


class FedTrainer(Trainer):
    """A trainer that takes its batches from memory when it holds some."""

    held: list[Batch] | None = None

    def _batches(self) -> Iterator[Batch]:
        return super()._batches() if self.held is None else iter(self.held)


def config_of(shape: Shape, batch: int, precision: str) -> Config:
    """Three towers that every step trains, so that steps can be compared."""
    features = [{"name": feature.name, "kind": feature.kind} for feature in shape.schema.features]
    return parse_config(
        {
            "data": {"source": {"kind": "table"}, "split": {"by": "hash", "train": 1.0}, "features": features},
            "model": {"embedding_dim": shape.dim, "tower_hidden": [128, 64]},
            "objective": {"kind": "escm2-dr"},
            "training": {
                "epochs": shape.epochs,
                "checkpoint_every_steps": shape.epochs * shape.rows // batch // 2,
                "global_batch_size": batch,
                "precision": precision,
                "decode_threads": shape.decode_threads,
            },
        }
    )


class _InTheMiddle(Checkpoints):
    """Leaves out the one of the last step, which nothing trains beside."""

    last: int
    written_s: list[float]

    def save(self, step: int, progress: dict[str, Any], module: Any, optimizer: Any) -> None:
        """As `Checkpoints.save`; until it is whole goes to `written_s`."""
        if step == self.last:
            return
        began = time.perf_counter()
        super().save(step, progress, module, optimizer)
        assert self._writing is not None
        self._writing.add_done_callback(lambda _: self.written_s.append(time.perf_counter() - began))


class ClockedPipeline(TrainPipelineSparseDist):
    """Notes when each step was done."""

    ends: ClassVar[list[float]] = []

    def progress(self, dataloader_iter: Iterator[Batch]) -> Any:
        """As TorchRec's."""
        done = super().progress(dataloader_iter)
        self.ends.append(time.perf_counter())
        return done


@dataclass(frozen=True)
class Times:
    """Of an epoch; a step's, s, of those after the first few."""

    seconds: float
    step_mean: float
    step_median: float


class Rounds:
    """One epoch after another of one trainer, each fed in its way."""

    def __init__(self, trainer: FedTrainer, out: Path) -> None:
        self.trainer, self.out, self.runtime = trainer, out, trainer.runtime
        self.batches = list(trainer.reader.epoch(0))
        self.written_s: list[float] = []

    def time_of(self, epoch: Callable[[], None]) -> Times:
        """How long an epoch took, on all ranks."""
        self.trainer.step = 0
        ClockedPipeline.ends = []
        self._synchronise()
        began = time.perf_counter()
        epoch()
        self._synchronise()
        steps = np.diff(ClockedPipeline.ends[FIRST_STEPS - 1 : self.trainer.total_steps])
        return Times(time.perf_counter() - began, float(steps.mean()), float(np.median(steps)))

    def bare(self, steps: int | None = None) -> None:
        """TorchRec's pipeline alone."""
        trainer = self.trainer
        pipeline = ClockedPipeline(trainer.module, trainer.optimizer, self.runtime.device, execute_all_batches=True)
        source = iter(self.batches[:steps] if steps is not None else self.batches * trainer.config.training.epochs)
        with contextlib.suppress(StopIteration):
            while True:
                pipeline.progress(source)

    def metrics(self) -> None:
        """`train` over the same batches."""
        self.trainer.held = self.batches * self.trainer.config.training.epochs
        for _ in self.trainer.records():
            pass
        self.trainer.held = None

    def parquet(self) -> None:
        """`train` from Parquet."""
        for _ in self.trainer.records():
            pass

    def checkpoint(self) -> None:
        """`train` from Parquet, with a checkpoint in the middle."""
        with _InTheMiddle(Owner.take(self.out, self.runtime), 1, self.runtime) as checkpoints:
            checkpoints.last, checkpoints.written_s = self.trainer.total_steps, self.written_s
            for _ in self.trainer.records(checkpoints):
                pass

    def _synchronise(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


def work(data: Path, shape: Shape, batch: int, precision: str, rounds: int, kinds: Sequence[str]) -> None:
    """One rank: rounds of all in turn; rank 0 prints the result."""
    trainer_module.TrainPipelineSparseDist = ClockedPipeline  # type: ignore[attr-defined]
    with distributed_runtime() as runtime, tempfile.TemporaryDirectory() as out:
        trainer = FedTrainer(config_of(shape, batch, precision), Dataset.open(data), Path(out), runtime)
        turns = Rounds(trainer, Path(out))
        turns.bare(5)  # warm-up
        timed = [{name: turns.time_of(getattr(turns, name)) for name in kinds[:: -1 if at % 2 else 1]} for at in range(rounds)]
        seconds = [{name: times.seconds for name, times in each.items()} for each in timed]
        rows = trainer.reader.num_rows * shape.epochs
        result = {
            "ranks": runtime.world_size,
            "global_batch_size": batch,
            "precision": precision,
            "threads_a_rank": torch.get_num_threads(),
            "steps": trainer.total_steps,
            **{f"{name}_rows_per_s": [round(rows / each[name]) for each in seconds] for name in kinds},
            "metrics_of_bare": _median([each["bare"] / each["metrics"] for each in seconds]),
            "parquet_of_bare": _median([each["bare"] / each["parquet"] for each in seconds]),
            "parquet_of_metrics": _median([each["metrics"] / each["parquet"] for each in seconds]),
            **_steps_against_bare(timed),
        }
        if "checkpoint" in kinds:
            longer = [each["checkpoint"] - each["parquet"] for each in seconds]
            result |= {"checkpoint_s": [round(each, 2) for each in longer], "checkpoint_share_of_5_min": _median([s / 300 for s in longer])}
            result["written_s"] = [round(each, 2) for each in turns.written_s]
        if runtime.device.type == "cuda":
            result |= gpu_facts(turns, shape.dim, min(each["bare"] for each in seconds) / trainer.total_steps)
        if runtime.is_main:
            print("RESULT " + json.dumps(result), flush=True)


def _steps_against_bare(timed: list[dict[str, Times]]) -> dict[str, Any]:
    """A step of the bare pipeline over one of the others, by the mean of a round's steps and by their median."""
    found: dict[str, Any] = {"step_bare_ms": [round(1e3 * each["bare"].step_mean, 1) for each in timed]}
    for name in ("metrics", "parquet"):
        means = [each["bare"].step_mean / each[name].step_mean for each in timed]
        found[f"step_{name}_of_bare"] = _median(means)
        found[f"step_{name}_of_bare_by_round"] = [round(each, 3) for each in means]
        found[f"step_{name}_of_bare_by_medians"] = _median([each["bare"].step_median / each[name].step_median for each in timed])
    return found


def gpu_facts(turns: Rounds, dim: int, step_s: float) -> dict[str, Any]:
    """How a bare step of `step_s` compares with the device's memory, and where its time goes."""
    copied = copy_bytes_per_s(turns.runtime)
    moved = table_bytes(turns.batches[0], dim, 2 if turns.trainer.config.training.in_bfloat16 else 4)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        turns.bare(PROFILED_STEPS)
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    return {
        "gpu": torch.cuda.get_device_name(),
        "step_ms": round(1e3 * step_s, 3),
        "copy_gb_per_s": round(copied / 1e9),
        "table_mb_a_step": round(moved / 1e6, 1),
        "table_share_of_copy": round(moved / step_s / copied, 3),
        "kernels_ms_a_step": round(sum(event.self_device_time_total for event in events) / 1e3 / PROFILED_STEPS, 3),
        "longest_kernels_ms": {event.key[:90]: round(event.self_device_time_total / 1e3 / PROFILED_STEPS, 3) for event in events[:KERNELS]},
    }


def copy_bytes_per_s(runtime: Runtime) -> float:
    """Bytes read and written a second by a copy of 2 GiB, the best of 10."""
    source = torch.empty(2**29, dtype=torch.float32, device=runtime.device).normal_()
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / best


def table_bytes(batch: Batch, dim: int, output_bytes: int) -> int:
    """What the tables must move for a batch, at the least: see the top of the file."""
    assert batch.features is not None
    lookups, distinct = 0, 0
    for key in (keys := batch.features.keys()):
        ids = batch.features[key].values()
        lookups, distinct = lookups + len(ids), distinct + len(torch.unique(ids))
    bags = len(batch) * len(keys)
    row_bytes = 4 * dim
    return distinct * (3 * row_bytes + 2 * 4) + 2 * bags * dim * output_bytes + 2 * 4 * lookups


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def launch(
    ranks: int, data: Path, name: str, steps: int | None, batch: int, precision: str, rounds: int, kinds: Sequence[str]
) -> dict[str, Any]:
    """Start this file on so many ranks; its result."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    told = ["--worker", str(data), "--shape", name, "--batch", str(batch), "--precision", precision, "--rounds", str(rounds)]
    told += [] if "checkpoint" in kinds else ["--no-checkpoint"]
    told += [] if steps is None else ["--steps", str(steps)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    command = [sys.executable, *start, "-m", "benchmarks.train", *told]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", choices=SHAPES, default="reference")
    options.add_argument("--ranks", type=int, nargs="+")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, help="of the smallest batch, an epoch; those of the shape otherwise")
    options.add_argument("--batch", type=int, nargs="+")
    options.add_argument("--precision", nargs="+")
    options.add_argument("--no-checkpoint", action="store_true", help="leave out the checkpoints, which take longest")
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.steps is not None:
        shape = replace(shape, rows=arguments.steps * shape.batches[0])
    batches, precisions = arguments.batch or shape.batches, arguments.precision or shape.precisions
    kinds = KINDS[:-1] if arguments.no_checkpoint else KINDS
    if arguments.worker is not None:
        work(arguments.worker, shape, batches[0], precisions[0], arguments.rounds, kinds)
        return
    gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_reference_data(data, shape.rows, schema=shape.schema)
        results = [
            launch(ranks, data, arguments.shape, arguments.steps, batch, precision, arguments.rounds, kinds)
            for ranks in arguments.ranks or ([1] if gpus == 1 else [1, 2])
            for batch in batches
            for precision in precisions
        ]
    print(json.dumps({"machine": facts(), "shape": arguments.shape, "results": results}, indent=1))


if __name__ == "__main__":
    main()
