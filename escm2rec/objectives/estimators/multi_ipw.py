"""Multi-IPW (Zhang et al., WWW 2020): inverse propensity scores without L_CTCVR."""

from __future__ import annotations

from escm2rec.objectives.estimator import Estimator
from escm2rec.objectives.estimators.escm2_ips import ips_term

ESTIMATOR = Estimator(ips_term, ctcvr=False, weighs=True)
