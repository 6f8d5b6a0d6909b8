"""The control: the naive CVR loss beside L_CTCVR. What it reaches too was not won by weights."""

from __future__ import annotations

from escm2rec.objectives.estimator import Estimator
from escm2rec.objectives.estimators.naive import naive_term

ESTIMATOR = Estimator(naive_term)
