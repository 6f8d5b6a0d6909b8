"""A propensity that knows no click it weighs: two models, each trained on one half of the training split and asked for the other.

In the first epoch p_hat is such a propensity by itself, since a row is weighed before it trains. In later ones it has seen the click. A
half is every second row group, so rows that stand together, like those of one user, mostly stay together.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from escm2rec.config import ChoiceConfig, Config, ObjectiveConfig
from escm2rec.errors import DataError
from escm2rec.folder import MANIFEST, write_manifest
from escm2rec.paths import DataPath
from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from escm2rec.sharding.runtime import Runtime, on_main
from escm2rec.training.copies import Copies
from escm2rec.training.owner import Owner
from escm2rec.training.run import PROPENSITY, Run
from escm2rec.training.trained import TrainedModel
from escm2rec.training.trainer import train_one

LOGITS = "logits.npy"
CTR_ONLY = ObjectiveConfig(kind="naive", lambda_c=0.0)


def train_objective(
    config: Config,
    data: DataPath,
    out: Path,
    runtime: Runtime,
    resume: bool,
    overwrite: bool,
    profiles: bool = False,
    warm_start: Path | None = None,
    copies: Copies | None = None,
) -> dict[str, Any]:
    """Train the config's objective, its propensity cross-fitted first where the config says so; called by all ranks alike, see `train`.

    `out/propensity/` then keeps the two runs and the logit of each training row. A profile is of the objective's own training. The two
    never start warm: the source may have seen the clicks that they must not know.
    """
    if not config.objective.propensity.cross_fit:
        return train_one(config, data, out, runtime, resume, overwrite, profiles=profiles, warm_start=warm_start, copies=copies)
    on_main(runtime, lambda: _check_halves(data))
    made = partial(_propensities, config, data, runtime)
    return train_one(
        config, data, out, runtime, resume, overwrite, propensities=made, profiles=profiles, warm_start=warm_start, copies=copies
    )


def _check_halves(data: DataPath) -> None:
    groups = len(Dataset.open(data).row_groups("train"))
    if groups < 2:
        raise DataError(
            f"objective.propensity.cross_fit halves the row groups of the training split, and {data} has {groups} in it",
            "preprocess again with fewer data.rows_per_group",
        )


def _propensities(config: Config, data: DataPath, runtime: Runtime, owner: Owner) -> Path:
    """Train on either half and predict the other: the file of the logits, in the order of the split."""
    folder = Path(owner.run) / PROPENSITY
    if on_main(runtime, lambda: (folder / MANIFEST).exists()):
        return folder / LOGITS
    unmeasured = {"evaluate_every_steps": None, "keep_best": None, "early_stopping": None}  # a CVR is not trained here
    half_of_steps = {"warmup_steps": config.training.warmup_steps // 2}
    training = config.training.model_copy(update=unmeasured | half_of_steps)
    alone = config.model_copy(update={"objective": CTR_ONLY, "choice": ChoiceConfig(), "training": training})
    for half in (0, 1):
        train_one(alone, data, folder / f"half-{half}", runtime, resume=True, overwrite=False, half=half)
    dataset = on_main(runtime, lambda: Dataset.open(data))
    rows = dataset.split_counts("train")["rows"]
    on_main(runtime, lambda: _make_logits(owner, folder / LOGITS, rows))
    for half in (0, 1):
        run = on_main(runtime, partial(Run.open, folder / f"half-{half}"))
        _predict(run, replace(dataset, half=1 - half), folder / LOGITS, runtime)
    on_main(runtime, lambda: _finish(owner, folder, {"rows": rows, "data": dataset.identity("train")}))
    return folder / LOGITS


def _make_logits(owner: Owner, path: Path, rows: int) -> None:
    owner.check()
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows,)).flush()


def _finish(owner: Owner, folder: Path, content: dict[str, Any]) -> None:
    owner.check()
    write_manifest(folder, "propensity", content)


def _predict(run: Run, dataset: Dataset, path: Path, runtime: Runtime) -> None:
    """Write the CTR logit of every row of the half. Rank 0 alone writes: with several writers a network disk may lose rows."""
    model = TrainedModel(run, runtime)
    size = run.config.training.global_batch_size
    reader = Reader(dataset, "train", size, runtime.rank, runtime.world_size, lanes=runtime.world_size, shuffle=False)
    logits = np.load(path, mmap_mode="r+") if runtime.is_main else None
    for step, batch in enumerate(reader.epoch(0)):
        mine = (reader.places(step), model(batch).ctr_logit.numpy())
        gathered: list[Any] | None = [None] * runtime.world_size if runtime.is_main else None
        dist.gather_object(mine, gathered, dst=0, group=runtime.group)
        if logits is not None:
            for places, found in gathered or []:
                logits[places] = found
    if logits is not None:
        logits.flush()
