"""ESCM2-IPS (Wang et al., SIGIR 2022): clicked impressions weighted by inverse propensity scores, beside L_CTCVR."""

from __future__ import annotations

from torch import Tensor

from escm2rec.objectives.estimator import Estimator, Settings
from escm2rec.objectives.reduction import LossTerm, mean_of
from escm2rec.objectives.rows import Rows


def ips_losses(delta: Tensor, click: Tensor, q: Tensor) -> Tensor:
    """o delta / q, [B]; over N. Its mean over clicks is the risk on all impressions under the true q."""
    return click * delta / q


def ips_term(rows: Rows, settings: Settings) -> LossTerm:
    """(1/N) sum w o delta / q."""
    return mean_of(rows.weight * ips_losses(rows.delta, rows.click, rows.q), rows.weight)


ESTIMATOR = Estimator(ips_term, weighs=True)
