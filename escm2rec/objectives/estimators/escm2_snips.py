"""ESCM2 with self-normalised inverse propensity scores (Swaminathan and Joachims, NeurIPS 2015), beside L_CTCVR."""

from __future__ import annotations

from escm2rec.objectives.estimator import Estimator, Settings
from escm2rec.objectives.estimators.escm2_ips import ips_losses
from escm2rec.objectives.reduction import LossTerm, mean_of
from escm2rec.objectives.rows import Rows


def snips_term(rows: Rows, settings: Settings) -> LossTerm:
    """sum w (o/q) delta / sum w o/q: unmoved by a q that is wrong by a factor, and biased by O(1/N_c) under the true one."""
    return mean_of(rows.weight * ips_losses(rows.delta, rows.click, rows.q), rows.weight * rows.click / rows.q)


ESTIMATOR = Estimator(snips_term, weighs=True)
