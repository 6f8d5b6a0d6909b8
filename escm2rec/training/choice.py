"""Several objectives trained, one kept: the one whose CVR errs least on all impressions, as far as a log can say.

No log shows that error. It is estimated on the validation split by a propensity and imputed labels of a model of its own, trained like the
others with the naive objective: they saw no row of that split, so they are cross-fitted, and belong to none of the candidates.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from escm2rec.config import ChoiceConfig, Config, ObjectiveConfig
from escm2rec.errors import DataError
from escm2rec.evaluation.entire_risk import RiskEstimates, risk_estimates, risk_sums
from escm2rec.folder import MANIFEST, read_manifest, refuse_existing, refuse_overlap, write_json
from escm2rec.models.predictions import Predictions
from escm2rec.objectives.propensity import propensity
from escm2rec.reader.batch import Batch
from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from escm2rec.sharding.runtime import Runtime, on_main
from escm2rec.training.build import build_objective
from escm2rec.training.cross_fit import train_objective
from escm2rec.training.run import Run
from escm2rec.training.trained import TrainedModel

CANDIDATES, CHOICE = "candidates", "choice.json"
NUISANCE = "nuisance"


def train_and_choose(config: Config, data: Path, out: Path, runtime: Runtime, resume: bool, overwrite: bool) -> dict[str, Any]:
    """Train `objective` and each of `choice.objectives`, and leave the run of the best at `out`; called by all ranks alike.

    `out/candidates/` keeps the other runs, `out/choice.json` the estimated risks. With `resume` a choice that was cut off goes on where it
    stood. Returns what `train` returns of the kept run, and `choice`.
    """
    if finished := on_main(runtime, lambda: _open(data, out, resume, overwrite)):
        return finished
    runs = {f"{number}-{objective.kind}": objective for number, objective in enumerate([config.objective, *config.choice.objectives])}
    if not on_main(runtime, lambda: (out / CHOICE).exists()):
        for name, objective in [*runs.items(), (NUISANCE, ObjectiveConfig(kind="naive"))]:
            alone = config.model_copy(update={"objective": objective, "choice": ChoiceConfig()})
            train_objective(alone, data, out / CANDIDATES / name, runtime, resume=True, overwrite=False)
        estimates = _estimate(config, Dataset.open(data), out, list(runs), runtime)
        on_main(runtime, lambda: write_json(out / CHOICE, _choice(config.choice.by, estimates)))
    return on_main(runtime, lambda: _keep(out))


def _open(data: Path, out: Path, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Make the folder ready; what a finished run says of itself when there is nothing left to do."""
    if not Dataset.open(data).manifest["splits"].get("validation", {}).get("clicks"):
        raise DataError(
            f"choice.objectives are judged on the validation split, and {data} has no click in it",
            "give data.split a share for validation and preprocess again, or leave choice.objectives empty",
        )
    refuse_overlap(out, [data])
    unfinished = (out / CANDIDATES).is_dir() and not (out / MANIFEST).exists()
    if resume and (out / MANIFEST).exists():
        return _result(out)
    if unfinished and (resume or overwrite):
        if overwrite:
            shutil.rmtree(out)
    else:
        refuse_existing(out, "run", overwrite)
        shutil.rmtree(out, ignore_errors=True)
    (out / CANDIDATES).mkdir(parents=True, exist_ok=True)
    return None


def _estimate(config: Config, dataset: Dataset, out: Path, names: list[str], runtime: Runtime) -> dict[str, RiskEstimates]:
    """The risk of each run on the validation split. Memory: two logits a row of it, over the ranks."""
    nuisance_run = Run.open(out / CANDIDATES / NUISANCE)
    floor = build_objective(config.objective, nuisance_run.rates.ctr).floor
    nuisance = [predictions for _, predictions in _predictions(nuisance_run, dataset, runtime)]
    found = {}
    for name in names:
        total: Tensor = torch.zeros(7, dtype=torch.float64)
        for (batch, mine), judge in zip(_predictions(Run.open(out / CANDIDATES / name), dataset, runtime), nuisance, strict=True):
            rows = batch.num_rows
            q = propensity(judge.ctr_logit, floor)
            total += risk_sums(
                mine.cvr_logit, batch.click[:rows], batch.conversion[:rows], batch.weight[:rows], q=q, imputed_logit=judge.cvr_logit
            )
        total = total.to(runtime.device)
        dist.all_reduce(total, group=runtime.group)
        found[name] = risk_estimates(total)
    return found


def _predictions(run: Run, dataset: Dataset, runtime: Runtime) -> Iterator[tuple[Batch, Predictions]]:
    model = TrainedModel(run, runtime)
    size = run.config.training.global_batch_size
    reader = Reader(dataset, "validation", size, runtime.rank, runtime.world_size, lanes=runtime.world_size, shuffle=False)
    for batch in reader.epoch(0):
        yield batch, model(batch)


def _choice(by: str, estimates: dict[str, RiskEstimates]) -> dict[str, Any]:
    taken = min(estimates, key=lambda name: float(getattr(estimates[name], by)))
    return {"taken": taken, "by": by, "estimated_risk": {name: each._asdict() for name, each in estimates.items()}}


def _keep(out: Path) -> dict[str, Any]:
    """Move the taken run up; the manifest last, so that a run that looks finished is one. Cut off, it goes on when called again."""
    taken = out / CANDIDATES / str(_read_choice(out)["taken"])
    for entry in sorted(taken.iterdir(), key=lambda path: path.name == MANIFEST):
        os.replace(entry, out / entry.name)
    taken.rmdir()
    return _result(out)


def _read_choice(out: Path) -> dict[str, Any]:
    choice: dict[str, Any] = json.loads((out / CHOICE).read_text(encoding="utf-8"))
    return choice


def _result(out: Path) -> dict[str, Any]:
    manifest = read_manifest(out, "run")
    summary = {name: value for name, value in manifest.items() if name not in ("kind", "version")}
    return {"run": str(out), **summary, **({"choice": _read_choice(out)} if (out / CHOICE).exists() else {})}
