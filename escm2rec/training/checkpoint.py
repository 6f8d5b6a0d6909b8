"""Checkpoints of a sharded model: complete or absent, written beside the training, and loadable on other ranks under another plan."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.remote_device import _remote_device
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from escm2rec.disk import free_space
from escm2rec.errors import DataError, RunError
from escm2rec.folder import MANIFEST, read_manifest, sha256_of, write_manifest
from escm2rec.sharding.managed import sharded_managed
from escm2rec.sharding.runtime import Runtime, on_main
from escm2rec.sharding.shards import table_of
from escm2rec.training.column_shards import ColumnConversion
from escm2rec.training.managed_rows import dealt_alike, take_rows
from escm2rec.training.owner import Owner
from escm2rec.training.stored import StoredTensors

logger = logging.getLogger(__name__)
OWN = "._output_segments_tensor"  # of a managed table: where the rows of each rank begin, which another number of ranks has otherwise
WRITE_TIMEOUT = timedelta(hours=1)  # how long a rank waits for the slowest disk


class Checkpoints:
    """Writes the checkpoints of a run, one at a time, while training goes on; all ranks call it alike.

    What is written is a copy, in memory, of the state at the time of `save`: tables, towers and what the optimizers hold, once more.
    Used as a context: what is being written is whole when it ends, however it ends.
    """

    def __init__(self, owner: Owner, keep: int, runtime: Runtime, then: Callable[[], None] | None = None) -> None:
        """The newest `keep` stay. What earlier owners of the run did not finish is removed. `then` is done when one is whole."""
        self._owner, self._run, self._keep, self._then = owner, Path(owner.run), keep, then
        on_main(runtime, self._remove_unfinished)
        # A group of its own: what ranks tell each other to write would get between what they tell each other to train.
        self._runtime = replace(runtime, group=dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT))
        self._thread = ThreadPoolExecutor(1, "escm2rec-checkpoint")
        self._writing: Future[None] | None = None

    def _remove_unfinished(self) -> None:
        self._owner.check()  # a later start's are its own
        for left in (self._run / "checkpoints").glob(".step-*.partial"):
            shutil.rmtree(left, ignore_errors=True)

    def save(self, step: int, progress: dict[str, Any], module: DistributedModelParallel, optimizer: CombinedOptimizer) -> None:
        """Begin to write `checkpoints/step-N`; waits for the one before. RunError when that could not be written.

        `progress` says which batches were trained (not which were read), and as `best`, if there is one, which step stays whatever
        comes.
        """
        self.wait()
        state = _copied({"model": module.state_dict(), "optimizer": optimizer.state_dict()})
        self._writing = self._thread.submit(self._write, step, progress, state)

    def check(self) -> None:
        """RunError when the last checkpoint could not be written, as far as that is known."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is whole; RunError when it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown()
            dist.destroy_process_group(self._runtime.group)

    def _write(self, step: int, progress: dict[str, Any], state: dict[str, Any]) -> None:
        folder = checkpoint_of(self._run, step)
        partial = folder.with_name(f".{folder.name}.{self._owner.token}.partial")  # of no other start: its ranks may still write

        def prepare() -> None:
            self._owner.check()
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def finish() -> None:
            told = {name: known for rank in files for name, known in rank.items()}
            self._owner.check()
            write_manifest(partial, "checkpoint", {"step": step, "progress": progress, "files": told})
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            best = progress.get("best")
            for old in whole_checkpoints(self._run)[: -self._keep]:
                if best is None or old.name != f"step-{best['step']}":
                    shutil.rmtree(old, ignore_errors=True)

        on_main(self._runtime, prepare)
        try:
            dcp.save(state, checkpoint_id=partial, process_group=self._runtime.group)
        except (OSError, CheckpointException) as error:
            self._owner.check()  # a later start of the training removes what this one did not finish
            hint = "is the disk full? make room there, then start again with --resume: it goes on from the checkpoint before"
            raise RunError(f"cannot write checkpoint {partial}: {_cause(error)}; {free_space(self._run)}", hint) from error
        files = self._gathered(_files_of(partial, self._runtime.rank))
        on_main(self._runtime, finish)
        if self._then is not None:
            self._then()

    def _gathered(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        every: list[dict[str, Any]] = [{}] * self._runtime.world_size
        dist.all_gather_object(every, mine, group=self._runtime.group)
        return every


def _copied(state: Any) -> Any:
    """A state in memory of its own, on the CPU; shards stay shards, of the same places."""
    if isinstance(state, ShardedTensor):
        shards = [Shard(shard.tensor.detach().to("cpu", copy=True), _on_cpu(shard.metadata)) for shard in state.local_shards()]
        metadata = copy.copy(state.metadata())
        metadata.shards_metadata = [_on_cpu(each) for each in metadata.shards_metadata]
        return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, process_group=state._process_group)
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {name: _copied(value) for name, value in state.items()}
    return [_copied(value) for value in state] if isinstance(state, list | tuple) else copy.deepcopy(state)


def _on_cpu(metadata: Any) -> Any:
    moved = copy.copy(metadata)
    moved.placement = _remote_device(f"rank:{metadata.placement.rank()}/cpu")
    return moved


def _files_of(folder: Path, rank: int) -> dict[str, Any]:
    """Bytes and checksum of what a rank wrote (rank 0 the index too), which is on disk after it."""
    found = {}
    for path in sorted([*folder.glob(f"__{rank}_*"), *(folder.glob(".metadata") if rank == 0 else [])]):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        found[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return found


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step, if there is one."""
    folders = whole_checkpoints(run)
    return folders[-1] if folders else None


def checkpoint_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, if there is one."""
    return run / "checkpoints" / f"step-{step}"


def remove_checkpoints_after(run: Path, step: int) -> None:
    """Remove the complete checkpoints of later steps."""
    for folder in whole_checkpoints(run):
        if step_of(folder) > step:
            shutil.rmtree(folder, ignore_errors=True)


def last_good_checkpoint(run: Path, runtime: Runtime) -> Path | None:
    """The complete checkpoint of the highest step that is not damaged; None where there is none at all. Called by all ranks.

    Newer ones that are damaged are told of. DataError when every one is.
    """
    folders = on_main(runtime, lambda: whole_checkpoints(run))
    for folder in reversed(folders):
        said = damage(folder, runtime)
        if said is None:
            return folder
        if runtime.is_main:
            logger.warning("checkpoint %s is damaged and passed over: %s", folder, said)
    if not folders:
        return None
    names = ", ".join(folder.name for folder in folders)
    raise DataError(f"every checkpoint of {run} is damaged ({names})", "train again, with --overwrite")


def damage(folder: Path, runtime: Runtime) -> str | None:
    """What is wrong with the files of a complete checkpoint, by size and checksum; each rank looks at its share. Called by all ranks."""
    try:
        files = sorted(on_main(runtime, lambda: read_manifest(folder, "checkpoint").get("files", {})).items())
    except DataError as error:
        return error.message
    said: list[str | None] = [None] * runtime.world_size
    mine = (_damage_of(folder / name, known) for name, known in files[runtime.rank :: runtime.world_size])
    dist.all_gather_object(said, next(filter(None, mine), None), group=runtime.group)
    return next(filter(None, said), None)


def _damage_of(path: Path, known: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != known["bytes"]:
            return f"{path.name} has {size:,} bytes, {known['bytes']:,} were written"
        return None if sha256_of(path) == known["sha256"] else f"{path.name} does not hold what was written (SHA-256)"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"


def load_checkpoint(folder: Path, module: DistributedModelParallel, optimizer: CombinedOptimizer | None = None) -> dict[str, Any]:
    """Load weights, and the optimizer's state when one is given, in place; returns the checkpoint's progress.

    It may be of other ranks and another plan; where that split a table's columns otherwise, what the optimizer holds for a row is converted
    (`column_shards.py`), and the log says so; of managed tables each rank takes the rows of its values (`managed_rows.py`). Raises
    DataError when the checkpoint is incomplete, cannot be read, or is of another model. `damage` says whether it holds what was written.
    """
    manifest = read_manifest(folder, "checkpoint")
    state: dict[str, Any] = {"model": module.state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    own = {name: state["model"].pop(name) for name in [*state["model"]] if name.endswith(OWN)}
    load_into(state, folder)
    module.load_state_dict(state["model"] | own)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    _load_managed(folder, module, {} if optimizer is None else state["optimizer"]["state"])
    progress: dict[str, Any] = manifest["progress"]
    return progress


def _load_managed(folder: Path, module: DistributedModelParallel, states: dict[str, Any]) -> None:
    """What cannot be read of managed tables as other tensors are, because ranks had other ranges of values."""
    for tables in sharded_managed(module):
        stored = StoredTensors(folder)
        for table, rows in tables.values():
            if dealt_alike(stored, table, rows):
                continue
            own = (state for name, state in states.items() if name.startswith("tables.") and table_of(name) == table)
            of_table: dict[str, Any] = next(own, {})
            _, left = take_rows(stored, tables, table, rows, of_table)
            if left:
                logger.warning(
                    "managed table %r: %d values that have a row in %s find none, as ranks have other shares of the rows; they begin anew",
                    table,
                    left,
                    folder,
                )


def load_calibration(folder: Path) -> Tensor:
    """Slope and shift of the propensity's logit, [2], from the checkpoint of a run that calibrates; DataError as in `load_checkpoint`."""
    calibration = torch.tensor([1.0, 0.0])
    load_into({"model": {"loss.calibration": calibration}}, folder)  # a buffer of `step.Loss`; read in place
    return calibration


def load_into(state: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of a part of a checkpoint's state in place; DataError as in `load_checkpoint`."""
    conversion = ColumnConversion()
    try:
        dcp.load(state, checkpoint_id=folder, planner=conversion)
    except (OSError, RuntimeError, ValueError, KeyError, json.JSONDecodeError, CheckpointException) as error:
        raise DataError(f"cannot load checkpoint {folder}: {_cause(error)}", "it is of another model or schema, or damaged") from error
    conversion.finish()
    if conversion.tables and dist.get_rank() == 0:
        logger.warning(
            "%s splits the columns of %s otherwise than this plan does: what their optimizer holds for each row and column shard becomes "
            "the mean over the old shards that share columns with the new one, weighted by how many, and a copy where a shard is split; "
            "what follows is not what an undisturbed run would do",
            folder,
            ", ".join(sorted(conversion.tables)),
        )


def _cause(error: BaseException) -> str:
    """The first thing that went wrong on any rank, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {type(first).__name__}: {(str(first).splitlines() or [''])[0]}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def whole_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints, in the order of their steps."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if (path / MANIFEST).is_file()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """Of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))
