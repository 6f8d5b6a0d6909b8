"""How well a model in training does on the validation split, which of its states did best, and whether it is worth going on."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import EvalPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from escm2rec.config import TrainingConfig
from escm2rec.errors import RunError
from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from escm2rec.sharding.runtime import Runtime, on_main
from escm2rec.training.metrics import quality
from escm2rec.training.step import StepOutput

logger = logging.getLogger(__name__)
SORT_TIMEOUT = timedelta(hours=1)


class Validation:
    """Measures a model on the whole validation split; all ranks call it alike. Memory of rank 0: some 200 bytes a row of the split."""

    def __init__(self, dataset: Dataset, training: TrainingConfig, runtime: Runtime) -> None:
        # A group of its own, in which the ranks wait as long as rank 0 takes to sort the split.
        self._runtime = replace(runtime, group=dist.new_group(backend="gloo", timeout=SORT_TIMEOUT))
        self._reader = Reader(
            dataset,
            "validation",
            training.global_batch_size,
            runtime.rank,
            runtime.world_size,
            lanes=runtime.world_size,
            shuffle=False,
            prefetch=training.prefetch_batches,
            decode_threads=training.decode_threads,
            pin_memory=runtime.device.type == "cuda",
        )

    @torch.no_grad()
    def measure(self, module: DistributedModelParallel, optimizer: CombinedOptimizer, step: int) -> dict[str, float]:
        """AUC, log loss and calibration of each task on its population, alike on all ranks; the module must be of no other pipeline.

        RunError when a prediction is not finite: the AUC of such rows would be a number all the same.
        """
        module.eval()
        pipeline = EvalPipelineSparseDist(module, optimizer, self._runtime.device)
        batches, rows = self._reader.epoch(0), []
        for _ in range(self._reader.num_steps):
            output: StepOutput = pipeline.progress(batches)
            rows.append(output.rows())
        pipeline.detach()
        module.train()
        mine = torch.cat(rows, dim=1).cpu().numpy()
        gathered: list[Any] | None = [None] * self._runtime.world_size if self._runtime.is_main else None
        dist.gather_object(mine, gathered, dst=0, group=self._runtime.group)
        return on_main(self._runtime, lambda: _quality(np.concatenate(gathered or [], axis=1), step))

    def close(self) -> None:
        """Drop its group; nothing is measured after it."""
        dist.destroy_process_group(self._runtime.group)


def _quality(rows: np.ndarray[tuple[int, int], np.dtype[np.float32]], step: int) -> dict[str, float]:
    if not np.isfinite(rows[:2]).all():
        raise RunError(
            f"after step {step} predictions of the validation split are not finite: training has diverged",
            "lower training.dense_learning_rate or sparse_learning_rate, or look for extreme values of numeric features",
        )
    return quality(rows)


@dataclass(frozen=True)
class Best:
    """The state of a training that did best so far: when, by how much, and how many states were measured since."""

    metric: str
    step: int
    value: float
    since: int = 0

    @classmethod
    def after(cls, before: Best | None, metric: str, step: int, found: dict[str, float]) -> Best:
        """What is best when `found` is measured after `step`; RunError when it lacks the metric."""
        value = found[metric]
        if not math.isfinite(value):
            raise RunError(
                f"training.keep_best: the validation split has no {metric} after step {step}: it wants clicks, conversions or others",
                "choose another metric, or give data.split a larger share for validation and preprocess again",
            )
        sign = -1 if metric.endswith("log_loss") else 1
        if before is None or sign * value > sign * before.value:
            return cls(metric, step, value)
        return cls(metric, before.step, before.value, before.since + 1)

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint's progress, and back by `Best(**read)`."""
        return asdict(self)
