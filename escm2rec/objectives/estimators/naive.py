"""CVR on clicked impressions alone, without L_CTCVR."""

from __future__ import annotations

from torch import Tensor

from escm2rec.objectives.estimator import Estimator, Settings
from escm2rec.objectives.reduction import LossTerm, mean_of
from escm2rec.objectives.rows import Rows


def naive_losses(delta: Tensor, click: Tensor) -> Tensor:
    """o delta, [B]; over N_c, the clicked impressions. Biased for all impressions wherever clicking and converting go together."""
    return click * delta


def naive_term(rows: Rows, settings: Settings) -> LossTerm:
    """(1/N_c) sum w o delta."""
    return mean_of(rows.weight * naive_losses(rows.delta, rows.click), rows.weight * rows.click)


ESTIMATOR = Estimator(naive_term, ctcvr=False)
