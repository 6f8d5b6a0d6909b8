"""Unclicked training impressions, kept at a rate and weighted by its inverse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from escm2rec.preprocess.block import RawBlock
from escm2rec.preprocess.stable_hash import row_hash, split_points, splitmix64


def keep_negatives(block: RawBlock, rate: float) -> RawBlock:
    """The clicked rows, and of the others a share of `rate`, each with 1 / `rate` times its own weight (1 where it has none).

    A row is kept when splitmix64 of its place (`row_hash`) gives a point below the rate (`split_points`): the same rows whatever blocks
    they come in. Splits hash the place itself, so that no salt of theirs gives these points. The weight is the one correction: sums over
    kept rows estimate those over all rows without bias, and nothing after preprocess may correct for the rate again. With a rate of 1
    all rows stay, and have a weight.
    """
    unclicked = block.labels["click"] == 0
    points = split_points(splitmix64(row_hash(block.file.name, block.rows)), salt="")
    weight = np.where(unclicked, 1 / rate, 1.0) * block.labels.get("weight", 1.0)
    weighted = replace(block, labels={**block.labels, "weight": weight.astype(np.float32)})
    return weighted.take(np.flatnonzero(~unclicked | (points < rate)))
