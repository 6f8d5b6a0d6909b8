"""Everything dense between the concatenated inputs and the logits."""

from __future__ import annotations

from collections.abc import Sequence

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
    """A CTR, a CVR and perhaps an imputation tower over one backbone (ESCM2, SIGIR 2022, figure 3).

    The imputation part is `imputation` (None without it): its parameters, and no others, have names that start with
    `imputation.`. Unless `imputation_trains_shared`, inputs and shared layers are detached before it, so a loss of the
    imputation logit alone leaves the gradients of everything else, the inputs' included, None. A loss without it leaves
    those of the imputation part None: under DDP, pass `find_unused_parameters=True` where such losses are used.
    """

    def __init__(
        self, num_inputs: int, backbone: Backbone, tower_hidden: Sequence[int], imputation: bool, imputation_trains_shared: bool
    ) -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.imputation_trains_shared = imputation_trains_shared
        self.backbone = backbone
        self.ctr = Task(backbone.gate("ctr"), Tower(backbone.num_outputs, tower_hidden))
        self.cvr = Task(backbone.gate("cvr"), Tower(backbone.num_outputs, tower_hidden))
        self.imputation = Task(backbone.gate(), Tower(backbone.num_outputs, tower_hidden)) if imputation else None

    def forward(self, inputs: Tensor) -> Predictions:
        """Inputs [B, num_inputs], B >= 0: pooled embeddings and numeric features, concatenated -> logits [B] each."""
        shared: Tensor = self.backbone(inputs)
        return Predictions(self.ctr(inputs, shared), self.cvr(inputs, shared), self._imputation_logit(inputs, shared))

    def set_base_rates(self, ctr: float, cvr: float) -> None:
        """Set the output biases of CTR and CVR to the logits of base rates in (0, 1); `cvr` is conversions over clicks."""
        self.ctr.tower.set_base_rate(ctr)
        self.cvr.tower.set_base_rate(cvr)

    def _imputation_logit(self, inputs: Tensor, shared: Tensor) -> Tensor | None:
        if self.imputation is None:
            return None
        if not self.imputation_trains_shared:
            inputs, shared = inputs.detach(), shared.detach()
        logit: Tensor = self.imputation(inputs, shared)
        return logit
