"""Before the first step: whether a config and a data set go together, and the run folder."""

from __future__ import annotations

import logging
from pathlib import Path

from escm2rec.config import Config
from escm2rec.errors import ConfigError, DataError
from escm2rec.paths import DataPath
from escm2rec.reader.dataset import Dataset
from escm2rec.training.build import build_objective
from escm2rec.training.calendar import Calendar
from escm2rec.training.run import Run, start_run

logger = logging.getLogger(__name__)


def start(config: Config, data: DataPath, out: Path, resume: bool, overwrite: bool, warm_start: Path | None) -> tuple[Dataset, Run | None]:
    """The data set that a config trains on, and the run that it begins with, if any, when the run folder is there; see `start_run`.

    ConfigError or DataError where the two do not go together.
    """
    dataset = Dataset.open(data)
    dataset.split_counts("train")
    _check_features(config, dataset)
    held = dataset.manifest.get("negative_keep_rate", 1.0)
    if config.data.negative_keep_rate != held:
        raise ConfigError(
            f"data.negative_keep_rate is {config.data.negative_keep_rate:g}, the data set at {data} was made with {held:g}",
            f"set it to {held:g}, or preprocess again",
        )
    build_objective(config.objective, 0.5)
    if not dataset.manifest["splits"].get("validation", {}).get("rows"):
        _refuse_without_validation(config, data)
    _check_best(config, dataset)
    _check_steps(config, dataset)
    _warn_of_labels(dataset.split_counts("train"))
    return dataset, start_run(out, config, dataset, resume, overwrite, warm_start)


def _refuse_without_validation(config: Config, data: DataPath) -> None:
    uses = {
        "objective.propensity.calibration fits to": (config.objective.propensity.calibration != "none", "calibration: none"),
        "training.evaluate_every_steps measures on": (config.training.evaluate_every_steps is not None, "evaluate_every_steps: null"),
    }
    for what, (asked, instead) in uses.items():
        if asked:
            raise DataError(
                f"{what} the validation split, and {data} has no rows in it",
                f"give data.split a share for validation and preprocess again, or set {instead}",
            )


def _check_best(config: Config, dataset: Dataset) -> None:
    """DataError when the validation split has not what the metric of `keep_best` needs: after a training it would be late to say so."""
    metric = config.training.keep_best
    if metric is None:
        return
    rows, clicks, conversions = (dataset.split_counts("validation")[name] for name in ("rows", "clicks", "conversions"))
    positives, of = {"ctr": (clicks, rows), "cvr": (conversions, clicks), "ctcvr": (conversions, rows)}[metric.partition("_")[0]]
    if of == 0 or (metric.endswith("auc") and positives in (0, of)):
        raise DataError(
            f"training.keep_best: {metric} cannot be had of the validation split, which has {positives:,} positives among {of:,}",
            "choose another metric, or give data.split a larger share for validation and preprocess again",
        )


def _check_steps(config: Config, dataset: Dataset) -> None:
    """ConfigError for a warm-up that does not end, and warnings of what never comes, by the number of steps."""
    training, propensity = config.training, config.objective.propensity
    steps = training.epochs * -(-dataset.split_counts("train")["rows"] // training.global_batch_size)
    total = Calendar(steps, propensity.calibration_every_steps if propensity.calibration != "none" else None).total
    if training.warmup_steps >= total:
        raise ConfigError(
            f"training.warmup_steps is {training.warmup_steps}, and the training has {total} steps",
            "warm up over fewer, or train for more epochs or in smaller batches",
        )
    measurements = 0 if training.evaluate_every_steps is None else -(-steps // training.evaluate_every_steps)
    if training.early_stopping is not None and training.early_stopping >= measurements:
        logger.warning(
            "training.early_stopping (%d) never stops: there are %d measurements in %d steps", training.early_stopping, measurements, steps
        )
    if training.gradient_accumulation_steps > steps:
        logger.warning(
            "training.gradient_accumulation_steps (%d): all but the tables is stepped once, there are %d steps",
            training.gradient_accumulation_steps,
            steps,
        )


def _check_features(config: Config, dataset: Dataset) -> None:
    """ConfigError when the config describes other features than the data set was made with."""
    asked = {feature.name: feature for feature in config.data.features}
    held = {feature.name: feature for feature in dataset.schema.features}
    for name in sorted(asked.keys() | held.keys()):
        if name in asked and name in held:
            said = held[name].differs_from(asked[name])
        else:
            said = "this feature, the data set was made without it" if name in asked else "no such feature, the data set has one"
        if said is not None:
            raise ConfigError(
                f"feature {name!r}: the config says {said} ({dataset.path})",
                "preprocess again with this config, or train with the config of the data set",
            )


def _warn_of_labels(counts: dict[str, int]) -> None:
    for label, learned in (("clicks", "neither CTR nor CVR"), ("conversions", "no CVR")):
        if not counts[label]:
            logger.warning("the training split has no %s: %s can be learned from it", label, learned)
            return
