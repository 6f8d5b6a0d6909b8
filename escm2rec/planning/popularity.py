"""Which rows of a table are looked up how often, and what follows for shards of rows and for caches.

A popularity is of points (rows, share): the first `rows` rows of a table have that share of its lookups. Between two points rows are
looked up alike, and without any point all are. Vocabularies have the most frequent values first, so that the first block of rows, one
rank's, has most of the lookups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torchrec.distributed.types import CacheStatistics

from escm2rec.paths import DataPath, open_parquet

Popularity = tuple[tuple[int, float], ...]
Floats = NDArray[np.float64]
POINTS = 64  # of a vocabulary, at rows 1, 2, 3, 5, ...: as many in each tenfold


def wrong_popularity(popularity: Popularity, rows: int) -> str | None:
    """What is wrong with the points of a table of so many rows, or None."""
    before = (0, 0.0)
    for point in popularity:
        if not (point[0] > before[0] and before[1] <= point[1] <= 1):
            return f"rows and shares of its points rise, shares to 1 at the most; {list(point)} follows {list(before)}"
        before = point
    if popularity and before != (rows, 1.0):
        return f"its last point is of all {rows:,} rows and of share 1, and is {list(before)}"
    return None


def popularity_of_vocabulary(path: DataPath, rows: int, oov_rows: int, oov_share: float) -> Popularity:
    """Of a table of `rows`: `oov_rows` that values out of vocabulary share, which have `oov_share` of the lookups, and the values of the
    Parquet file, the most frequent first, by their counts."""
    counts = _counts(path)
    known = float(counts.sum())
    if not known:
        return ()
    upto = np.cumsum(counts) / known * (1 - oov_share) + oov_share
    places = np.unique(np.geomspace(1, len(counts), POINTS).astype(np.int64))
    points = {oov_rows: oov_share} if oov_rows else {}
    points |= {oov_rows + int(place): min(1.0, float(upto[place - 1])) for place in places}
    del points[max(points)]
    return (*points.items(), (rows, 1.0))


def _counts(path: DataPath) -> Floats:
    with open_parquet(path) as file:
        return np.asarray(file.read(columns=["count"])["count"], np.float64)


def shares_of_rows(popularity: Popularity, bounds: NDArray[np.int64]) -> Floats:
    """Share of the lookups of rows `bounds[i]` to before `bounds[i + 1]`: [len(bounds) - 1]; `popularity` has points."""
    at, share = zip((0, 0.0), *popularity, strict=True)
    return np.diff(np.interp(bounds, at, share))


class Lookups(CacheStatistics):
    """Of a batch of `ids` ids on all ranks: how many distinct rows, and how many of those a cache does not hold.

    A row of probability p is looked up by 1 - (1 - p)^ids of batches. The cache is taken to hold the most popular rows, which is the best
    that one can do; FBGEMM's (least recently used, 32 places a set) holds fewer.
    """

    def __init__(self, popularity: Popularity, ids: float) -> None:
        self._popularity, self._ids = popularity, ids
        points = np.array([(0, 0.0), *popularity])
        sizes, shares = np.diff(points[:, 0]), np.diff(points[:, 1])
        order = np.argsort(-shares / sizes, kind="stable")
        self._sizes, probability = sizes[order], np.minimum((shares / sizes)[order], 1 - 1e-12)
        self._distinct = -np.expm1(ids * np.log1p(-probability)) * self._sizes

    def of_rows(self, first: int, end: int) -> Lookups | None:
        """Of the lookups of some rows alone; None where these have none."""
        inner = [rows for rows, _ in self._popularity if first < rows < end]
        bounds = np.array([first, *inner, end])
        shares = np.cumsum(shares_of_rows(self._popularity, bounds))
        if end <= first or not shares[-1]:
            return None
        points = [(int(row) - first, float(share)) for row, share in zip(bounds[1:], shares / shares[-1], strict=True)]
        return Lookups(tuple(points), self._ids * float(shares[-1]))

    @property
    def expected_lookups(self) -> float:
        """Distinct rows of a batch."""
        return float(self._distinct.sum())

    def expected_miss_rate(self, clf: float) -> float:
        """Share of those that a cache of `clf` of the rows does not hold."""
        ends = np.concatenate(([0.0], np.cumsum(self._sizes)))
        held = np.interp(clf * ends[-1], ends, np.concatenate(([0.0], np.cumsum(self._distinct))))
        return max(0.0, 1 - float(held) / max(self.expected_lookups, 1e-12))

    @property
    def cacheability(self) -> float:
        """Mean miss rate over all sizes of a cache: 0 where few rows have all lookups, 1/2 where all have as many."""
        sizes = np.linspace(0, 1, 101)
        return float(np.mean([self.expected_miss_rate(size) for size in sizes]))
