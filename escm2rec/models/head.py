"""Everything dense between the concatenated inputs and the logits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from escm2rec.models.backbone import Backbone, Gate
from escm2rec.models.predictions import Predictions
from escm2rec.models.tower import Tower


class Task(nn.Module):
    """One task's own part: its gate into the backbone, and its tower."""

    def __init__(self, gate: Gate, tower: Tower) -> None:
        super().__init__()
        self.gate = gate
        self.tower = tower

    def forward(self, inputs: Tensor, shared: Tensor) -> Tensor:
        """(inputs [B, num_inputs], shared as the backbone gives it) -> logits [B]."""
        logits: Tensor = self.tower(self.gate(inputs, shared))
        return logits


class Escm2Head(nn.Module):
    """A CTR and a CVR tower over one backbone (ESCM2, SIGIR 2022, figure 3), and the further towers that an objective asks for.

    Each further task is an attribute of its name, None when it is not among `further`: its parameters, and no others, have
    names that start with it.

    imputation      reads inputs and shared layers detached unless `imputation_trains_shared`
    propensity      reads them detached always
    counterfactual  trains them, as CTR and CVR do

    A loss of a detached logit alone leaves the gradients of everything else, the inputs' included, None; a loss without it leaves those
    of its task None: under DistributedDataParallel (`train` needs none) pass `find_unused_parameters=True` where such losses are used.
    `keeps_inputs` hands the inputs on with the predictions. With `in_bfloat16` layers multiply in bfloat16 (`torch.autocast`); their
    weights stay float32.
    """

    def __init__(
        self,
        num_inputs: int,
        backbone: Backbone,
        tower_hidden: Sequence[int],
        further: Collection[str] = (),
        imputation_trains_shared: bool = False,
        keeps_inputs: bool = False,
        in_bfloat16: bool = False,
    ) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.imputation_trains_shared = imputation_trains_shared
        self.keeps_inputs = keeps_inputs
        self.in_bfloat16 = in_bfloat16
        self.backbone = backbone

        def task(name: Literal["ctr", "cvr"] | None = None) -> Task:
            return Task(backbone.gate(name), Tower(backbone.num_outputs, tower_hidden))

        self.ctr, self.cvr = task("ctr"), task("cvr")
        self.imputation = task() if "imputation" in further else None
        self.counterfactual = task() if "counterfactual" in further else None
        self.propensity = task() if "propensity" in further else None

    def forward(self, inputs: Tensor) -> Predictions:
        """Inputs [B, num_inputs], B >= 0: pooled embeddings and numeric features, concatenated -> logits [B] each."""
        if not self.in_bfloat16:
            return self._predictions(inputs)
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return self._predictions(inputs)

    def _predictions(self, inputs: Tensor) -> Predictions:
        shared: Tensor = self.backbone(inputs)
        held = inputs.detach(), shared.detach()
        return Predictions(
            self.ctr(inputs, shared),
            self.cvr(inputs, shared),
            None if self.imputation is None else self.imputation(*((inputs, shared) if self.imputation_trains_shared else held)),
            None if self.counterfactual is None else self.counterfactual(inputs, shared),
            None if self.propensity is None else self.propensity(*held),
            inputs if self.keeps_inputs else None,
        )

    def set_base_rates(self, ctr: float, cvr: float, imputes_labels: bool) -> None:
        """Set the output biases to the logits of base rates in (0, 1); `cvr` is conversions over clicks.

        An imputation tower starts from it too where it predicts labels: from 0.5 it would long teach too much. One of errors keeps its own.
        """
        self.ctr.tower.set_base_rate(ctr)
        self.cvr.tower.set_base_rate(cvr)
        if self.imputation is not None and imputes_labels:
            self.imputation.tower.set_base_rate(cvr)
        if self.counterfactual is not None:
            self.counterfactual.tower.set_base_rate(1 - cvr)
        if self.propensity is not None:
            self.propensity.tower.set_base_rate(ctr)
