"""How fast the slowest rank could be at best, whatever the plan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from escm2rec.planning.options import Floats, Options

PRICES = np.geomspace(1e-6, 1e6, 121)


def fits_somewhere(options: Options, rooms: Floats) -> NDArray[np.bool_]:
    """Of each option, whether its largest shard fits the rank with most room; `rooms` is [ranks, 3]."""
    return np.asarray((options.largest <= rooms.max(axis=0)).all(axis=1))


def shares(options: Options, rooms: Floats) -> Floats:
    """What each option takes of the memory of all ranks together, [options, 3]; 0 of a kind that there is none of."""
    whole = rooms.sum(axis=0)
    return np.asarray(np.where(whole > 0, options.bytes / np.maximum(whole, 1), 0.0))


def lower_bound(options: Options, rooms: Floats) -> float:
    """Ms that the slowest rank of any plan that fits takes at the least; infinite where the bound knows that none fits.

    No plan ends at T whose tables, each with an option of no shard longer than T, need more than T times the ranks, at any price of any
    kind of memory (Lagrange). The lowest T that is not ruled out so.
    """
    allowed, share = fits_somewhere(options, rooms), shares(options, rooms)
    lengths = np.unique(options.longest[allowed])
    low, high = 0, len(lengths) - 1
    if not len(lengths) or not np.isfinite(_mean_at(options, share, allowed, len(rooms))):
        return float("inf")
    while low < high:  # the shortest length at which the mean with options up to it is no longer than it
        middle = (low + high) // 2
        if _mean_at(options, share, allowed & (options.longest <= lengths[middle]), len(rooms)) <= lengths[middle]:
            high = middle
        else:
            low = middle + 1
    mean = _mean_at(options, share, allowed & (options.longest <= lengths[low]), len(rooms))
    if mean > lengths[low]:  # even with all options
        return mean
    shorter = lengths[low - 1] if low else 0.0
    before = _mean_at(options, share, allowed & (options.longest <= shorter), len(rooms)) if low else float("inf")
    return float(min(lengths[low], before))


def _mean_at(options: Options, share: Floats, allowed: NDArray[np.bool_], ranks: int) -> float:
    """Least mean of a rank's time, by the best price on each kind of memory; infinite where a table has no allowed option."""
    if len(np.unique(options.table[allowed])) < options.num_tables:
        return float("inf")
    cost = np.where(allowed, options.total, np.inf)
    starts = np.flatnonzero(np.concatenate(([True], np.diff(options.table) > 0)))
    assert len(starts) == options.num_tables  # options of a table lie together
    free = float(np.minimum.reduceat(cost, starts).sum())
    best = free
    for kind in range(share.shape[1]):
        for price in PRICES * max(free, 1e-9):
            best = max(best, float(np.minimum.reduceat(cost + price * share[:, kind], starts).sum()) - float(price))
    return best / ranks
