"""The run folder: what a training leaves on disk."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from escm2rec.config import Config, parse_config
from escm2rec.errors import ConfigError, DataError
from escm2rec.folder import MANIFEST, RUN_CONFIG, new_folder, read_manifest, refuse_overlap, write_json, write_manifest
from escm2rec.paths import DataPath, copy_folder
from escm2rec.reader.dataset import Dataset
from escm2rec.schema import Schema
from escm2rec.training.build import BaseRates
from escm2rec.training.checkpoint import latest_checkpoint, remove_checkpoints_after

METRICS = "metrics.jsonl"
DIVERGED = "diverged"  # batches of losses that were not finite
REPORTS = ("report.json", "report.html")
FREE_SETTINGS = tuple(
    f"training.{name}"
    for name in (
        *("epochs", "checkpoint_every", "keep_checkpoints", "evaluate_every", "keep_best", "early_stopping", "log_every"),
        *("max_skipped_steps", "prefetch_batches", "decode_threads", "sharding", "plan", "mlflow"),
    )
)
"""What may change when a run is resumed."""
PROPENSITY = "propensity"  # the cross-fitted one, if there is one
COVERAGE = "coverage.json"  # by feature, the shares of the training split that are missing and out of vocabulary: `score` compares
WARM_START = "warm_start.json"  # which run it begins with, and what was taken of it


@dataclass(frozen=True)
class Run:
    """A trained model on disk.

    `config.json`, `schema.json` and `vocabulary/` to read raw rows, `coverage.json`, `plan.json`, `metrics.jsonl`, `tensorboard/`,
    `checkpoints/`, and the `manifest.json` that makes it complete.
    """

    path: Path
    config: Config
    schema: Schema
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open a finished run; DataError when it is absent or incomplete."""
        manifest = read_manifest(path, "run", frozenset({"base_ctr", "base_cvr", "checkpoint", "steps"}))
        return cls(path, _read_config(path), Schema.load(path / "schema.json"), manifest)

    @property
    def rates(self) -> BaseRates:
        """Base rates of its training split."""
        return BaseRates(self.manifest["base_ctr"], self.manifest["base_cvr"])

    @property
    def checkpoint(self) -> Path:
        """Its last checkpoint."""
        return self.path / str(self.manifest["checkpoint"])

    @property
    def identity(self) -> dict[str, str]:
        """Which run this is, as one that begins with it says."""
        return {"run": str(self.path.resolve()), "checkpoint": self.checkpoint.name, "schema_hash": self.schema.hash()}


def start_run(out: Path, config: Config, dataset: Dataset, resume: bool, overwrite: bool, warm_start: Path | None = None) -> Run | None:
    """Make the run folder, or check that it can be resumed with this config, data set and source.

    A run that was started and has no checkpoint yet holds nothing to lose but bad batches that it kept: the same command starts it anew.
    Returns the run that it is to begin with: `warm_start`, or that which a start without a checkpoint named. None where there is none, and
    once there is a checkpoint.
    """
    refuse_overlap(out, [dataset.path])
    if resume and (latest_checkpoint(out) is not None or (out / PROPENSITY).is_dir()):
        check_resumable(out, config, dataset)
        begun_with = source_of(out)
        refuse_other_source(out, begun_with, warm_start)
        return None if begun_with is None or latest_checkpoint(out) is not None else Run.open(begun_with)
    source = open_source(out, warm_start or (source_of(out) if resume else None))
    with new_folder(out, "run", overwrite or _has_only_started(out)) as folder:
        if resume and (out / DIVERGED).is_dir():  # what a start without a checkpoint kept of its bad batches
            copy_folder(out / DIVERGED, folder / DIVERGED)
        copy_folder(dataset.path / "vocabulary", folder / "vocabulary")
        dataset.schema.save(folder / "schema.json")
        write_json(folder / RUN_CONFIG, config.model_dump(mode="json"))
        write_json(folder / COVERAGE, _coverage(dataset))
        if source is not None:
            write_json(folder / WARM_START, source.identity)
    return source


def _coverage(dataset: Dataset) -> dict[str, Any]:
    told = dataset.manifest.get("features", {}).items()
    return {name: {share: each[share]["train"] for share in ("missing", "oov") if share in each} for name, each in told}


def open_source(out: Path, warm_start: Path | None) -> Run | None:
    """The run that a new one at `out` is to begin with; DataError when it is no finished run, ConfigError when `out` is or holds it."""
    if warm_start is None:
        return None
    if out.resolve() in (warm_start.resolve(), *warm_start.resolve().parents):
        raise ConfigError(
            f"--warm-start {warm_start}: a run cannot begin with itself, and {out} is or holds it",
            "train into another --out; --resume goes on with a run",
        )
    return Run.open(warm_start)


def refuse_other_source(out: DataPath, begun_with: Path | None, asked: Path | None) -> None:
    """ConfigError when a run that goes on is asked for with another source than it began with; without one it goes on."""
    if asked is None or asked.resolve() == begun_with:
        return
    began = "without one" if begun_with is None else f"with {begun_with}"
    raise ConfigError(
        f"--warm-start {asked}: {out} began {began}, and goes on with what it learned since",
        "leave --warm-start out, or train into another --out",
    )


def go_on(out: Path, step: int) -> None:
    """Make a run unfinished again from `step` on: what was written after it, and what speaks of a finished run, is removed.

    Checkpoints too: those that were passed over as damaged would take the place of good ones among the newest.
    """
    for name in (MANIFEST, *REPORTS):
        (out / name).unlink(missing_ok=True)
    metrics = out / METRICS
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    partial = metrics.with_name(f".{METRICS}.partial")
    whole = (line for line in lines if line.endswith("\n"))  # the last one is cut where the disk was full
    partial.write_text("".join(line for line in whole if json.loads(line)["step"] <= step), encoding="utf-8")
    os.replace(partial, metrics)
    remove_checkpoints_after(out, step)


def read_records(out: Path) -> list[dict[str, Any]]:
    """The records of metrics so far."""
    metrics = out / METRICS
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return [json.loads(line) for line in lines]


def last_record(out: Path) -> dict[str, Any]:
    """The last record of metrics; empty when there is none."""
    return next(reversed(read_records(out)), {})


def finish_run(out: Path, content: dict[str, Any]) -> None:
    """Write the manifest that makes the run complete."""
    write_manifest(out, "run", content)


def source_of(run: DataPath) -> Path | None:
    """The run that a run began with; None where there is none."""
    path = run / WARM_START
    return Path(json.loads(path.read_text(encoding="utf-8"))["run"]) if path.is_file() else None


def _has_only_started(out: Path) -> bool:
    started = (out / RUN_CONFIG).is_file() and not (out / MANIFEST).exists() and latest_checkpoint(out) is None
    return started and not (out / PROPENSITY).is_dir()


def check_resumable(run: DataPath, config: Config, dataset: Dataset) -> None:
    """ConfigError or DataError when a run was not trained with such a config, or on such a data set."""
    before, now = _read_config(run).model_dump(mode="json"), config.model_dump(mode="json")
    different = [key for key in differences(before, now) if not key.startswith(FREE_SETTINGS)]
    if different:
        raise ConfigError(
            f"{run} was trained with another config: {', '.join(different[:5])} differ(s)",
            "resume with the config of the run, or train into another --out (docs/training.md lists what may change)",
        )
    if Schema.load(run / "schema.json").hash() != dataset.schema.hash():
        raise DataError(f"{run} was trained on a data set of another schema than {dataset.path}", "resume with the data set of the run")


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """The keys, dotted, under which two nested mappings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [found for key in keys for found in differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)]
    return [] if before == now else [path]


def _read_config(path: DataPath) -> Config:
    try:
        tree = json.loads((path / RUN_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} has no readable {RUN_CONFIG}", "is it a run folder?") from error
    return parse_config(tree, where=str(path / RUN_CONFIG))
