"""The trained model of a run, on the ranks that there are: the one forward of evaluation and scoring."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from escm2rec.errors import DataError
from escm2rec.models.predictions import Predictions
from escm2rec.objectives.objective import Stage
from escm2rec.reader.batch import Batch
from escm2rec.sharding.runtime import Runtime
from escm2rec.training.build import build_model, build_objective, shard
from escm2rec.training.checkpoint import damage, load_calibration, load_checkpoint
from escm2rec.training.optimizer import load_averages
from escm2rec.training.run import Run
from escm2rec.training.step import ModelOnly


class TrainedModel:
    """A run's model, sharded over the ranks; every call is collective, so all ranks make the same number of calls."""

    def __init__(self, run: Run, runtime: Runtime) -> None:
        training = run.config.training
        model = build_model(run.schema, run.config.model, run.config.objective, run.rates, training.seed, training.in_bfloat16)
        self._runtime = runtime
        self._module: DistributedModelParallel = shard(ModelOnly(model), run.schema, run.config, runtime).module
        if (said := damage(run.checkpoint, runtime)) is not None:
            raise DataError(
                f"checkpoint {run.checkpoint} is damaged: {said}", "train with --resume goes on from one before, if there is one"
            )
        load_checkpoint(run.checkpoint, self._module)
        if training.ema_decay is not None:
            load_averages(run.checkpoint, self._module)
        self._module.eval()
        # A cross-fitted q is of the training rows alone: other rows are weighed by the CTR tower's.
        self.objective = replace(build_objective(run.config.objective, run.rates.ctr), given=False)
        calibrates = run.config.objective.propensity.calibration != "none"
        self.calibration = load_calibration(run.checkpoint) if calibrates else None

    @torch.no_grad()  # inference_mode has no kernel for fused training tables
    def __call__(self, batch: Batch) -> Predictions:
        """Logits of the real rows of a batch, on the CPU; its padding is cut off.

        Those of CTR and CVR, and of the propensity where it has a tower of its own.
        """
        predictions: Predictions = self._module(batch.to(self._runtime.device))
        own, rows = predictions.propensity_logit, batch.num_rows
        return Predictions(
            predictions.ctr_logit[:rows].cpu(),
            predictions.cvr_logit[:rows].cpu(),
            propensity_logit=None if own is None else own[:rows].cpu(),
        )

    def propensity(self, predictions: Predictions) -> Tensor:
        """q, [B], as the run's last steps weighed by it: of its own tower, calibrated and floored as the run's config says."""
        return self.objective.propensity(predictions, Stage("cvr", calibration=self.calibration))

    def click_probability(self, predictions: Predictions) -> Tensor:
        """p_hat, [B]: what q is before the floor."""
        return replace(self.objective, floor=0.0).propensity(predictions, Stage("cvr", calibration=self.calibration))
