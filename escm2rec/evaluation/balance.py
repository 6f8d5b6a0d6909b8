"""Covariate balance: how far clicked impressions differ from all impressions, before and after weighting by 1 / q.

If q is right, clicked impressions weighted by 1 / q are like all impressions in everything that the features say, so what still differs
shows selection that the weights leave. For a covariate x, the standardised difference (Austin, Statistics in Medicine 28, 2009) of clicked
impressions from all of them:

    d = |mean_O x - mean_D x| / sqrt((var_O x + var_D x) / 2)

    mean_D x   sum w x / sum w, over all impressions
    mean_O x   sum W x / sum W, over the clicked; W = w before weighting, w / q after it

The variances are those before weighting in both, so that before and after differ in the means alone (Stuart, Statistical Science 25, 2010).

The covariates of a feature are its number, or, of one with a table, whether an impression holds the value, for each of its `VALUES` most
frequent values (no value is one too); the feature's d is the largest of theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from escm2rec.evaluation.metrics import Floats, as_floats

BALANCED = 0.1
"""A d below it usually counts as balance: Austin, Multivariate Behavioral Research 46, 2011."""
VALUES = 5


def standardised_differences(sums: Floats, squares: Floats, totals: Floats) -> Floats:
    """d of K covariates before and after weighting, [2, K]; 0 where a covariate is the same in all rows.

    `sums` and `squares` [3, K] are those of x and x^2, `totals` [3] those of 1: weighted by w, by w o, and by w o / q.
    """
    means = sums / totals[:, None]
    variances = np.maximum(squares[:2] / totals[:2, None] - means[:2] ** 2, 0)
    spread = np.sqrt(variances.mean(axis=0))
    gaps = np.abs(means[1:] - means[0])
    return as_floats(np.divide(gaps, spread, out=np.zeros_like(gaps), where=spread > 0))


def value_differences(held: Floats, totals: Floats) -> Floats:
    """d of a feature with a table, [2], from the sums [3, values] over the impressions that hold each value."""
    frequent = held[:, np.argsort(-held[0], kind="stable")[:VALUES]]
    return as_floats(standardised_differences(frequent, frequent, totals).max(axis=1))


def held_values(ids: NDArray[Any], lengths: NDArray[Any], rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which impressions hold which values, each pair once: (impression, id modulo `rows`); value `rows` is to hold none.

    `lengths` [B] says how many of `ids` each impression has.
    """
    holding, values = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths), ids % rows
    if len(lengths) and lengths.max() > 1:
        holding, values = np.divmod(np.unique(holding * rows + values), rows)
    without = np.flatnonzero(lengths == 0)
    return np.concatenate([holding, without]), np.concatenate([values, np.full(len(without), rows)])
