"""Means with intervals over seeds, and paired tests of one candidate against another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean over seeds with its 95% interval (Student's t); low and high are None of fewer than 2 seeds."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


class Paired(NamedTuple):
    """A against B over the same seeds, by the paired t-test of log errors.

    ratio   geometric mean of A's error over B's, with its 95% interval; below 1 A is better
    p       two-sided
    effect  mean difference of the logs over its standard deviation (Cohen's d of pairs)
    wins    seeds in which A's error is smaller
    """

    ratio: float
    low: float
    high: float
    p: float
    effect: float
    wins: int
    seeds: int


def interval(values: Sequence[float]) -> Interval | None:
    """The mean of values, one a seed; None of none."""
    if not values:
        return None
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, None, None, count)
    half = float(stats.t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired(errors: Sequence[float], others: Sequence[float]) -> Paired:
    """Compare errors above 0, seed by seed; ValueError of fewer than 2."""
    if len(errors) != len(others) or len(errors) < 2:
        raise ValueError(f"a paired test needs the same 2 seeds or more on both sides, got {len(errors)} and {len(others)}")
    difference = np.log(errors) - np.log(others)
    count, mean, deviation = len(difference), float(difference.mean()), float(difference.std(ddof=1))
    if deviation == 0:  # the same model twice: no difference, and nothing that varies
        return Paired(math.exp(mean), math.exp(mean), math.exp(mean), 1.0 if mean == 0 else 0.0, 0.0, int((difference < 0).sum()), count)
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    p = float(stats.ttest_rel(np.log(errors), np.log(others)).pvalue)
    bounds = math.exp(mean - half), math.exp(mean + half)
    return Paired(math.exp(mean), *bounds, p, mean / deviation, int((difference < 0).sum()), count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given (Scandinavian Journal of Statistics, 1979): all below 0.01 hold together at 1%."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
