"""The `train` verb: a data set in, a run out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from escm2rec.config import Config
from escm2rec.doctor import require_matching_packages
from escm2rec.errors import ConfigError
from escm2rec.paths import DataPath
from escm2rec.sharding.runtime import distributed_runtime, on_main
from escm2rec.training.choice import train_and_choose
from escm2rec.training.copies import copies_at
from escm2rec.training.cross_fit import train_objective
from escm2rec.training.idle import refuse_idle
from escm2rec.training.mlflow_log import load_mlflow


def train(
    config: Config,
    data: DataPath,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    profile: bool = False,
    warm_start: Path | None = None,
    copy_to: str | None = None,
) -> dict[str, Any]:
    """Train a model on the training split of `data` and leave a run at `out`; called by all ranks alike.

    With `choice.objectives` in the config it trains each of them beside the config's own and keeps that, unless another errs less on
    the validation split by more than a standard error (`choice.py`). With `resume`, goes on from the last complete checkpoint of `out`, on
    any number of ranks and (but for a choice) under any `training.sharding`, with the batches that an undisturbed training would have had;
    without one it starts anew. With `warm_start`, a finished run of this or another data set, it begins with what that one learned
    (`warm_start.py`); one that goes on has begun. With `profile` some steps are traced, and `out/profile/` says where their time went
    (`profile.py`). With `copy_to`, an fsspec URL, the run is kept there too, and fetched from there with `resume` where that holds a newer
    checkpoint (`copies.py`). Returns what is worth knowing of the run.
    ConfigError where a setting was written that has no effect (`idle.py`).
    """
    require_matching_packages()
    with distributed_runtime() as runtime, copies_at(copy_to, out, config.training.keep_checkpoints, runtime) as copies:
        on_main(runtime, lambda: _check_options(config, profile, copy_to))
        if copies is not None:
            copies.begin(config, data, resume, overwrite, warm_start)
        on_main(runtime, lambda: _check_config(config, out, resume))
        if config.choice.objectives:
            return train_and_choose(config, data, out, runtime, resume, overwrite, warm_start)
        return train_objective(config, data, out, runtime, resume, overwrite, profile, warm_start, copies)


def _check_options(config: Config, profile: bool, copy_to: str | None) -> None:
    if config.training.mlflow is not None:
        load_mlflow()
    for option, given in {"--profile": profile, "--copy-to": copy_to is not None}.items():
        if given and config.choice.objectives:
            raise ConfigError(
                f"{option} is of one training, and choice.objectives asks for several", "set choice.objectives to [] beside it"
            )


def _check_config(config: Config, out: Path, resume: bool) -> None:
    goes_on = resume and out.is_dir() and any(out.iterdir())
    if not goes_on:  # what goes on is held to the config that it began with, whatever was accepted then
        refuse_idle(config)
