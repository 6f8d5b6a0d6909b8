"""One training step's forward: logits, loss terms, and what is worth logging of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from escm2rec.models.model import Escm2Model
from escm2rec.models.predictions import Predictions
from escm2rec.objectives.imputation import pseudo_label_counts
from escm2rec.objectives.objective import Objective, Phase
from escm2rec.objectives.propensity import PropensitySums, propensity_sums
from escm2rec.objectives.reduction import local_denominators, reduce_terms
from escm2rec.reader.batch import Batch


class StepOutput(NamedTuple):
    """What one step leaves for the logs, all without gradient.

    `shares` are this rank's parts of each global loss term; `pseudo_labels` counts those outside [0, 1] and all of them (imputation of
    labels only).
    """

    shares: dict[str, Tensor]
    ctr_logit: Tensor
    cvr_logit: Tensor
    click: Tensor
    conversion: Tensor
    weight: Tensor
    num_rows: int
    propensity: PropensitySums
    pseudo_labels: Tensor | None


class Loss(nn.Module):
    """Predictions and labels to a loss. It holds no table, so TorchRec's pipelines leave it whole, collectives and branches included.

    `phase` and `warm_up` say what the next step does; the training loop sets them.
    """

    def __init__(self, objective: Objective, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.objective = objective
        self.phase: Phase = objective.phase(0)
        self.warm_up = False
        self._group = group

    def forward(self, predictions: Predictions, batch: Batch) -> tuple[Tensor, StepOutput]:
        """The loss whose gradient, averaged over ranks, is that of the global batch; and the step's output."""
        labels = (batch.click, batch.conversion, batch.weight)
        terms = self.objective.terms(predictions, *labels, phase=self.phase, warm_up=self.warm_up)
        denominators = local_denominators(terms)
        dist.all_reduce(denominators, group=self._group)
        loss, shares = reduce_terms(terms, denominators, dist.get_world_size(self._group))
        return loss, self._output(predictions, batch, shares)

    @torch.no_grad()
    def _output(self, predictions: Predictions, batch: Batch, shares: dict[str, Tensor]) -> StepOutput:
        q = self.objective.propensity(predictions.ctr_logit, self.warm_up)
        counts = None
        if self.objective.needs_imputation and self.objective.imputation.predicts == "label":
            labels = self.objective.pseudo_labels(predictions, batch.click, batch.conversion, self.warm_up)
            counts = pseudo_label_counts(labels[: batch.num_rows])
        return StepOutput(
            shares,
            predictions.ctr_logit.detach(),
            predictions.cvr_logit.detach(),
            batch.click,
            batch.conversion,
            batch.weight,
            batch.num_rows,
            propensity_sums(q, batch.click, batch.weight, self.objective.floor),
            counts,
        )


class TrainingModel(nn.Module):
    """The model and its loss, as TorchRec's training pipeline wants it."""

    def __init__(self, model: Escm2Model, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        """(loss, output) of one batch."""
        result: tuple[Tensor, StepOutput] = self.loss(self.model(batch), batch)
        return result


class ModelOnly(nn.Module):
    """The model alone, under the name that `TrainingModel` gives it, so that a checkpoint fits both."""

    def __init__(self, model: Escm2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Predictions:
        """Logits of a batch."""
        predictions: Predictions = self.model(batch)
        return predictions
