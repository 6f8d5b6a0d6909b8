"""Checkpoints of a sharded model: complete or absent, and loadable on another number of ranks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from escm2rec.errors import DataError, RunError
from escm2rec.folder import read_manifest, write_manifest
from escm2rec.sharding.runtime import Runtime, on_main

KEPT_CHECKPOINTS = 2


def save_checkpoint(
    run: Path, step: int, progress: dict[str, Any], module: DistributedModelParallel, optimizer: CombinedOptimizer, runtime: Runtime
) -> Path:
    """Write `checkpoints/step-N`, beside its place and renamed when whole; older ones beyond the last two are removed.

    `progress` says which batches were trained (not which were read). Called by all ranks.
    """
    folder = run / "checkpoints" / f"step-{step}"
    partial = folder.with_name(f".{folder.name}.partial")

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish() -> None:
        write_manifest(partial, "checkpoint", {"step": step, "progress": progress})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        for old in _checkpoints(run)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    on_main(runtime, prepare)
    try:
        dcp.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=partial)
    except (OSError, CheckpointException) as error:
        raise RunError(
            f"cannot write checkpoint {partial}: {_cause(error)}", "is the disk full? free space and start again with --resume"
        ) from error
    on_main(runtime, finish)
    return folder


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step, if there is one."""
    folders = _checkpoints(run)
    return folders[-1] if folders else None


def load_checkpoint(folder: Path, module: DistributedModelParallel, optimizer: CombinedOptimizer | None = None) -> dict[str, Any]:
    """Load weights, and the optimizer's state when one is given, in place; returns the checkpoint's progress.

    Raises DataError when the checkpoint is incomplete, damaged, or of another model.
    """
    manifest = read_manifest(folder, "checkpoint")
    state: dict[str, Any] = {"model": module.state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    _load(state, folder)
    module.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    progress: dict[str, Any] = manifest["progress"]
    return progress


def load_calibration(folder: Path) -> Tensor:
    """Slope and shift of the propensity's logit, [2], from the checkpoint of a run that calibrates; DataError as in `load_checkpoint`."""
    calibration = torch.tensor([1.0, 0.0])
    _load({"model": {"loss.calibration": calibration}}, folder)  # a buffer of `step.Loss`; read in place
    return calibration


def _load(state: dict[str, Any], folder: Path) -> None:
    try:
        dcp.load(state, checkpoint_id=folder)
    except (OSError, RuntimeError, ValueError, KeyError, json.JSONDecodeError, CheckpointException) as error:
        hint = "it is damaged, or of another model, schema or split of columns; once it is removed, --resume goes on from the one before"
        raise DataError(f"cannot load checkpoint {folder}: {_cause(error)}", hint) from error


def _cause(error: BaseException) -> str:
    """The first thing that went wrong on any rank, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {type(first).__name__}: {(str(first).splitlines() or [''])[0]}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _checkpoints(run: Path) -> list[Path]:
    folders = [path for path in (run / "checkpoints").glob("step-*") if (path / "manifest.json").is_file()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))
