"""One training step's forward: logits, loss terms, and what is worth logging of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from escm2rec.models.model import Escm2Model
from escm2rec.models.predictions import Predictions
from escm2rec.objectives.calibration import NEWTON_STEPS, CalibrationKind, calibration_sums, newton_step
from escm2rec.objectives.imputation import pseudo_label_counts
from escm2rec.objectives.objective import Objective, Stage
from escm2rec.objectives.propensity import PropensitySums, propensity_sums
from escm2rec.objectives.reduction import local_sums, reduce_terms
from escm2rec.objectives.weights import Learned
from escm2rec.reader.batch import Batch

CALIBRATION_PACE = 0.2  # how far a held-out batch moves the calibration towards its own fit: the latest few decide


class StepOutput(NamedTuple):
    """What one step leaves for the logs, all without gradient. Of a step that only predicts: no losses, no propensity.

    `losses` are the unscaled terms of the global batch; `term_weights` those that are learned; `pseudo_labels` counts those outside
    [0, 1] and all of them (where imputed labels teach the CVR tower). `skipped`: the step has trained nothing.
    """

    losses: dict[str, Tensor]
    term_weights: dict[str, Tensor]
    ctr_logit: Tensor
    cvr_logit: Tensor
    click: Tensor
    conversion: Tensor
    weight: Tensor
    num_rows: int
    propensity: PropensitySums | None
    pseudo_labels: Tensor | None
    skipped: bool = False

    def rows(self) -> Tensor:
        """CTR and CVR logit, click, conversion and weight of the real rows, [5, B]."""
        return torch.stack([self.ctr_logit, self.cvr_logit, self.click, self.conversion, self.weight])[:, : self.num_rows]


class Loss(nn.Module):
    """Predictions and labels to a loss. It holds no table, so TorchRec's pipelines leave it whole, collectives and branches included.

    `stage` says what the next step does; the training loop sets it. Learned term weights are its parameters (`weights.Learned`). In a
    step of phase "calibration" nothing has a gradient: the batch only refits `calibration`, the slope and shift of q's logit.

    With `skips` nothing has one either in a step whose losses are not all finite: no table, weight or state of an optimizer changes, but
    for rows of managed tables, which were given before the loss was known. That reads a number back in each step, for which a GPU's queue
    runs empty. Not caught are finite losses whose gradients, or the squares of them, overflow, as at logits of 1e30: a weight that becomes
    NaN makes the losses of the next step so, one whose second moment becomes infinite moves no more. Nor is a step of phase "calibration",
    which has no losses.
    """

    calibration: Tensor
    fits: Tensor

    def __init__(
        self, objective: Objective, group: dist.ProcessGroup, calibrates: CalibrationKind | None = None, skips: bool = False
    ) -> None:
        super().__init__()
        self.objective = objective
        self.stage = Stage(objective.phase(0))
        self._group = group
        self.calibrates, self.skips = calibrates, skips
        self.skipped = False  # the last step
        if calibrates is not None:
            self.register_buffer("calibration", torch.tensor([1.0, 0.0]))
            self.register_buffer("fits", torch.tensor(0.0))
        learned = {"cvr": objective.lambda_c, "ctcvr": objective.lambda_g}
        names = [name for name, weight in learned.items() if isinstance(weight, Learned)]
        self.log_variances = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in names})

    def forward(self, predictions: Predictions, batch: Batch) -> tuple[Tensor, StepOutput]:
        """The loss whose gradient, averaged over ranks, is that of the global batch; and the step's output."""
        if self.objective.given:
            predictions = predictions._replace(propensity_logit=batch.propensity_logit)
        stage = self.stage if self.calibrates is None else self.stage._replace(calibration=self.calibration)
        if stage.phase == "calibration":
            self._refit(predictions, batch)
            return _felt_by_nothing(predictions), self._output(predictions, batch, {}, stage)
        terms = self.objective.terms(predictions, batch.click, batch.conversion, batch.weight, stage)
        learned = {name: s for name, s in self.log_variances.items() if name in terms}
        terms |= {name: terms[name]._replace(scale=torch.exp(-s.detach())) for name, s in learned.items()}
        sums = local_sums(terms)
        dist.all_reduce(sums, group=self._group)
        loss, losses = reduce_terms(terms, sums, dist.get_world_size(self._group))
        for name, s in learned.items():
            loss = loss + torch.exp(-s) * losses[name].clamp(min=0) + s / 2
        # Of the global batch: alike on all ranks.
        self.skipped = self.skips and not bool(torch.stack(list(losses.values())).isfinite().all())
        output = self._output(predictions, batch, losses, stage)
        return (_felt_by_nothing(predictions), output._replace(skipped=True)) if self.skipped else (loss, output)

    @torch.no_grad()
    def _refit(self, predictions: Predictions, batch: Batch) -> None:
        assert self.calibrates is not None
        fit, logit = torch.tensor([1.0, 0.0], device=self.calibration.device), self.objective.propensity_logit(predictions)
        for _ in range(NEWTON_STEPS):
            sums = calibration_sums(logit, batch.click, batch.weight, fit)
            dist.all_reduce(sums, group=self._group)
            fit = newton_step(fit, sums, self.calibrates)
        self.fits += 1
        self.calibration.lerp_(fit, torch.clamp(1 / self.fits, min=CALIBRATION_PACE))  # the mean of the first few

    @torch.no_grad()
    def _output(self, predictions: Predictions, batch: Batch, losses: dict[str, Tensor], stage: Stage) -> StepOutput:
        q = self.objective.propensity(predictions, stage)
        counts = None
        if self.objective.counts_pseudo_labels:
            labels = self.objective.pseudo_labels(predictions, batch.click, batch.conversion, stage)
            counts = pseudo_label_counts(labels[: batch.num_rows])
        return StepOutput(
            losses,
            {name: torch.exp(-s) for name, s in self.log_variances.items()},
            predictions.ctr_logit.detach(),
            predictions.cvr_logit.detach(),
            batch.click,
            batch.conversion,
            batch.weight,
            batch.num_rows,
            propensity_sums(q, batch.click, batch.weight, self.objective.floor),
            counts,
        )


def predicted(predictions: Predictions, batch: Batch) -> StepOutput:
    """The output of a step that only predicts."""
    logits = predictions.ctr_logit, predictions.cvr_logit
    return StepOutput({}, {}, *logits, batch.click, batch.conversion, batch.weight, batch.num_rows, None, None)


def _felt_by_nothing(predictions: Predictions) -> Tensor:
    """A loss for `backward`, of which no parameter is a part. On all ranks alike: one with gradients would wait for those of the others."""
    return torch.zeros((), device=predictions.ctr_logit.device, requires_grad=True)


class TrainingModel(nn.Module):
    """The model and its loss, as TorchRec's training pipeline wants it."""

    def __init__(self, model: Escm2Model, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        """(loss, output) of one batch; while it is only evaluated the loss is 0."""
        if not self.training:
            return batch.weight.new_zeros(()), predicted(self.model(batch), batch)
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
