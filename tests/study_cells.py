"""Cells of a study with planted values, and worlds small enough to train in a test."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from escm2rec.study.candidates import CANDIDATES
from escm2rec.study.presets import BASE, JUDGED, WORLDS, Preset
from escm2rec.study.run import Values
from escm2rec.study.summary import summarise

Cells = dict[str, dict[str, list[Values]]]
TINY = (
    replace(BASE, impressions=3_000),
    replace(BASE, name="tiny right", title="easy", impressions=3_000, towers="linear", interactions=False),
)
TINY_PRESET = Preset(TINY, ("naive", "escm2-ips"), 2, 2)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: threads would wait for each other, long on a busy machine. Of the module that imports it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planted(
    worlds: Sequence[str],
    names: Sequence[str],
    seeds: int,
    level: Callable[[str, str], float] = lambda world, name: 0.05,
    noise: float = 0.05,
) -> Cells:
    """KL `level(world, name)` times the exponential of normal noise; the other metrics around values of their own."""
    random = np.random.default_rng(7)

    def values(world: str, name: str) -> Values:
        kl = level(world, name) * float(np.exp(noise * random.standard_normal()))
        found: dict[str, float | None] = {
            "kl": kl,
            "kl_unclicked": kl,
            "true_risk": 0.3 + kl,
            "cvr_over_truth": 1 + 10 * kl,
            "ctr_kl": None,
        }
        found |= {"cvr_over_truth_unclicked": 1 + 12 * kl, "heldout_snips": 0.3 + kl, "heldout_dr": 0.3 - kl, "heldout_auc_clicked": 0.8}
        found |= {"heldout_snips_flexible": 0.3 + kl, "heldout_dr_flexible": 0.3 + kl}
        found |= {f"heldout_{by}_over{end}": 0.0 for by in ("snips", "dr") for end in ("", "_error", "_flexible", "_error_flexible")}
        if name not in ("esmm", "dcmt"):
            found["risk_error"] = 0.02 * float(random.standard_normal())
        return found if name in ("esmm", "naive") else found | {"effective_share": 0.5}

    return {world: {name: [values(world, name) for _ in range(seeds)] for name in names} for world in worlds}


def tree_of(cells: Mapping[str, Mapping[str, Sequence[Values]]]) -> dict[str, Any]:
    """What `study.json` would hold of cells of the usual worlds."""
    worlds = {world.name: asdict(world) for world in WORLDS}
    settings = {
        "version": "0.1.0",
        "constants": {"EPOCHS": 10, "EPOCHS_OF_IDS": 1, "BATCH_ROWS": 4_000, "BATCH_ROWS_OF_IDS": 2_000, "FRESH_ROWS": 50_000},
        "worlds": {name: worlds[name] for name in cells},
        "candidates": {name: CANDIDATES[name]._asdict() for of_world in cells.values() for name in of_world},
    }
    seeds = {name: len(next(iter(of_world.values()))) for name, of_world in cells.items()}
    return {"settings": settings, "seeds": seeds, **summarise(cells)}


@functools.cache
def full_tree() -> dict[str, Any]:
    """A study of all worlds and candidates, 20 seeds in judged worlds and 2 in others: IPS and DR win where something selects."""

    def level(world: str, name: str) -> float:
        corrects = name.startswith("escm2")
        easy = world in ("selection 0", "clicks at random", "hidden", "capacity right")
        return 0.001 if name == "oracle" else (0.02 if corrects else 0.01) if easy else (0.03 if corrects else 0.06)

    judged, others = ([world.name for world in WORLDS if (world.name in JUDGED) == wanted] for wanted in (True, False))
    cells = planted(judged, list(CANDIDATES), 20, level) | planted(others, list(CANDIDATES), 2, level)
    return tree_of({world.name: cells[world.name] for world in WORLDS})
