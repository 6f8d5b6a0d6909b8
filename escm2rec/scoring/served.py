"""An artifact as a model of scoring: what serves elsewhere, on a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from escm2rec.errors import ConfigError
from escm2rec.models.predictions import Predictions
from escm2rec.reader.columns import Columns
from escm2rec.serving.artifact import Artifact
from escm2rec.serving.model import OUTPUTS, model_inputs

CTR, CVR = OUTPUTS.index("ctr_logit"), OUTPUTS.index("cvr_logit")


class ServedScorer:
    """The model of an artifact, loaded by this process; it runs on as many threads as torch has here."""

    def __init__(self, artifact: Artifact) -> None:
        self._served, self._schema = artifact.load(), artifact.schema

    @torch.inference_mode()
    def __call__(self, columns: Columns, start: int, stop: int) -> Predictions:
        """Logits of rows [start, stop) of a block."""
        found = self._served(*model_inputs(columns, start, stop, self._schema))
        return Predictions(found[CTR], found[CVR])

    def propensity(self, predictions: Predictions) -> Tensor:
        """There is none: ConfigError."""
        raise ConfigError("a model that was exported has no propensity: it is of training", "leave it out, or score with --run")
