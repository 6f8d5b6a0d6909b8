"""Cells in parallel processes, each result a file: what is there is not computed again."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from escm2rec.errors import RunError
from escm2rec.folder import write_json
from escm2rec.models.predictions import Predictions
from escm2rec.orphans import end_with_parent
from escm2rec.progress import Progress
from escm2rec.study.candidates import CANDIDATES, INCUMBENT, Candidate
from escm2rec.study.cell import Draw, draw_world, train
from escm2rec.study.measure import measure
from escm2rec.study.worlds import World

CELLS = "cells"
JUDGE = Candidate({"kind": "naive"})
JUDGE_SEED = 1_000_000  # of another start than the naive candidate, which would else judge itself
FLEXIBLE_JUDGE = "_flexible"
Values = dict[str, float | None]


class Task(NamedTuple):
    """All candidates still missing for one seed of one world: they share its draws."""

    world: World
    seed: int
    candidates: tuple[str, ...]
    folder: Path


def run_cells(folder: Path, plan: Sequence[tuple[World, int, tuple[str, ...]]], workers: int) -> int:
    """Compute every cell of the plan (world, seeds, candidates) that is not in `folder` yet: how many there were.

    RunError, when all others are done, names one that failed.
    """
    tasks = [task for world, seeds, names in plan for seed in range(seeds) if (task := _missing(folder, world, seed, names)).candidates]
    total = sum(len(task.candidates) for task in tasks)
    context = multiprocessing.get_context("spawn")
    with Progress("study", total, unit="cells") as progress:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        try:
            running = {pool.submit(run_task, task): task for task in tasks}
            failed: list[str] = []
            for done in as_completed(running):
                task = running[done]
                if (error := done.exception()) is not None:
                    failed.append(f"world {task.world.name!r}, seed {task.seed}: {error}")
                progress.add(len(task.candidates), f"{task.world.name}, seed {task.seed}")
        finally:
            pool.shutdown(cancel_futures=True)
    if failed:
        message = f"{len(failed)} of {len(tasks)} tasks failed, the first in {failed[0]}"
        raise RunError(message, "all other cells are kept: the same command tries these again")
    return total


def read_cells(folder: Path, world: World, seeds: int, candidate: str) -> list[Values]:
    """The results of a candidate in a world, seed by seed."""
    return [json.loads(_path(folder, world, candidate, seed).read_text(encoding="utf-8")) for seed in range(seeds)]


def run_task(task: Task) -> None:
    """Draw one seed's world and train, measure and write each candidate; RunError names the one that failed."""
    draw = draw_world(task.world, task.seed)
    judges = _judges(task, draw)
    incumbent = train(task.world, CANDIDATES[INCUMBENT], draw.training, task.seed).predict(draw.held_out).cvr_logit
    for name in task.candidates:
        try:
            values = measure(train(task.world, CANDIDATES[name], draw.training, task.seed), draw, judges, incumbent)
        except Exception as error:
            raise RunError(f"{name}: {error}") from error
        path = _path(task.folder, task.world, name, task.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)


def _judges(task: Task, draw: Draw) -> dict[str, Predictions]:
    """What two models say of the held-out log: one of the world's own towers, as `train` has it by default, and one of flexible towers."""
    towers: dict[str, World] = {"": task.world, FLEXIBLE_JUDGE: replace(task.world, towers="flexible")}
    seed = task.seed + JUDGE_SEED
    return {name: train(replace(world, slope=1.0), JUDGE, draw.training, seed).predict(draw.held_out) for name, world in towers.items()}


def _start_worker() -> None:
    """One thread a worker; and none outlives a study that was killed."""
    torch.set_num_threads(1)
    end_with_parent()


def default_workers() -> int:
    """One a core that this process may use."""
    return len(os.sched_getaffinity(0))


def _missing(folder: Path, world: World, seed: int, names: tuple[str, ...]) -> Task:
    return Task(world, seed, tuple(name for name in names if not _path(folder, world, name, seed).exists()), folder)


def _path(folder: Path, world: World, candidate: str, seed: int) -> Path:
    return folder / CELLS / world.name.replace(" ", "_") / candidate.replace(" ", "_") / f"{seed}.json"
