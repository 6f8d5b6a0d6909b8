"""Multi-DR (Zhang et al., WWW 2020): the doubly robust CVR loss without L_CTCVR."""

from __future__ import annotations

from escm2rec.objectives.estimator import Estimator
from escm2rec.objectives.estimators.escm2_dr import dr_term

ESTIMATOR = Estimator(dr_term, ctcvr=False, weighs=True, towers=frozenset({"imputation"}), pseudo_labels=True)
