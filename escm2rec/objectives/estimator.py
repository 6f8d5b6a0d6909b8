"""What sets one objective apart from another, and where it is found: `estimators/` holds one file an objective, under its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from escm2rec.objectives.imputation import Imputation
from escm2rec.objectives.reduction import LossTerm
from escm2rec.objectives.rows import Rows

FurtherTower = Literal["imputation", "counterfactual", "propensity"]


@dataclass(frozen=True)
class Settings:
    """What estimators can be told; each reads its own.

    imputation   the imputation tower
    beta         weight of the unclicked part (two-space)
    consistency  weight of |1 - eta_hat - eta_star| (dcmt)
    stability    kappa, weight of the constraint on the propensity tower (stable-dr)
    """

    imputation: Imputation
    beta: float = 1.0
    consistency: float = 1e-3
    stability: float = 1.0


@dataclass(frozen=True)
class Estimator:
    """An objective's CVR loss and what comes with it.

    cvr               the CVR term of a batch, scale 1; None: no CVR loss
    ctcvr             whether L_CTCVR is a term of the objective
    weighs            whether q weighs its rows: then L_CTCVR leaves the CTR head alone unless told otherwise
    towers            the towers it needs beside CTR and CVR
    labels_only       the imputation tower must predict labels: with errors the CVR tower would learn nothing
    pseudo_labels     whether imputed labels reach the CVR tower as m + (o/q)(r - m), which may leave [0, 1]
    propensity_terms  further terms that train its propensity tower, by name
    reads             the numbers of `Settings` that it reads: `train` refuses one that is set for another kind
    """

    cvr: Callable[[Rows, Settings], LossTerm] | None
    ctcvr: bool = True
    weighs: bool = False
    towers: frozenset[FurtherTower] = frozenset()
    labels_only: bool = False
    pseudo_labels: bool = False
    propensity_terms: Callable[[Rows, Settings], dict[str, LossTerm]] | None = None
    reads: frozenset[str] = frozenset()


def estimator_of(kind: str) -> Estimator:
    """The estimator of an objective of the config, by the name of its file: `escm2-ips` is `estimators/escm2_ips.py`."""
    module = import_module(f"escm2rec.objectives.estimators.{kind.replace('-', '_').replace('+', '_')}")
    estimator: Estimator = module.ESTIMATOR
    return estimator
