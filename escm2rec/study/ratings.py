"""`study --ratings`: how far each estimator's risk is from the true one, on a completed rating matrix.

The semi-synthetic protocol of DR-JL (Wang et al., ICML 2019), after Schnabel et al. (ICML 2016), as MRDR (Guo et al., SIGIR 2021,
arXiv 2105.13623) carries it over from ratings to conversion rates:

1. Complete the matrix (`completion`), given ratings too being replaced by fitted ones; the N cells are users x items.
2. Order the cells by completed rating and give them ratings R = 1..5 in the shares `SHARES`: CVR 0.1, 0.3, 0.5, 0.7, 0.9.
3. Propensity p = k alpha^max(0, 4 - R), alpha = 0.5, with k such that mean p = 5% (DR-JL, Schnabel et al.). MRDR's public code has
   alpha^min(4, 6 - R) without k, which observes more.
4. Predictions, the same in all draws: ONE, THREE, FIVE are the true CVR, but as many cells of CVR 0.1, 0.3, 0.5 as there are of 0.9, drawn
   at random, are set to 0.9; SKEW is normal with mean CVR and standard deviation (1 - CVR) / 2, clipped to [0.1, 0.9]; CRS is 0.2
   where CVR <= 0.6, else 0.6 (MRDR's public code has 0.5 and 0.1 there).
5. In each draw o ~ Bernoulli(p), r ~ Bernoulli(CVR), beta ~ U(0, 1), and the estimated propensity q is that of
   1/q = (1 - beta) / p + beta / mean o. MRDR's public code fixes beta = 0.5.
6. The true risk is mean delta over all N cells; the relative error |estimate - true risk| / true risk.

Where this differs from MRDR's public code: labels are drawn afresh in every draw (there all draws but the first repeat the labels of the
first), and imputation is fitted to the labels of observed cells (there to the predictions; in other code to the true CVR, which
makes DR look good for free). DR-JL measures MAE and MSE of ratings; here delta is BCE, as in MRDR's, since that is what trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from escm2rec.errors import ConfigError, DataError
from escm2rec.folder import new_folder, refuse_overlap, sha256_of, write_json, write_manifest
from escm2rec.objectives.bce import bce_losses
from escm2rec.objectives.estimators.escm2_dr import dr_losses
from escm2rec.objectives.estimators.escm2_ips import ips_losses
from escm2rec.objectives.estimators.naive import naive_losses
from escm2rec.objectives.imputation import imputation_weights
from escm2rec.progress import Progress
from escm2rec.simulate.world import generator
from escm2rec.study.completion import RANK, RIDGE, SWEEPS, complete
from escm2rec.study.ratings_file import read_ratings
from escm2rec.study.ratings_html import write_page

CVRS = (0.1, 0.3, 0.5, 0.7, 0.9)
SHARES = (0.53, 0.24, 0.14, 0.06, 0.03)  # Yahoo! R3's randomly shown songs, as MRDR's public code has them
ALPHA, OBSERVED = 0.5, 0.05  # DR-JL
RAISED = {"ONE": 0.1, "THREE": 0.3, "FIVE": 0.5}
MATRICES = (*RAISED, "SKEW", "CRS")
ESTIMATORS = ("naive", "direct", "EIB", "IPS", "SNIPS", "DR-JL", "MRDR")
# Chosen: with 1,000 cells 50 are observed on average, and none with a chance of 1e-22. 25 M cells need about 4 GB.
MIN_CELLS, MAX_CELLS = 1_000, 25_000_000
MIN_DRAWS = 3


class Cells(NamedTuple):
    """What is true of N cells, [N] each: conversion rate and propensity."""

    cvr: Tensor
    propensity: Tensor


class Draw(NamedTuple):
    """One draw of the labels of N cells, [N] each: o, r of all cells, estimated propensity q; beta of it."""

    click: Tensor
    conversion: Tensor
    q: Tensor
    beta: float


class Judged(NamedTuple):
    """A prediction whose risk is estimated: logits z [N], and its mean error were no cell to convert, or all."""

    logit: Tensor
    mean_if_none: float
    mean_if_all: float

    def mean_error(self, label: Tensor) -> Tensor:
        """mean BCE(sigmoid(z), label) over all cells, of one label for all: BCE is linear in it."""
        return (1 - label) * self.mean_if_none + label * self.mean_if_all


def assign(completed: NDArray[np.float32]) -> Cells:
    """CVR and propensity of cells from completed ratings [N]: the order alone decides. Of equal ratings the earlier cell is the lower."""
    ends = np.rint(np.cumsum(SHARES) * len(completed)).astype(np.int64)
    rating = np.empty(len(completed), np.int64)
    rating[np.argsort(completed, kind="stable")] = 1 + np.searchsorted(ends[:-1], np.arange(len(completed)), side="right")
    level = torch.from_numpy(rating)
    relative = ALPHA ** (4 - torch.arange(1, 6)).clamp(min=0).double()
    drawn = relative[level - 1]
    return Cells(torch.tensor(CVRS, dtype=torch.float64)[level - 1], OBSERVED / drawn.mean() * drawn)


def predictions(cvr: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
    """The predicted CVR of each of `MATRICES`, [N]."""
    count = int((cvr == CVRS[-1]).sum())
    made = {}
    for name, level in RAISED.items():
        of_level = np.flatnonzero((cvr == level).numpy())
        made[name] = cvr.clone()
        made[name][torch.from_numpy(rng.choice(of_level, count, replace=False))] = CVRS[-1]
    noise = torch.from_numpy(rng.standard_normal(len(cvr)))
    made["SKEW"] = (cvr + noise * (1 - cvr) / 2).clamp(CVRS[0], CVRS[-1])
    made["CRS"] = torch.full_like(cvr, 0.6).masked_fill(cvr <= 0.6, 0.2)
    return made


def draw_labels(cells: Cells, rng: np.random.Generator, beta: float | None = None) -> Draw:
    """Fresh o and r for all cells, and q; `beta` is drawn unless it is given (0: q is the true propensity)."""
    size = len(cells.cvr)
    drawn = float(rng.random())
    click = (torch.from_numpy(rng.random(size)) < cells.propensity).double()
    conversion = (torch.from_numpy(rng.random(size)) < cells.cvr).double()
    mixed = drawn if beta is None else beta
    # A draw without a click has no observed share, and no estimate reads q then.
    share = float(click.mean()) or OBSERVED
    return Draw(click, conversion, 1 / ((1 - mixed) / cells.propensity + mixed / share), mixed)


def judge(cvr: Tensor) -> Judged:
    """A prediction of CVRs [N] in (0, 1), made ready to be judged in any number of draws."""
    logit = torch.logit(cvr.double())
    mean_if = [float(bce_losses(logit, torch.full_like(logit, label)).mean()) for label in (0, 1)]
    return Judged(logit.float(), mean_if[0], mean_if[1])


def pseudo_label(cvr_logit: Tensor, conversion: Tensor, v: Tensor) -> Tensor:
    """m, a scalar: the one label of all cells that minimises sum v (delta - delta_hat)^2 over observed cells.

    With delta_hat = BCE(sigmoid(z), m), delta - delta_hat = z (m - r), so m = sum v z^2 r / sum v z^2, in [0, 1]; 0 where that is 0 / 0.
    MRDR's public code imputes one label too, a weighted mean of the predictions; this is one of observed labels.
    """
    weights = v * cvr_logit**2
    return _ratio((weights * conversion).sum(), weights.sum())


def estimated_risks(judged: Judged, click: Tensor, conversion: Tensor, q: Tensor) -> dict[str, float]:
    """The risk that each of `ESTIMATORS` finds, from o, r and q, [N] each; r and q are read where o = 1 alone.

    naive    sum o delta / sum o                     IPS    mean o delta / q
    direct   mean delta_hat                          SNIPS  sum (o delta / q) / sum (o / q)
    EIB      mean [o delta + (1 - o) delta_hat]      DR-JL, MRDR  mean [delta_hat + o (delta - delta_hat) / q]
    delta_hat is fitted with v = 1 for direct and EIB, which know no propensity, 1/q for DR-JL, (1 - q) / q^2 for MRDR. Without a click the
    pseudo-label and the ratios are 0.
    """
    size = len(click)
    place = torch.nonzero(click > 0).squeeze(1)
    z, r, q = judged.logit[place].double(), conversion[place].double(), q[place].double()
    one = torch.ones_like(z)
    delta = bce_losses(z, r)
    ips = ips_losses(delta, one, q).sum()

    def doubly_robust(m: Tensor, q: Tensor) -> Tensor:
        # Where o = 0 the loss is delta_hat, whose mean over all cells is known.
        delta_hat = bce_losses(z, m)
        return judged.mean_error(m) + (dr_losses(delta, delta_hat, one, q) - delta_hat).sum() / size

    plain = pseudo_label(z, r, one)
    found = {
        "naive": _ratio(naive_losses(delta, one).sum(), one.sum()),
        "direct": judged.mean_error(plain),
        "EIB": doubly_robust(plain, one),
        "IPS": ips / size,
        "SNIPS": _ratio(ips, ips_losses(one, one, q).sum()),
        "DR-JL": doubly_robust(pseudo_label(z, r, imputation_weights(q, "dr-jl", 0.0)), q),
        "MRDR": doubly_robust(pseudo_label(z, r, imputation_weights(q, "mrdr", 0.0)), q),
    }
    return {name: float(found[name]) for name in ESTIMATORS}


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0)


def relative_errors(cells: Cells, draws: int, seed: int, beta: float | None = None, progress: bool = False) -> dict[str, Any]:
    """`errors`: (estimate - true risk) / true risk, one a draw, by matrix and estimator; `true_risks`, `betas`, `observed` by draw."""
    judged = {name: judge(made) for name, made in predictions(cells.cvr, generator(seed, 2)).items()}
    errors: dict[str, dict[str, list[float]]] = {name: {estimator: [] for estimator in ESTIMATORS} for name in MATRICES}
    risks: dict[str, list[float]] = {name: [] for name in MATRICES}
    made: dict[str, Any] = {"betas": [], "observed": [], "true_risks": risks, "errors": errors}
    with Progress("study", draws * len(cells.cvr), progress) as told:
        for number in range(draws):
            draw = draw_labels(cells, generator(seed, 3, number), beta)
            made["betas"].append(draw.beta)
            made["observed"].append(int(draw.click.sum()))
            for name in MATRICES:
                true = float(bce_losses(judged[name].logit.double(), draw.conversion).mean())
                risks[name].append(true)
                for estimator, risk in estimated_risks(judged[name], draw.click, draw.conversion, draw.q).items():
                    errors[name][estimator].append((risk - true) / true)
            told.add(len(cells.cvr))
    return made


def mean_with_interval(values: NDArray[np.float64]) -> tuple[float, list[float]]:
    """Mean and its 95% interval by Student's t, over at least `MIN_DRAWS` draws."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean, [mean - half, mean + half]


def summary(errors: Mapping[str, list[float]]) -> dict[str, Any]:
    """Of one matrix, by estimator: mean relative error and bias with intervals, whether it is the best or may be level with the best.

    No relative error is below 0, so its interval is cut there: what is cut could not hold the mean, and the interval covers it as often.
    Level: the 95% interval of the paired difference of relative errors from the best holds 0.
    """
    signed = {name: np.asarray(values) for name, values in errors.items()}
    best = min(signed, key=lambda name: float(np.abs(signed[name]).mean()))
    made = {}
    for name, values in signed.items():
        relative, (least, most) = mean_with_interval(np.abs(values))
        bias, bias_interval = mean_with_interval(values)
        _, (low, high) = mean_with_interval(np.abs(values) - np.abs(signed[best]))
        made[name] = {
            "relative_error": relative,
            "interval": [max(least, 0.0), most],
            "bias": bias,
            "bias_interval": bias_interval,
            "best": name == best,
            "level_with_best": low <= 0 <= high,
            "errors": list(errors[name]),
        }
    return made


def ratings_study(ratings: Path, out: Path, draws: int = 20, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Run the protocol on a ratings file and write `ratings.json` and `ratings.html` into the folder `out`.

    The same file, draws and seed give the same JSON. Returns out, the page, what the file holds, and the mean relative error of each
    estimator for each prediction matrix, the intervals and errors of every draw being in the JSON.
    ConfigError for too few draws or an `out` that may not be written; DataError for a file that cannot be used.
    """
    if draws < MIN_DRAWS:
        raise ConfigError(f"{draws} draws give no interval: at least {MIN_DRAWS} are needed", "pass more --draws; the papers have 20")
    if seed < 0:
        raise ConfigError(f"the seed {seed} is negative", "pass a --seed of at least 0")
    refuse_overlap(out, [ratings])
    with new_folder(out, "study", overwrite) as folder:
        tree = _study(ratings, draws, seed)
        write_json(folder / "ratings.json", tree)
        write_page(tree, folder / "ratings.html")
        write_manifest(folder, "study", {"study": "ratings", "ratings": tree["data"], "draws": draws, "seed": seed})
    errors = {name: {each: found[each]["relative_error"] for each in found} for name, found in tree["results"].items()}
    return {"out": str(out), "html": str(out / "ratings.html"), **tree["data"], "draws": draws, "seed": seed, "relative_errors": errors}


def _study(path: Path, draws: int, seed: int) -> dict[str, Any]:
    given = read_ratings(path)
    cells = given.num_users * given.num_items
    if not MIN_CELLS <= cells <= MAX_CELLS:
        raise DataError(
            f"{path} has {given.num_users:,} users x {given.num_items:,} items = {cells:,} cells, "
            f"but {MIN_CELLS:,} to {MAX_CELLS:,} can be studied",
            "the whole matrix is held in memory: give a sample of the users and items" if cells > MAX_CELLS else "give more of both",
        )
    completion = complete(given, seed)
    assigned = assign(completion.rating.ravel())
    rmse = completion.rmse
    del completion  # 4 bytes a cell
    found = relative_errors(assigned, draws, seed, progress=True)
    return {
        "data": {
            "file": path.name,
            "sha256": sha256_of(path),
            "ratings": len(given.rating),
            "users": given.num_users,
            "items": given.num_items,
            "cells": cells,
        },
        "protocol": {
            "draws": draws,
            "seed": seed,
            "cvrs": list(CVRS),
            "shares": list(SHARES),
            "alpha": ALPHA,
            "observed_share": OBSERVED,
            "risk": "BCE",
        },
        "completion": {"rank": RANK, "sweeps": SWEEPS, "ridge": RIDGE, "rmse": rmse},
        "draws": {name: found[name] for name in ("betas", "observed", "true_risks")},
        "results": {name: summary(found["errors"][name]) for name in MATRICES},
    }
