"""From cells to findings: means over seeds, paired tests, and what a chooser that sees no truth would have taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from escm2rec.evaluation.entire_risk import MARGIN
from escm2rec.study.candidates import CANDIDATES, INCUMBENT
from escm2rec.study.compare import Paired, holm, interval, paired
from escm2rec.study.presets import CHOOSING_SEEDS
from escm2rec.study.run import FLEXIBLE_JUDGE, Values

BASELINES = ("esmm", "naive", "naive+ctcvr")
LEAST_JUDGING_SEEDS = 10
WITHIN = 1.05
ALWAYS = "always "
"""Before the name of a candidate: a chooser that looks at no log and takes it everywhere."""
ALTERNATION = (
    ("escm2-dr alternating", "escm2-dr"),
    ("escm2-dr 3:1", "escm2-dr"),
    ("stable-dr alternating", "stable-dr"),
    ("escm2-dr mrdr squared", "escm2-dr mrdr"),
    ("stable-dr error", "stable-dr"),
    ("escm2-dr", "escm2-ips"),
    ("multi-dr", "multi-ipw"),
)
"""Ways to train the imputation, each beside another; and DR beside IPS, which is DR with imputed errors (see candidates)."""


class Chooser(NamedTuple):
    """What a chooser goes by.

    metric    of a cell, with the suffix of the judge behind it
    judge     whose propensity and imputed labels make the risk
    cautious  keep the incumbent unless some are below it by more than a standard error: of those the least, as `train` does
    greatest  take the greatest, not the least
    """

    metric: str
    judge: str = ""
    cautious: bool = False
    greatest: bool = False


CHOOSERS = {
    "DR risk, cautious": Chooser("heldout_dr", cautious=True),
    "DR risk, cautious, flexible judge": Chooser("heldout_dr", FLEXIBLE_JUDGE, cautious=True),
    "SNIPS risk, cautious": Chooser("heldout_snips", cautious=True),
    "SNIPS risk, cautious, flexible judge": Chooser("heldout_snips", FLEXIBLE_JUDGE, cautious=True),
    "DR risk": Chooser("heldout_dr"),
    "DR risk, flexible judge": Chooser("heldout_dr", FLEXIBLE_JUDGE),
    "SNIPS risk": Chooser("heldout_snips"),
    "SNIPS risk, flexible judge": Chooser("heldout_snips", FLEXIBLE_JUDGE),
    "AUC, clicked": Chooser("heldout_auc_clicked", greatest=True),
}

Cells = Mapping[str, Mapping[str, Sequence[Values]]]
"""By world, by candidate, one set of values a seed."""


def summarise(cells: Cells) -> dict[str, Any]:
    """`means` by world, candidate and metric; `against`, each candidate's KL beside the baselines'; `level`, beside the best's;
    `alternation`, ways to train the imputation; `chosen`, what ten seeds choose and fresh ones say of it; `choosers`, how near the
    best a choice without the truth ends.

    A candidate whose KL does not exist in some seed has means, but is compared with none."""
    found = {world: {name: seeds for name, seeds in of_world.items() if _exists(seeds)} for world, of_world in cells.items()}
    return {
        "means": {world: _means_of_world(of_world) for world, of_world in cells.items()},
        "against": {world: _against(of_world) for world, of_world in found.items()},
        "level": {world: _level(of_world) for world, of_world in found.items()},
        "alternation": _alternation(found),
        "chosen": _chosen(found),
        "choosers": _choosers(found),
    }


def trainable(of_world: Iterable[str]) -> list[str]:
    """The candidates that a log can train."""
    return [name for name in of_world if CANDIDATES[name].reference is None]


def contenders(of_world: Mapping[str, Sequence[Values]]) -> list[str]:
    """The candidates that a log can train and that correct for selection."""
    return [name for name in trainable(of_world) if CANDIDATES[name].settings["kind"] not in BASELINES]


def _exists(seeds: Sequence[Values]) -> bool:
    return all(values["kl"] is not None for values in seeds)


def _means_of_world(of_world: Mapping[str, Sequence[Values]]) -> dict[str, dict[str, Any]]:
    """`_means` of each candidate, with `kl_excess`, its KL less the oracle's of the same seed."""
    oracle = of_world.get("oracle", ())
    found = {}
    for name, seeds in of_world.items():
        excess = [a["kl"] - b["kl"] for a, b in zip(seeds, oracle, strict=False) if a["kl"] is not None and b["kl"] is not None]
        found[name] = _means(seeds) | ({"kl_excess": made._asdict()} if (made := interval(excess)) is not None else {})
    return found


def _means(seeds: Sequence[Values]) -> dict[str, dict[str, Any]]:
    """Of each metric that exists in any seed, its interval; `seeds` says in how many it does."""
    names = dict.fromkeys(name for values in seeds for name in values)
    found = {name: interval([value for values in seeds if (value := values.get(name)) is not None]) for name in names}
    return {name: each._asdict() for name, each in found.items() if each is not None}


def _column(seeds: Sequence[Values], metric: str) -> list[float]:
    values = [values.get(metric) for values in seeds]
    return [math.nan if value is None else value for value in values]


def _against(of_world: Mapping[str, Sequence[Values]]) -> dict[str, dict[str, Any]]:
    """Of each candidate and baseline: the ratio of KLs and of risks, and p adjusted over the world's candidates."""
    found: dict[str, dict[str, Any]] = {name: {} for name in of_world}
    for baseline in BASELINES:
        others = [name for name in of_world if name != baseline]
        if baseline not in of_world or len(of_world[baseline]) < 2:
            continue
        kls = [paired(_column(of_world[name], "kl"), _column(of_world[baseline], "kl")) for name in others]
        risks = [paired(_column(of_world[name], "true_risk"), _column(of_world[baseline], "true_risk")) for name in others]
        adjusted = holm([each.p for each in kls])
        for name, kl, risk, p in zip(others, kls, risks, adjusted, strict=True):
            found[name][baseline] = {"kl": kl._asdict(), "risk": risk._asdict(), "kl_p_holm": p}
    return found


def _level(of_world: Mapping[str, Sequence[Values]]) -> dict[str, Any]:
    """The trainable candidate of least mean log KL, and the others' KL over its own, p adjusted over them: not small, they are level.

    The best is found and tested on the same seeds, so that the others look a little worse than they are."""
    names = trainable(of_world)
    if not names:
        return {}
    kls = {name: _column(of_world[name], "kl") for name in names}
    best = min(names, key=lambda name: float(np.log(kls[name]).mean()))
    others = [name for name in names if name != best and len(kls[name]) >= 2]
    return {"best": best, "against": _adjusted({name: paired(kls[name], kls[best]) for name in others})}


def _alternation(cells: Cells) -> list[dict[str, Any]]:
    """Of each pair of ALTERNATION, the ratio of KLs by world, p adjusted over the worlds."""
    found = []
    for name, beside in ALTERNATION:
        tests = {
            world: paired(_column(of_world[name], "kl"), _column(of_world[beside], "kl"))
            for world, of_world in cells.items()
            if {name, beside} <= of_world.keys() and len(of_world[name]) >= 2
        }
        if tests:
            found.append({"candidate": name, "beside": beside, "worlds": _adjusted(tests)})
    return found


def _adjusted(tests: Mapping[str, Paired]) -> dict[str, dict[str, Any]]:
    adjusted = holm([test.p for test in tests.values()])
    return {name: {**test._asdict(), "p_holm": p} for (name, test), p in zip(tests.items(), adjusted, strict=True)}


def _chosen(cells: Cells) -> list[dict[str, Any]]:
    """In each world with seeds enough: the contender of least mean log KL on the choosing seeds, judged on the others.

    It is held against each baseline in that of its settings which the same seeds choose."""
    found: list[dict[str, Any]] = []
    tests: list[Paired] = []
    for world, of_world in cells.items():
        names = contenders(of_world)
        if not names or any(len(seeds) < CHOOSING_SEEDS + LEAST_JUDGING_SEEDS for seeds in of_world.values()):
            continue
        best = _best_of(of_world, names)
        settings = {baseline: _settings_of(of_world, baseline) for baseline in BASELINES}
        beside = {baseline: _best_of(of_world, of_it) for baseline, of_it in settings.items() if of_it}
        kls = {name: _column(seeds, "kl")[CHOOSING_SEEDS:] for name, seeds in of_world.items()}
        against = {baseline: paired(kls[best], kls[name]) for baseline, name in beside.items()}
        tests += against.values()
        told = {baseline: {**test._asdict(), "candidate": beside[baseline]} for baseline, test in against.items()}
        found.append({"world": world, "candidate": best, "of": len(names), "against": told})
    adjusted = iter(holm([test.p for test in tests]))
    for entry in found:
        for test in entry["against"].values():
            test["p_holm"] = next(adjusted)
    return found


def _settings_of(of_world: Mapping[str, Sequence[Values]], baseline: str) -> list[str]:
    return [name for name in trainable(of_world) if CANDIDATES[name].settings["kind"] == baseline]


def _best_of(of_world: Mapping[str, Sequence[Values]], names: Sequence[str]) -> str:
    """Of least mean log KL on the choosing seeds."""
    return min(names, key=lambda name: float(np.log(_column(of_world[name], "kl")[:CHOOSING_SEEDS]).mean()))


def _choosers(cells: Cells) -> dict[str, Any]:
    """By chooser and world: mean KL and risk of what it took seed by seed, over the least of any candidate; a chooser that looks at no
    log, `always NAME`, beside them for every candidate that all worlds have."""
    found: dict[str, Any] = {}
    pools = {world: {name: of_world[name] for name in trainable(of_world)} for world, of_world in cells.items()}
    everywhere = [name for name in next(iter(pools.values()), ()) if all(name in pool for pool in pools.values())]
    choosers: dict[str, Chooser | str] = {**CHOOSERS, **{f"{ALWAYS}{name}": name for name in everywhere}}
    for name, chooser in choosers.items():
        cautious = isinstance(chooser, Chooser) and chooser.cautious
        worlds = {world: _outcome(chooser, pool) for world, pool in pools.items() if pool and (not cautious or INCUMBENT in pool)}
        ratios = [each["kl"] for each in worlds.values()]
        found[name] = {
            "worlds": worlds,
            "kl_within_5_percent": sum(ratio <= WITHIN for ratio in ratios),
            "risk_within_5_percent": sum(each["true_risk"] <= WITHIN for each in worlds.values()),
            "of_worlds": len(worlds),
            "kl_geometric_mean": math.exp(float(np.log(ratios).mean())) if ratios else None,
            "kl_worst": max(ratios, default=None),
        }
    return found


def _outcome(chooser: Chooser | str, pool: Mapping[str, Sequence[Values]]) -> dict[str, Any]:
    """Of a world: mean KL and risk of what was taken over the least of the pool, the best, and how often each was taken."""
    names = list(pool)
    seeds = len(next(iter(pool.values())))
    taken = np.full(seeds, names.index(chooser)) if isinstance(chooser, str) else _taken(chooser, pool)
    tables = {metric: np.array([_column(each, metric) for each in pool.values()]) for metric in ("kl", "true_risk")}
    ratios = {metric: float(table[taken, np.arange(seeds)].mean() / table.mean(axis=1).min()) for metric, table in tables.items()}
    places, counts = np.unique(taken, return_counts=True)
    best = names[int(tables["kl"].mean(axis=1).argmin())]
    return {**ratios, "best": best, "taken": {names[int(i)]: int(n) for i, n in zip(places, counts, strict=True)}}


def _taken(chooser: Chooser, pool: Mapping[str, Sequence[Values]]) -> NDArray[np.int64]:
    """Places in the pool of what a chooser takes, seed by seed; never one whose score does not exist while another's does."""

    def table(metric: str, missing: float) -> NDArray[np.float64]:
        values = np.array([_column(seeds, metric) for seeds in pool.values()])
        return np.where(np.isnan(values), missing, values)

    scores = table(f"{chooser.metric}{chooser.judge}", -np.inf if chooser.greatest else np.inf)
    if chooser.cautious:
        over, error = (table(f"{chooser.metric}{end}{chooser.judge}", 0.0) for end in ("_over", "_over_error"))
        scores = np.where(over < -MARGIN * error, scores, np.inf)
        scores[list(pool).index(INCUMBENT)] = np.finfo(float).max  # the last to be taken
    taken: NDArray[np.int64] = scores.argmax(axis=0) if chooser.greatest else scores.argmin(axis=0)
    return taken
