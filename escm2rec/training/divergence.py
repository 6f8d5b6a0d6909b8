"""A loss that is not finite, skipped or the end of the training: which step, whose rows, which term, and the batches are kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from escm2rec.errors import RunError
from escm2rec.reader.batch import Batch
from escm2rec.sharding.runtime import Runtime
from escm2rec.training.run import DIVERGED
from escm2rec.training.step import StepOutput

logger = logging.getLogger(__name__)

AHEAD = 4  # batches that the pipeline may have taken beyond the step that is looked at, and that step's own


class Landing:
    """Losses on their way from the device: a wait for them is one for their own step, not for those that were queued after it."""

    def __init__(self, losses: dict[str, Tensor]) -> None:
        self._names = list(losses)
        self._values = torch.stack([value.detach() for value in losses.values()]) if losses else torch.zeros(0)
        self._event: torch.cuda.Event | None = None
        if self._values.is_cuda:
            self._values = self._values.to("cpu", non_blocking=True)  # to pinned memory
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def losses(self) -> dict[str, float]:
        """The losses, when they are there."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


class Divergence:
    """Looks at the losses of each step when the next one is done, so that a GPU need not wait; all ranks call it alike.

    `skipped` counts the steps that `Loss` skipped; so many as `allowed` are told in a warning by rank 0, one more ends the run. The
    batches that are kept are those of `allowed` + 1 steps at most, and of the steps before them.
    """

    def __init__(self, run: Path, runtime: Runtime, allowed: int = 0) -> None:
        self._run, self._runtime, self._allowed = run, runtime, allowed
        self.skipped = 0  # a training that goes on counts on from its checkpoint's
        self._batches: dict[int, Batch] = {}
        self._waiting: tuple[int, StepOutput, Landing] | None = None

    def watch(self, batches: Iterator[Batch], done: int) -> Iterator[Batch]:
        """The same batches, of the steps after `done`; the latest are held."""
        for step, batch in enumerate(batches, done + 1):
            self._batches[step] = batch
            self._batches.pop(step - AHEAD - 2, None)
            yield batch

    def add(self, step: int, output: StepOutput) -> None:
        """Take a step, and look at the one before; RunError as in `look`."""
        landing = Landing(output.losses)
        self.look()
        self._waiting = step, output, landing
        if output.skipped:  # so its losses are known
            self.look()

    def look(self) -> None:
        """RunError on all ranks when a loss of the step taken last is not finite, and no more steps may be skipped."""
        if self._waiting is None:
            return
        (step, output, landing), self._waiting = self._waiting, None
        losses = landing.losses()  # of the global batch: alike on all ranks
        if all(map(math.isfinite, losses.values())):
            return
        found, kept = self._found(step, output, losses), f"{self._run / DIVERGED} holds its batches and those of the step before"
        if not output.skipped or self.skipped >= self._allowed:
            raise self._error(found, kept)
        self.skipped += 1
        if self._runtime.is_main:
            allowed = f"skipped, {self.skipped} of {self._allowed} that training.max_skipped_steps allows"
            logger.warning("%s: the step trained nothing (%s); %s", found, allowed, kept)

    def _found(self, step: int, output: StepOutput, losses: dict[str, float]) -> str:
        """What is not finite, where and whose; the batches are kept."""
        mine = not bool(torch.isfinite(torch.stack([output.ctr_logit, output.cvr_logit])[:, : output.num_rows]).all())
        ranks: list[bool] = [False] * self._runtime.world_size
        dist.all_gather_object(ranks, mine, group=self._runtime.group)
        if mine or not any(ranks):
            self._keep(step)
        whose = ", ".join(str(rank) for rank, theirs in enumerate(ranks) if theirs)
        name, value = next((name, value) for name, value in losses.items() if not math.isfinite(value))
        seen = f"by predictions of rank {whose} that are not finite" if whose else "with finite predictions on every rank"
        return f"loss_{name} is {value} in step {step}, {seen}"

    def _error(self, found: str, kept: str) -> RunError:
        after = f" after {self.skipped} skipped step(s), all that training.max_skipped_steps allows" if self.skipped else ""
        error = RunError(
            f"{found}: training has diverged{after}; {kept}",
            "lower training.dense_learning_rate or sparse_learning_rate, or look for extreme values of numeric features there; "
            "training.max_skipped_steps, which may change with --resume, says how many such steps are skipped",
        )
        error.told_by_rank_0 = not self._runtime.is_main
        return error

    def _keep(self, step: int) -> None:
        folder = self._run / DIVERGED
        folder.mkdir(exist_ok=True)
        for each in (step - 1, step):
            if each in self._batches:
                np.savez(folder / f"step-{each}-rank-{self._runtime.rank}.npz", **arrays_of(self._batches[each]))


def arrays_of(batch: Batch) -> dict[str, Any]:
    """What a batch holds, by name; of ids `keys`, `values` and `lengths` (a row of impressions a key)."""
    arrays: dict[str, Any] = {name: getattr(batch, name).cpu().numpy() for name in ("numeric", "click", "conversion", "weight")}
    arrays["num_rows"] = np.array(batch.num_rows)
    for name in ("features", "weighted_features", "managed_features"):
        ids: KeyedJaggedTensor | None = getattr(batch, name)
        if ids is not None:
            arrays |= {f"{name}.keys": np.array(ids.keys()), f"{name}.values": ids.values().cpu().numpy()}
            arrays[f"{name}.lengths"] = ids.lengths().cpu().numpy().reshape(len(ids.keys()), -1)
            if (weights := ids.weights_or_none()) is not None:
                arrays[f"{name}.weights"] = weights.cpu().numpy()
    return arrays
