"""Unclicked training impressions, kept at a rate and weighted by its inverse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from escm2rec.preprocess.block import RawBlock
from escm2rec.preprocess.ragged import Bools
from escm2rec.preprocess.stable_hash import row_hash, split_points, splitmix64


def keep_negatives(block: RawBlock, rate: float, training: Bools) -> RawBlock:
    """Of training rows the clicked, and of the others a share of `rate`, each with 1 / `rate` times its weight (1 where it has none).

    A row is kept when splitmix64 of its place (`row_hash`) gives a point below the rate (`split_points`): the same rows whatever blocks
    they come in. Splits hash the place itself, so that no salt of theirs gives these points. The weight is the one correction: sums over
    kept rows estimate those over all rows without bias, and nothing after preprocess may correct for the rate again. All other rows
    stay, and have a weight too.
    """
    unclicked = training & (block.labels["click"] == 0)
    points = split_points(splitmix64(row_hash(block.file.name, block.rows)), salt="")
    weight = np.where(unclicked, 1 / rate, 1.0) * block.labels.get("weight", 1.0)
    weighted = replace(block, labels={**block.labels, "weight": weight.astype(np.float32)})
    return weighted.take(np.flatnonzero(~unclicked | (points < rate)))
