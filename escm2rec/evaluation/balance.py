"""Covariate balance: how far clicked impressions differ from all impressions, before and after weighting by 1 / q.

If q is right, clicked impressions weighted by 1 / q are like all impressions in everything that the features say, so what still differs
shows selection that the weights leave. For a covariate x, the standardised difference (Austin, Statistics in Medicine 28, 2009) of clicked
impressions from all of them:

    d = |mean_O x - mean_D x| / sqrt((var_O x + var_D x) / 2)

    mean_D x   sum w x / sum w, over all impressions
    mean_O x   sum W x / sum W, over the clicked; W = w before weighting, w / q after it

The variances are those before weighting in both, so that before and after differ in the means alone (Stuart, Statistical Science 25, 2010).

The covariates of a feature with a table are whether an impression holds a value, for each of its `VALUES` most frequent values (no value is
one too). Those of a number are whether it is missing, and the number itself, its means and variances over the impressions that have it. The
feature's d is the largest of theirs.

A missing number is encoded as 0, as is one that equals the training mean; where they are the same to the model, they are here. Any
function of the features is balanced under the right weights, so this one is, whatever its name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from escm2rec.evaluation.metrics import Floats, as_floats

BALANCED = 0.1
"""A d below it usually counts as balance: Austin, Multivariate Behavioral Research 46, 2011."""
WEIGHT_TOLERANCE = 0.1
"""By which share a mean weight may miss the expected one, chance apart: the IPS estimate of a constant misses by just that factor."""
VALUES = 5


def standardised_differences(sums: Floats, squares: Floats, totals: Floats) -> Floats:
    """d of K covariates before and after weighting, [2, K]; 0 where a covariate is the same in all rows, or no clicked row has it.

    `sums` and `squares` [3, K] are those of x and x^2, `totals` [3, 1] or [3, K] those of 1 over the rows that have x: weighted by w, by
    w o, and by w o / q.
    """
    totals = np.broadcast_to(totals, sums.shape)
    means, squared = (np.divide(each, totals, out=np.zeros_like(sums), where=totals > 0) for each in (sums, squares))
    variances = np.maximum(squared[:2] - means[:2] ** 2, 0)
    spread = np.sqrt(variances.mean(axis=0))
    gaps = np.abs(means[1:] - means[0])
    return as_floats(np.divide(gaps, spread, out=np.zeros_like(gaps), where=(spread > 0) & (totals[1] > 0)))


def number_differences(sums: Floats, squares: Floats, held: Floats, totals: Floats) -> Floats:
    """d of K numbers, [2, K], each the larger of the number's and its missingness': `held` [3, K] are the sums of 1 over the rows that
    have the number, `totals` [3, 1] those over all."""
    missing = totals - held
    return np.maximum(standardised_differences(sums, squares, held), standardised_differences(missing, missing, totals))


def value_differences(held: Floats, totals: Floats) -> Floats:
    """d of a feature with a table, [2], from the sums [3, values] over the impressions that hold each value; `totals` [3, 1]."""
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
