"""ESMM (Ma et al., SIGIR 2018): no CVR loss; the CVR tower learns from L_CTCVR alone, with about the click probability as its weight."""

from __future__ import annotations

from escm2rec.objectives.estimator import Estimator

ESTIMATOR = Estimator(cvr=None)
