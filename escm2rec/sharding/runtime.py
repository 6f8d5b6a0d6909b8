"""The ranks of this job: process group, device and who talks."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from escm2rec.errors import Escm2Error, RunError

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
CGROUP_MEMORY = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Runtime:
    """One rank of the job. World size 1 takes the same path as any other."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks for the job."""
        return self.rank == 0

    def memory_bytes(self) -> int:
        """Memory of this rank's device: its GPU, or its share of the machine (of its cgroup, where that is less)."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = CGROUP_MEMORY.read_text(encoding="utf-8").strip() if CGROUP_MEMORY.exists() else "max"
        return min(machine, int(limit) if limit.isdigit() else machine) // self.local_world_size


@contextmanager
def distributed_runtime() -> Iterator[Runtime]:
    """Join the process group that torchrun or TorchX describes in the environment; alone, be a group of one.

    A group that is there already is used and left as it is. The device is this rank's GPU with nccl, or the CPU with gloo.
    """
    quiet_libraries()
    if dist.is_initialized():
        yield _runtime()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        _take_gpu()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    try:
        runtime = _runtime()
        if runtime.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            # Ranks that each take every core fight for them.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // runtime.local_world_size))
        yield runtime
    finally:
        dist.destroy_process_group()
        # gloo's threads live as long as the group, which models in cycles of references keep. One that lets go of its last tensor while
        # Python ends aborts the process, its work done: https://github.com/pytorch/pytorch/issues/190489
        atexit.unregister(gc.collect)
        atexit.register(gc.collect)


def _take_gpu() -> None:
    """Make this rank's GPU the current one, and what it computes the same in every run.

    RunError when there are more ranks than GPUs on this machine.
    """
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > gpus:
        error = RunError(
            f"{ranks} ranks start on a machine of {gpus} GPU(s), and each needs one of its own",
            f"start {gpus} there (--nproc-per-node), or hide the GPUs to use its cores: CUDA_VISIBLE_DEVICES=''",
        )
        error.told_by_rank_0 = os.environ.get("LOCAL_RANK", "0") != "0"  # by the first rank of each such machine
        raise error
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # FBGEMM then adds the gradients of a row in one order, where atomic additions would make one of their own each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # a pass over memory that nothing here reads before it is written


def quiet_libraries() -> None:
    """Silence what torch and TorchRec say of their own insides at every start, so that what is left is worth reading."""
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(is_news)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|torchrec|escm2rec)\.")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|torchrec)\.")


def is_news(record: logging.LogRecord) -> bool:
    """TorchRec's planner warns of each table of data_parallel, by the root logger, that it is not split."""
    return not str(record.msg).startswith("Sharding spec not found for ")


def on_main(runtime: Runtime, work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and give its result to all ranks; what it raises is raised everywhere, so that no rank waits for another."""
    box: list[object] = [None, None]
    failure: Exception | None = None
    if runtime.is_main:
        try:
            box[0] = work()
        except Exception as error:  # told to the other ranks, then raised below
            failure = error
            box[1] = error if isinstance(error, Escm2Error) else RunError(f"rank 0 failed: {type(error).__name__}: {error}")
    dist.broadcast_object_list(box, src=0, group=runtime.group)
    if failure is not None:
        raise failure
    if isinstance(box[1], Escm2Error):
        box[1].told_by_rank_0 = True
        raise box[1]
    return box[0]  # type: ignore[return-value]


def on_each(runtime: Runtime, work: Callable[[], None]) -> None:
    """Do `work` on every rank; what the first of them raises is raised everywhere, when all have ended."""
    told: list[Escm2Error | None] = [None] * runtime.world_size
    mine: Escm2Error | None = None
    try:
        work()
    except Exception as error:
        mine = error if isinstance(error, Escm2Error) else RunError(f"rank {runtime.rank} failed: {type(error).__name__}: {error}")
    dist.all_gather_object(told, mine, group=runtime.group)
    failure = next(filter(None, told), None)
    if failure is not None:
        failure.told_by_rank_0 = not runtime.is_main
        raise failure


def _runtime() -> Runtime:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    group = dist.group.WORLD
    assert group is not None
    return Runtime(dist.get_rank(), dist.get_world_size(), min(local_world_size, dist.get_world_size()), device, group)
