"""The trained model of a run, on the ranks that there are: the one forward of evaluation and scoring."""

from __future__ import annotations

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from escm2rec.models.predictions import Predictions
from escm2rec.reader.batch import Batch
from escm2rec.sharding.runtime import Runtime
from escm2rec.training.build import build_model, shard
from escm2rec.training.checkpoint import load_checkpoint
from escm2rec.training.run import Run
from escm2rec.training.step import ModelOnly


class TrainedModel:
    """A run's model, sharded over the ranks; every call is collective, so all ranks make the same number of calls."""

    def __init__(self, run: Run, runtime: Runtime) -> None:
        model = build_model(run.schema, run.config.model, run.config.objective, run.rates, run.config.training.seed)
        self._runtime = runtime
        self._module: DistributedModelParallel = shard(ModelOnly(model), run.schema, run.config, False, runtime).module
        load_checkpoint(run.checkpoint, self._module)
        self._module.eval()

    @torch.no_grad()  # inference_mode has no kernel for fused training tables
    def __call__(self, batch: Batch) -> Predictions:
        """Logits of the real rows of a batch, on the CPU; its padding is cut off."""
        predictions: Predictions = self._module(batch.to(self._runtime.device))
        return Predictions(predictions.ctr_logit[: batch.num_rows].cpu(), predictions.cvr_logit[: batch.num_rows].cpu())
