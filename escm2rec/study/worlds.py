"""Small worlds in which propensity and CVR are known, each turning one dial of the first.

x is 8 numbers, or the factors of a user and an item. Of it three scores are made, independent, each of mean 0 and variance 1:

    f(x)   in pairs of features: x1 x2 + x3 x4, or user factor . item factor (`interactions`); without them x1
    l(x)   linear in features of its own
    m(x)   linear in others

    logit p(x)   = a + click_std (0.8 f + 0.6 l)
    logit eta(x) = b + convert_std (s f + sqrt(1 - s^2) m),     s = `selection`

f draws clicks, and conversions too as far as `selection` says: with it positive, what is clicked converts better. A linear CVR tower
(`towers: small`) sees none of f where it is made of interactions, a flexible one learns it. a is solved so that mean p is `ctr`, b so
that mean eta, over all impressions, is `cvr`. `hidden` adds a score that no feature shows to both logits; what is then to be
learned, p(x) and eta(x), are means over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NUM_NUMBERS, NUM_FACTORS = 8, 4
CALIBRATION_ROWS = 100_000  # the intercepts are right to half a percent of a rate
HIDDEN_NODES = 16
OF_WORLD = 2**31  # first word of the seeds of what belongs to a world: no study has such a seed
LONGEST_LOGIT = 30.0


@dataclass(frozen=True)
class World:
    """What a log is drawn from.

    impressions        rows of the training log, before negatives are dropped; a third as many are held out
    ctr, cvr           mean p and mean eta over all impressions
    selection          s, the part of f in what converts: 0.8 s is the correlation of logit p and logit eta
    click_std          standard deviation of logit p: the larger, the less clicked and unclicked impressions overlap
    convert_std        the same of logit eta
    interactions       whether f is made of pairs of features
    towers             `small`: CVR and imputation towers are linear, CTR and propensity towers are not; `linear`, `flexible`: all
    hidden             standard deviation of the score that no feature shows
    users              of a world of ids, with a quarter as many items; 0: a world of numbers
    keep_rate          share of the unclicked impressions that the log keeps, weighted by its inverse
    slope              of a propensity made wrong: q = sigmoid(slope a + shift), with shift such that mean q stays about right
    """

    name: str
    dial: str
    title: str
    impressions: int = 60_000
    ctr: float = 0.1
    cvr: float = 0.1
    selection: float = 0.8
    click_std: float = 1.0
    convert_std: float = 1.5
    interactions: bool = True
    towers: Literal["small", "linear", "flexible"] = "small"
    hidden: float = 0.0
    users: int = 0
    keep_rate: float = 1.0
    slope: float = 1.0


@dataclass(frozen=True)
class Sample:
    """Impressions of a world, [B] each: what a model may see, what happened, and the truth.

    numeric     [B, NUM_NUMBERS], float32; no column in a world of ids
    ids         [B, 2], user and item; no column in a world of numbers
    click       o;  conversion  r, of unclicked impressions too: a log does not hold those
    weight      impression weight
    propensity  p(x);  cvr  eta(x)
    """

    numeric: NDArray[np.float32]
    ids: Ints
    click: NDArray[np.float32]
    conversion: NDArray[np.float32]
    weight: NDArray[np.float32]
    propensity: Floats
    cvr: Floats

    def __len__(self) -> int:
        return len(self.click)

    def rows(self, kept: NDArray[np.bool_]) -> Sample:
        """Some of its impressions."""
        return Sample(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class _Features:
    numeric: Floats
    ids: Ints
    f: Floats
    l: Floats  # noqa: E741 - the docstring's letter
    m: Floats


def draw(world: World, rows: int, seed: tuple[int, ...]) -> Sample:
    """So many impressions; the same world, rows and seed give the same ones."""
    intercepts = _intercepts(world)
    random = np.random.default_rng(seed)
    features = _features(world, rows, random)
    click_logit, convert_logit = _logits(world, features, intercepts)
    hidden = world.hidden * random.standard_normal(rows)
    click = random.random(rows) < _sigmoid(click_logit + hidden)
    conversion = random.random(rows) < _sigmoid(convert_logit + hidden)
    return Sample(
        features.numeric.astype(np.float32),
        features.ids,
        click.astype(np.float32),
        conversion.astype(np.float32),
        np.ones(rows, np.float32),
        _mean_over_hidden(world, click_logit),
        _mean_over_hidden(world, convert_logit),
    )


def drop_negatives(sample: Sample, keep_rate: float, seed: tuple[int, ...]) -> Sample:
    """All clicked impressions and so many of the others, weighted by 1 / `keep_rate`."""
    if keep_rate == 1:
        return sample
    kept = (sample.click > 0) | (np.random.default_rng(seed).random(len(sample)) < keep_rate)
    weight = np.where(sample.click > 0, 1, 1 / keep_rate).astype(np.float32)
    return replace(sample, weight=weight).rows(kept)


def wrong_shift(world: World) -> float:
    """The shift that keeps sigmoid(slope logit p + shift) at the world's CTR on average."""
    if world.slope == 1:
        return 0.0
    features = _features(world, CALIBRATION_ROWS, np.random.default_rng([OF_WORLD, 2]))
    click_logit, _ = _logits(world, features, _intercepts(world))
    return _solve(lambda shift: float(_sigmoid(world.slope * click_logit + shift).mean()), world.ctr)


def _features(world: World, rows: int, random: np.random.Generator) -> _Features:
    if world.users:
        return _id_features(world, rows, random)
    x = random.standard_normal((rows, NUM_NUMBERS))
    f = (x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3]) / np.sqrt(2) if world.interactions else x[:, 0]
    return _Features(x, np.zeros((rows, 0), np.int64), f, x[:, 4:6].sum(axis=1) / np.sqrt(2), x[:, 6:8].sum(axis=1) / np.sqrt(2))


def _id_features(world: World, rows: int, random: np.random.Generator) -> _Features:
    """Users and items with factors, drawn alike often; their effects are those of the world, whatever the seed."""
    of_world = np.random.default_rng([OF_WORLD, 3, world.users])
    sizes = (world.users, world.users // 4)
    user, item = (random.integers(size, size=rows) for size in sizes)
    effects = [of_world.standard_normal((size, NUM_FACTORS + 2)) for size in sizes]
    mine = [table[ids] for table, ids in zip(effects, (user, item), strict=True)]
    pair = (mine[0][:, :NUM_FACTORS] * mine[1][:, :NUM_FACTORS]).sum(axis=1) / np.sqrt(NUM_FACTORS)
    f = pair if world.interactions else (mine[0][:, 0] + mine[1][:, 0]) / np.sqrt(2)
    l, m = ((mine[0][:, k] + mine[1][:, k]) / np.sqrt(2) for k in (NUM_FACTORS, NUM_FACTORS + 1))  # noqa: E741
    return _Features(np.zeros((rows, 0)), np.stack([user, item], axis=1), f, l, m)


def _logits(world: World, features: _Features, intercepts: tuple[float, float]) -> tuple[Floats, Floats]:
    click = intercepts[0] + world.click_std * (0.8 * features.f + 0.6 * features.l)
    s = world.selection
    convert = intercepts[1] + world.convert_std * (s * features.f + np.sqrt(1 - s * s) * features.m)
    return click.clip(-LONGEST_LOGIT, LONGEST_LOGIT), convert.clip(-LONGEST_LOGIT, LONGEST_LOGIT)


_solved: dict[World, tuple[float, float]] = {}


def _intercepts(world: World) -> tuple[float, float]:
    if world not in _solved:
        features = _features(world, CALIBRATION_ROWS, np.random.default_rng([OF_WORLD, 1]))
        click, convert = _logits(world, features, (0.0, 0.0))
        _solved[world] = (
            _solve(lambda a: float(_mean_over_hidden(world, click + a).mean()), world.ctr),
            _solve(lambda b: float(_mean_over_hidden(world, convert + b).mean()), world.cvr),
        )
    return _solved[world]


def _mean_over_hidden(world: World, logit: Floats) -> Floats:
    """E[sigmoid(logit + h)], h the hidden score: Gauss-Hermite quadrature, whose error is below 1e-6 here."""
    if world.hidden == 0:
        return _sigmoid(logit)
    nodes, weights = hermegauss(HIDDEN_NODES)
    total = np.zeros_like(logit)
    for node, share in zip(nodes, weights / weights.sum(), strict=True):
        total += share * _sigmoid(logit + world.hidden * node)
    return total


def _solve(rate: Callable[[float], float], target: float) -> float:
    """The argument at which a rising function has a value: bisection."""
    low, high = -LONGEST_LOGIT, LONGEST_LOGIT
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) < target else (low, middle)
    return (low + high) / 2


def _sigmoid(logit: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -logit))
