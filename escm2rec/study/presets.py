"""Which worlds, candidates and seeds a study has."""

from __future__ import annotations

from dataclasses import dataclass, replace

from escm2rec.study.candidates import CANDIDATES
from escm2rec.study.worlds import World

CHOOSING_SEEDS = 10
"""Seeds below it may choose a candidate; those from it on judge what was chosen."""

BASE = World("selection +0.8", "selection", "what is clicked converts better; CVR tower too small for the truth")
IDS = replace(BASE, dial="ids", users=2_000, impressions=240_000)
WORLDS = [
    BASE,
    replace(BASE, name="selection +0.4", title="the same, half as strong", selection=0.4),
    replace(BASE, name="selection 0", title="what draws clicks does not convert", selection=0.0),
    replace(BASE, name="clicks at random", title="no selection: all are clicked with the same chance", selection=0.0, click_std=0.0),
    replace(BASE, name="selection -0.4", title="what is clicked converts worse", selection=-0.4),
    replace(BASE, name="selection -0.8", title="the mirror of the first: what is clicked converts worse", selection=-0.8),
    replace(BASE, name="capacity flexible", dial="capacity", title="a CVR tower that can learn the truth", towers="flexible"),
    replace(BASE, name="capacity right", dial="capacity", title="a linear truth and linear towers", towers="linear", interactions=False),
    replace(BASE, name="ctr 2%", dial="ctr", title="clicks are rare", ctr=0.02),
    replace(BASE, name="ctr 30%", dial="ctr", title="clicks are frequent", ctr=0.3),
    replace(BASE, name="q too flat", dial="propensity", title="wrong propensity: logit halved, mean kept", slope=0.5),
    replace(BASE, name="q too steep", dial="propensity", title="wrong propensity: logit times 1.5, mean kept", slope=1.5),
    replace(BASE, name="negatives 10%", dial="negatives", title="one unclicked impression in ten kept, weighted", keep_rate=0.1),
    replace(BASE, name="overlap high", dial="overlap", title="clicked and unclicked are alike", click_std=0.5),
    replace(BASE, name="overlap low", dial="overlap", title="clicked and unclicked hardly overlap", click_std=2.0),
    replace(BASE, name="size 15k", dial="size", title="a quarter of the log", impressions=15_000),
    replace(BASE, name="size 240k", dial="size", title="four times the log", impressions=240_000),
    replace(BASE, name="hidden", dial="hidden", title="a score that no feature shows draws both", selection=0.0, hidden=1.0),
    replace(IDS, name="ids flexible", title="sparse ids, flexible towers", towers="flexible"),
    replace(IDS, name="ids small", title="sparse ids, CVR tower too small"),
]
JUDGED = ("selection +0.8", "selection -0.8", "selection 0", "clicks at random")
"""Worlds with more seeds, the fresh ones judging what the others chose. Where nothing selects, a price of 5% wants a short interval: both
such worlds were given these seeds after ten had left the second open (docs/decisions/0007)."""


@dataclass(frozen=True)
class Preset:
    """What a study runs: each candidate in each world, with seeds 0, 1, ... below a number of its own."""

    worlds: tuple[World, ...]
    candidates: tuple[str, ...]
    seeds: int
    judged_seeds: int

    def seeds_of(self, world: World) -> int:
        """How many seeds a world has."""
        return self.judged_seeds if world.name in JUDGED else self.seeds


QUICK = ("esmm", "naive", "naive+ctcvr", "escm2-ips", "escm2-dr")
PRESETS = {
    "quick": Preset(tuple(world for world in WORLDS if world.name in ("selection +0.8", "capacity right")), QUICK, 5, 5),
    "full": Preset(tuple(WORLDS), tuple(CANDIDATES), 10, 30),
}
