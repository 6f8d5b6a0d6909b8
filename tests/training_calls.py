"""What the ranks of the tests do, with arguments that fit into JSON."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from escm2rec.config import load_config
from escm2rec.errors import DataError
from escm2rec.evaluation.evaluate import evaluate
from escm2rec.paths import RemotePath, data_path, store_path
from escm2rec.planning import calibrate
from escm2rec.planning.tables import Table, Tables
from escm2rec.reader.batch import Batch
from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from escm2rec.scoring.options import Options
from escm2rec.scoring.score import score
from escm2rec.sharding.followed import follow
from escm2rec.sharding.planner import sharders
from escm2rec.sharding.runtime import distributed_runtime, on_main
from escm2rec.sharding.shards import held, table_of
from escm2rec.training.metrics import TrainingMetrics
from escm2rec.training.optimizer import TableSteps
from escm2rec.training.owner import Owner
from escm2rec.training.run import Run, start_run
from escm2rec.training.step import StepOutput
from escm2rec.training.train import train
from escm2rec.training.trained import TrainedModel
from escm2rec.training.trainer import Trainer
from escm2rec.training.warm_start import take_from
from tests.encoded import config


def train_run(
    data: str, out: str, overrides: list[str], resume: bool = False, overwrite: bool = False, copy_to: str | None = None
) -> dict[str, Any]:
    """Train with the tests' config."""
    return train(config(*overrides), Path(data), Path(out), resume, overwrite, copy_to=copy_to)


def calibrate_small(out: str) -> dict[str, Any]:
    """`plan calibrate` of small tables and messages."""
    with (
        patch.object(calibrate, "ROWS", 2_000),
        patch.object(calibrate, "MESSAGE_BYTES", (2**14, 2**18)),
        patch.object(calibrate, "WHOLE_TABLES", ((100, 64), (1_000, 64))),
    ):
        return calibrate.calibrate("here", Path(out), overwrite=False)


def train_on_failing_store(data: str, out: str, overrides: list[str], copy_to: str, name: str, of_rank: int) -> dict[str, Any]:
    """`train_run` whose copy of one file fails on a rank."""
    put = RemotePath.put

    def put_or_fail(self: RemotePath, source: Path) -> None:
        if str(self).endswith(name) and dist.get_rank() == of_rank:
            raise DataError(f"cannot write {self}: ConnectionError: gone")
        put(self, source)

    RemotePath.put = put_or_fail  # type: ignore[method-assign]
    try:
        return train_run(data, out, overrides, copy_to=copy_to)
    finally:
        RemotePath.put = put  # type: ignore[method-assign]


def lose(run: str, copy: str, step: int) -> None:
    """Let a run vanish, and its copy be what it is when a training ends between the files and the manifest of a checkpoint."""
    if dist.get_rank() == 0:
        shutil.rmtree(run)
        for name in ("manifest.json", f"checkpoints/step-{step}/manifest.json"):
            (store_path(copy) / name).remove()
    dist.barrier()


def keep(source: str, to: str) -> None:
    """Copy a folder before the next call replaces it."""
    if dist.get_rank() == 0:
        shutil.copytree(source, to)
    dist.barrier()


def cut_off(run: str, step: int) -> None:
    """Make a finished run one that was cut off before it saved this step."""
    if dist.get_rank() == 0:
        shutil.rmtree(Path(run) / "checkpoints" / f"step-{step}")
        (Path(run) / "manifest.json").unlink()
    dist.barrier()


def count_of_tables(data: str, out: str, overrides: list[str], kind: str, resume: bool = False) -> list[int]:
    """How many steps FBGEMM counts at the end of a training whose tables are told of them as if `kind` stepped them."""
    with distributed_runtime() as runtime:
        dataset = Dataset.open(Path(data))
        if not resume:
            start_run(Path(out), config(*overrides), dataset, resume=False, overwrite=True)
        trainer = Trainer(config(*overrides), dataset, Path(out), runtime)
        every = TableSteps(trainer.module, "adam")._tables
        trainer.table_steps = TableSteps(trainer.module, kind)  # type: ignore[arg-type]
        owner = Owner.take(Path(out), runtime)
        if resume:
            trainer.resume()
        trainer.train(owner)
    return [int(table.iter_cpu.item()) for table in every]


@contextmanager
def in_step(at_step: int, of_rank: int, act: Callable[[], None]) -> Iterator[None]:
    """`act` once, on one rank, when it has done so many steps and not yet looked at the last one."""
    add, done = TrainingMetrics.add, 0

    def add_and_act(self: TrainingMetrics, output: StepOutput) -> None:
        nonlocal done
        add(self, output)
        done += 1
        if done == at_step and dist.get_rank() == of_rank:
            act()

    TrainingMetrics.add = add_and_act  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainingMetrics.add = add  # type: ignore[method-assign]


def train_on_full_disk(data: str, out: str, overrides: list[str], at_step: int) -> dict[str, Any]:
    """`train_run`, in which the disk of `out` fills while rank 0 does a step; what fills it is the file `filler`."""

    def fill() -> None:
        with suppress(OSError), (Path(out).parent / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))

    with in_step(at_step, 0, fill):
        return train_run(data, out, overrides)


def train_until_told(data: str, out: str, overrides: list[str], at_step: int, of_rank: int, resume: bool = False) -> dict[str, Any]:
    """`train_run`, in which a rank gets SIGTERM while it does a step."""
    with in_step(at_step, of_rank, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        return train_run(data, out, overrides, resume)


def table_states(data: str, out: str, overrides: list[str]) -> dict[str, list[float]]:
    """Row-wise Adagrad's state of each table as a training that is resumed begins with it, from all ranks."""
    with distributed_runtime() as runtime:
        trainer = Trainer(config(*overrides), Dataset.open(Path(data)), Path(out), runtime)
        trainer.resume()
        states = [state for each in trainer.optimizer.state_dict()["state"].values() for state in each.items()]
        tables = [(name.removesuffix(".momentum1"), state) for name, state in states if name.endswith(".momentum1")]
        if not runtime.is_main:  # which has those that every rank holds
            tables = [(name, state) for name, state in tables if isinstance(state, ShardedTensor)]
        mine = [(name, part.offsets[0], part.tensor.tolist()) for name, state in tables for part in held(state)]
        every: list[list[tuple[str, int, list[float]]]] = [[]] * runtime.world_size
        dist.all_gather_object(every, mine, group=runtime.group)
    found: dict[str, list[float]] = {}
    for name, start, values in sorted(chain.from_iterable(every)):
        assert start == len(found.setdefault(name, [])), "each place once"
        found[name] += values
    return found


def shards_held(data: str, out: str, overrides: list[str]) -> dict[str, list[list[Any]]]:
    """What each rank of a built model holds of every table: rank, offsets and sizes of each part, of all ranks."""
    with distributed_runtime() as runtime:
        trainer = Trainer(config(*overrides), Dataset.open(Path(data)), Path(out), runtime)
        named = {table_of(name): each for name, each in trainer.module.state_dict().items() if ".embedding_bags." in name}
        mine = [(name, runtime.rank, part.offsets, tuple(part.tensor.shape)) for name, each in named.items() for part in held(each)]
        every: list[list[tuple[Any, ...]]] = [[]] * runtime.world_size
        dist.all_gather_object(every, mine, group=runtime.group)
    found: dict[str, list[list[Any]]] = {}
    for name, *part in sorted(chain.from_iterable(every)):
        found.setdefault(name, []).append(part)
    return found


def step_by_plan(plan: str, rows: int, dimension: int, steps: int) -> list[list[float]]:
    """Weights of one table after steps of row-wise Adagrad by a plan; `stepped_alone` in test_planning_followed.py takes the same ones."""
    with distributed_runtime() as runtime:
        model = nn.Module()
        model.embeddings = Tables([Table(name="table", rows=rows, dimension=dimension)], "rowwise_adagrad")
        followed = follow(Path(plan), model, runtime.world_size, runtime.local_world_size, runtime.device.type)
        env = ShardingEnv.from_process_group(runtime.group)
        sharded = DistributedModelParallel(model, env=env, device=runtime.device, plan=followed, sharders=sharders())
        (weights,) = [each for name, each in sharded.state_dict().items() if name.endswith(".weight")]
        whole = initial(rows, dimension)
        for part in held(weights):
            (row, column), (height, width) = part.offsets, part.tensor.shape
            part.tensor.copy_(whole[row : row + height, column : column + width])
        for step in range(steps):
            ids, coefficients = looked_up(step, runtime.rank, rows, dimension)
            batch = KeyedJaggedTensor(["table"], ids, lengths=torch.ones(len(ids), dtype=torch.int64))
            (sharded.module.embeddings.collection(batch).values() * coefficients).sum().backward()
        mine = [(part.offsets, part.tensor) for part in held(weights)]
        every: list[list[tuple[tuple[int, ...], torch.Tensor]]] = [[]] * runtime.world_size
        dist.all_gather_object(every, mine, group=runtime.group)
    for (row, column), tensor in chain.from_iterable(every):
        whole[row : row + tensor.shape[0], column : column + tensor.shape[1]] = tensor
    return cast(list[list[float]], whole.tolist())


def initial(rows: int, dimension: int) -> torch.Tensor:
    """Weights to begin with."""
    return torch.arange(rows * dimension, dtype=torch.float32).view(rows, dimension).sin()


def looked_up(step: int, rank: int, rows: int, dimension: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a rank's batch, some of them twice, and what the outputs are weighed by."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(rows, (16,), generator=draw), torch.randn(16, dimension, generator=draw)


def train_with_bad_steps(data: str, out: str, overrides: list[str], bad: list[int], gone: bool = False, resume: bool = False) -> Any:
    """`train_run`, in which the last rank's batches of some steps hold a number that is none; or, `gone`, those steps are never there."""
    made, begin = Trainer._batches, Trainer.train

    def spoilt(self: Trainer) -> Iterator[Batch]:
        for step, batch in enumerate(made(self), self.step + 1):
            if step in bad and dist.get_rank() == dist.get_world_size() - 1:
                batch.numeric[0, 0] = torch.nan
            if not (gone and step in bad):
                yield batch

    def shortened(self: Trainer, owner: Owner, profiles: bool = False) -> dict[str, Any]:
        self.total_steps -= len(bad) if gone else 0
        return begin(self, owner, profiles)

    Trainer._batches, Trainer.train = spoilt, shortened  # type: ignore[method-assign]
    try:
        return train_run(data, out, overrides, resume)
    finally:
        Trainer._batches, Trainer.train = made, begin  # type: ignore[method-assign]


def train_profiled(data: str, out: str, overrides: list[str], slower_s: float = 0.0) -> dict[str, Any]:
    """`train_run` with a profile, and a reader that takes so much longer a batch."""
    made = Trainer._batches

    def slowed(self: Trainer) -> Iterator[Batch]:
        for batch in made(self):
            time.sleep(slower_s)
            yield batch

    Trainer._batches = slowed  # type: ignore[method-assign]
    try:
        return train(config(*overrides), Path(data), Path(out), profile=True)
    finally:
        Trainer._batches = made  # type: ignore[method-assign]


def train_beside_another(data: str, out: str, overrides: list[str], at_step: int) -> dict[str, Any]:
    """`train_run`, in which a later start of the same training goes on from its checkpoint, to the end, while it does a step."""
    with in_step(at_step, 0, lambda: train_elsewhere(data, out, overrides)):
        return train_run(data, out, overrides)


def resume_after_another(data: str, out: str, overrides: list[str]) -> dict[str, Any]:
    """`train_run` with `resume`, in which a later start trains to the end while this one has loaded its checkpoint and not yet begun."""
    resume = Trainer.resume

    def resume_late(self: Trainer) -> None:
        resume(self)
        train_elsewhere(data, out, overrides)

    Trainer.resume = resume_late  # type: ignore[method-assign]
    try:
        return train_run(data, out, overrides, resume=True)
    finally:
        Trainer.resume = resume  # type: ignore[method-assign]


def train_elsewhere(data: str, out: str, overrides: list[str]) -> None:
    """Resume a training in a process of its own, as another launch."""
    path = Path(out).with_suffix(".json")
    path.write_text(config(*overrides).model_dump_json())
    command = [sys.executable, "-m", "escm2rec", "train", "--config", str(path), "--data", data, "--out", out, "--resume"]
    # Alone: what torchrun told this rank is not for it.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "WORLD", "RANK", "LOCAL", "MASTER"))
    }
    subprocess.run(command, env=environment, check=True, timeout=120, stdout=subprocess.DEVNULL)


def flip(file: str) -> None:
    """Change one bit of a file."""
    if dist.get_rank() == 0:
        content = bytearray(Path(file).read_bytes())
        content[len(content) // 2] ^= 1
        Path(file).write_bytes(content)
    dist.barrier()


def train_file(
    config_file: str,
    data: str,
    out: str,
    overrides: list[str] | None = None,
    warm_start: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train with a config file."""
    source = None if warm_start is None else Path(warm_start)
    return train(load_config(config_file, overrides or []), Path(data), Path(out), resume, overwrite, warm_start=source)


def begin(config_file: str, data: str, out: str, overrides: list[str], warm_start: str | None = None) -> None:
    """Save what a training begins with, as `OUT/beginning`, and train nothing."""
    asked, dataset = load_config(config_file, overrides), Dataset.open(data)
    with distributed_runtime() as runtime:
        source = on_main(
            runtime, lambda: start_run(Path(out), asked, dataset, False, False, None if warm_start is None else Path(warm_start))
        )
        trainer = Trainer(asked, dataset, Path(out), runtime)
        if source is not None:
            take_from(source, asked, dataset.schema, Path(out), trainer.module, trainer.optimizer, runtime)
        state = {"model": trainer.module.state_dict(), "optimizer": trainer.optimizer.state_dict()}
        dcp.save(state, checkpoint_id=Path(out) / "beginning")


def logits(run: str, data: str, split: str) -> list[list[float]]:
    """CTR and CVR logit of every row of a split, on one rank."""
    with distributed_runtime() as runtime:
        model = TrainedModel(Run.open(Path(run)), runtime)
        found = [model(batch) for batch in Reader(Dataset.open(data), split, 256, shuffle=False).epoch(0)]  # type: ignore[arg-type]
    return [torch.cat([getattr(each, name) for each in found]).tolist() for name in ("ctr_logit", "cvr_logit")]


def evaluate_run(run: str, data: str, split: str = "test", by: list[str] | None = None) -> dict[str, Any]:
    """Evaluate a run."""
    return evaluate(data_path(run), Path(data), split, by or [], overwrite=True)  # type: ignore[arg-type]


def score_run(run: str, inputs: list[str], out: str, **options: Any) -> dict[str, Any]:
    """Score files with a run."""
    return score(data_path(run), inputs, Path(out), Options(**options))


def propensities(run: str, data: str, split: str) -> dict[str, float]:
    """sum o / q over the rows of a split, of q with the last slope and shift that training logged; and of the CTR tower as it is."""
    opened, dataset = Run.open(Path(run)), Dataset.open(Path(data))
    logged = opened.manifest["last_metrics"]
    with distributed_runtime() as runtime:
        model = TrainedModel(opened, runtime)
        found = {"mean_weight": 0.0, "of_ctr_tower": 0.0}
        for batch in Reader(dataset, split, 256, shuffle=False).epoch(0):  # type: ignore[arg-type]
            logits, click = model(batch), batch.click[: batch.num_rows]
            own = logits.ctr_logit if logits.propensity_logit is None else logits.propensity_logit
            calibrated = logged.get("propensity_slope", 1.0) * own + logged.get("propensity_shift", 0.0)
            for name, logit in zip(found, (calibrated, logits.ctr_logit), strict=True):
                found[name] += float((click / torch.sigmoid(logit).clamp(min=0.1 * opened.manifest["base_ctr"])).sum())
    return {name: total / dataset.split_counts(split)["rows"] for name, total in found.items()}  # type: ignore[arg-type]


def train_until_told_file(config_file: str, data: str, out: str, overrides: list[str], at_step: int, of_rank: int) -> dict[str, Any]:
    """`train_file`, in which a rank gets SIGTERM while it does a step."""
    with in_step(at_step, of_rank, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        return train_file(config_file, data, out, overrides)
