"""Several objectives trained, one kept: the first, unless another errs less on all impressions, as far as a log can say.

No log shows that error. It is estimated on the validation split by a propensity and imputed labels of a judge: a model of its own, trained
with the naive objective, another seed, and `choice.judge` for a network if one is given. It saw no row of that split (nor did the
candidates, but for a `calibration` fitted there). What the judge cannot learn biases it: a small one favours models that are wrong alike.

Less: below the first by more than `MARGIN` standard errors of the difference; of several such, the least risk. Where a correction gains
little, the least of several estimates is the least by chance, and its weights cost more than they bring (docs/decisions/0008).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from escm2rec.config import ChoiceConfig, Config, ObjectiveConfig
from escm2rec.errors import ConfigError, DataError
from escm2rec.evaluation.entire_risk import JUDGE_FLOOR, MARGIN, RiskEstimates, risk_estimates, risk_sums
from escm2rec.folder import MANIFEST, read_manifest, refuse_existing, refuse_overlap, write_json
from escm2rec.models.predictions import Predictions
from escm2rec.objectives.propensity import propensity
from escm2rec.paths import DataPath
from escm2rec.reader.batch import Batch
from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from escm2rec.sharding.runtime import Runtime, on_main
from escm2rec.training.build import build_objective
from escm2rec.training.cross_fit import train_objective
from escm2rec.training.owner import Owner
from escm2rec.training.run import Run, differences, open_source, refuse_other_source
from escm2rec.training.trained import TrainedModel

CANDIDATES, CHOICE, ASKED = "candidates", "choice.json", "asked.json"
JUDGE = "judge"
MOVED_MANIFEST = f".{MANIFEST}.kept"

logger = logging.getLogger(__name__)


class Estimated(NamedTuple):
    """Of one run: its risk, and how much that is above the first's (None of the first)."""

    risk: RiskEstimates
    above_first: RiskEstimates | None


def train_and_choose(
    config: Config, data: DataPath, out: Path, runtime: Runtime, resume: bool, overwrite: bool, warm_start: Path | None = None
) -> dict[str, Any]:
    """Train `objective` and each of `choice.objectives`, and leave the run of the one taken at `out`; called by all ranks alike.

    `out/candidates/` keeps the other runs, `out/choice.json` the estimated risks and why it was taken. With `resume` a choice that was cut
    off goes on where it stood. Each of them starts warm alike, where there is a `warm_start`; the judge never does, whose source may have
    seen the rows of the validation split. Returns what `train` returns of the kept run, and `choice`.
    """
    if finished := on_main(runtime, lambda: _open(config, data, out, resume, overwrite, warm_start)):
        return finished
    owner = Owner.take(out, runtime)  # of what lies beside the runs, which have owners of their own
    warm_start = on_main(runtime, lambda: _begun_with(out))
    runs = {f"{number}-{objective.kind}": objective for number, objective in enumerate(_objectives(config))}
    if not on_main(runtime, lambda: (out / CHOICE).exists()):
        for number, (name, objective) in enumerate(runs.items(), 1):
            _tell(runtime, f"choice: objective {number} of {len(runs)}, {name}: {_written(objective)}")
            alone = config.model_copy(update={"objective": objective, "choice": ChoiceConfig()})
            train_objective(alone, data, out / CANDIDATES / name, runtime, resume=True, overwrite=False, warm_start=warm_start)
        _tell(runtime, "choice: the judge")
        train_objective(_judge(config), data, out / CANDIDATES / JUDGE, runtime, resume=True, overwrite=False)
        _tell(runtime, f"choice: the risk of {len(runs)} objectives on the validation split")
        estimates = _estimate(data, out, list(runs), runtime)
        told = {name: _written(objective) for name, objective in runs.items()}
        on_main(runtime, lambda: _write(owner, _choice(config.choice.by, estimates) | {"objectives": told}))
    return on_main(runtime, lambda: _keep(owner))


def check_choice(config: Config) -> None:
    """ConfigError, with its place, when an objective does not hold together: before the first is trained."""
    build_objective(config.objective, base_ctr=0.5)
    for number, objective in enumerate(config.choice.objectives):
        try:
            build_objective(objective, base_ctr=0.5)
        except ConfigError as error:
            raise ConfigError(f"choice.objectives.{number}: {error.message}", error.hint) from error


def _objectives(config: Config) -> list[ObjectiveConfig]:
    return [config.objective, *config.choice.objectives]


def _written(objective: ObjectiveConfig) -> dict[str, Any]:
    """What sets an objective apart: its kind, and what is not as by default."""
    return {"kind": objective.kind, **objective.model_dump(mode="json", exclude_defaults=True)}


def _judge(config: Config) -> Config:
    model = config.choice.judge or config.model
    # Another seed: a naive candidate of the same one would be the judge itself, and judged by its own labels.
    training = config.training.model_copy(update={"seed": config.training.seed + 1})
    update = {"objective": ObjectiveConfig(kind="naive"), "choice": ChoiceConfig(), "model": model, "training": training}
    return config.model_copy(update=update)


def _open(config: Config, data: DataPath, out: Path, resume: bool, overwrite: bool, warm_start: Path | None) -> dict[str, Any] | None:
    """Make the folder ready; what a finished run says of itself when there is nothing left to do."""
    check_choice(config)
    dataset = Dataset.open(data)
    validation = dataset.manifest["splits"].get("validation", {})
    if not validation.get("clicks"):
        raise DataError(
            f"choice.objectives are judged on the clicks of the validation split: that of {data} has {validation.get('rows', 0):,} "
            "impressions and none",
            "give data.split a share for validation and preprocess again, or leave choice.objectives empty",
        )
    refuse_overlap(out, [data])
    asked = {"config": config.model_dump(mode="json"), "data": [dataset.identity("train"), dataset.identity("validation")]}
    begun = (out / CANDIDATES / ASKED).is_file()
    if begun and resume:
        before = json.loads((out / CANDIDATES / ASKED).read_text(encoding="utf-8"))
        if different := differences(before | {"warm_start": None}, asked | {"warm_start": None}):
            raise ConfigError(
                f"{out} was begun with another config or data set: {', '.join(different[:5])} differ(s)",
                "resume with those of the run, or train into another --out",
            )
        refuse_other_source(out, _begun_with(out), warm_start)
        return _result(out) if (out / MANIFEST).exists() else None
    open_source(out, warm_start)  # refused before anything is dropped
    if begun and not (out / MANIFEST).exists():
        if not overwrite:
            raise ConfigError(f"{out} holds a choice that was cut off", "--resume goes on with it, --overwrite drops it")
    else:
        refuse_existing(out, "run", overwrite)
    shutil.rmtree(out, ignore_errors=True)
    (out / CANDIDATES).mkdir(parents=True)
    write_json(out / CANDIDATES / ASKED, asked if warm_start is None else {**asked, "warm_start": str(warm_start.resolve())})
    return None


def _begun_with(out: Path) -> Path | None:
    """The run that each candidate begins with; None where there is none."""
    asked = json.loads((out / CANDIDATES / ASKED).read_text(encoding="utf-8"))
    return Path(asked["warm_start"]) if "warm_start" in asked else None


def _tell(runtime: Runtime, said: str) -> None:
    if runtime.is_main:
        logger.info(said)


def _estimate(data: DataPath, out: Path, names: list[str], runtime: Runtime) -> dict[str, Estimated]:
    """The risk of each run on the validation split. Memory: three logits a row of it, over the ranks."""
    opened = on_main(runtime, lambda: {name: Run.open(out / CANDIDATES / name) for name in [*names, JUDGE]})
    dataset = on_main(runtime, lambda: Dataset.open(data))
    floor = JUDGE_FLOOR * opened[JUDGE].rates.ctr
    judged = [predictions for _, predictions in _predictions(opened[JUDGE], dataset, runtime)]
    first: list[Tensor] = []
    found = {}
    for name in names:
        total: Tensor = torch.zeros(2, 2, 5, dtype=torch.float64)  # the risk, and how much it is above the first's
        for place, (batch, mine) in enumerate(_predictions(opened[name], dataset, runtime)):
            if name == names[0]:
                first.append(mine.cvr_logit)
            judge = judged[place]
            click, conversion, weight = (column[: batch.num_rows] for column in (batch.click, batch.conversion, batch.weight))
            seen = (mine.cvr_logit, click, conversion, weight, propensity(judge.ctr_logit, floor), judge.cvr_logit)
            total += torch.stack([risk_sums(*seen), risk_sums(*seen, beside=first[place])])
        total = total.to(runtime.device)
        dist.all_reduce(total, group=runtime.group)
        risk, above = (risk_estimates(each) for each in total)
        found[name] = Estimated(risk, None if name == names[0] else above)
    return found


def _predictions(run: Run, dataset: Dataset, runtime: Runtime) -> Iterator[tuple[Batch, Predictions]]:
    model = TrainedModel(run, runtime)
    size = run.config.training.global_batch_size
    reader = Reader(dataset, "validation", size, runtime.rank, runtime.world_size, lanes=runtime.world_size, shuffle=False)
    for batch in reader.epoch(0):
        yield batch, model(batch)


def _choice(by: str, estimates: dict[str, Estimated]) -> dict[str, Any]:
    first, *others = estimates
    gaps = {name: (getattr(above, by), getattr(above, f"{by}_standard_error")) for name in others if (above := estimates[name].above_first)}
    below = [name for name, (gap, error) in gaps.items() if error is not None and gap < -MARGIN * error]
    taken = min(below, key=lambda name: float(getattr(estimates[name].risk, by)), default=first)
    least = min(estimates, key=lambda name: float(getattr(estimates[name].risk, by)))
    gap, error = gaps.get(taken if below else least, (0.0, None))
    told = f"{-gap:.3g} below {first}, standard error of the difference {'unknown' if error is None else f'{error:.3g}'}"
    why = f"{taken} lies {told}" if below else f"{least} has the least risk"
    if not below and least != first:
        why += f", {told}: too little, {first} is kept"
    return {
        "taken": taken,
        "by": by,
        "why": why,
        "estimated_risk": {name: each.risk._asdict() for name, each in estimates.items()},
        "above_first": {name: above._asdict() for name in others if (above := estimates[name].above_first) is not None},
    }


def _write(owner: Owner, choice: dict[str, Any]) -> None:
    owner.check()
    write_json(Path(owner.run) / CHOICE, choice)


def _keep(owner: Owner) -> dict[str, Any]:
    """Move the taken run up; cut off, it goes on when called again. Neither place has a manifest until all is moved."""
    owner.check()
    out = Path(owner.run)
    taken = out / CANDIDATES / str(_read_choice(out)["taken"])
    if (taken / MANIFEST).exists():
        os.replace(taken / MANIFEST, taken / MOVED_MANIFEST)
    for entry in [path for path in taken.iterdir() if path.name != MOVED_MANIFEST]:
        os.replace(entry, out / entry.name)
    os.replace(taken / MOVED_MANIFEST, out / MANIFEST)
    taken.rmdir()
    return _result(out)


def _read_choice(out: Path) -> dict[str, Any]:
    choice: dict[str, Any] = json.loads((out / CHOICE).read_text(encoding="utf-8"))
    return choice


def _result(out: Path) -> dict[str, Any]:
    manifest = read_manifest(out, "run")
    summary = {name: value for name, value in manifest.items() if name not in ("kind", "version")}
    return {"run": str(out), **summary, **({"choice": _read_choice(out)} if (out / CHOICE).exists() else {})}
