"""The `evaluate` verb: a run and a split in, `report.json` and `report.html` out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import torch.distributed as dist

from escm2rec.config import KEPT_PREFIX, MatrixSource, Split
from escm2rec.disk import telling_of_disk
from escm2rec.doctor import require_matching_packages
from escm2rec.errors import ConfigError, DataError
from escm2rec.evaluation.html import write_html
from escm2rec.evaluation.propensity import PropensityDiagnostics
from escm2rec.evaluation.report import Record, build_report, flat_metrics
from escm2rec.folder import write_json
from escm2rec.paths import DataPath
from escm2rec.progress import Progress
from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from escm2rec.sharding.runtime import Runtime, distributed_runtime, on_main
from escm2rec.training.choice import CHOICE
from escm2rec.training.fetched import run_here
from escm2rec.training.run import REPORTS, Run
from escm2rec.training.trained import TrainedModel


def evaluate(
    run: DataPath, data: DataPath, split: Split = "test", by: Sequence[str] = (), user: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Measure a run on a split and write `report.json` and `report.html` into its folder or place; called by all ranks alike.

    Every row of the split counts once on any number of ranks. `by` and `user` name kept columns. The test split of rating matrices is one
    of random impressions, ranked within `user` unless another column is named. Of a run that `train` chose among several, the report says
    so. Returns the metrics, flat, with their population in the name, and the paths of the report.
    """
    require_matching_packages()
    started = time.perf_counter()
    with ExitStack() as stack:
        runtime = stack.enter_context(distributed_runtime())
        on_main(runtime, lambda: _check_place(run, overwrite))
        here = stack.enter_context(run_here(run, runtime))
        opened, dataset = on_main(runtime, lambda: _open(run, here, data, split))
        choice = on_main(runtime, lambda: _choice(here))
        at_random = split == "test" and isinstance(dataset.schema.source, MatrixSource)
        user = "user" if at_random and user is None else user
        columns = on_main(runtime, lambda: _extra_columns(dataset, [*by, *([user] if user is not None else [])]))
        model = TrainedModel(opened, runtime)
        diagnostics = None if at_random else PropensityDiagnostics(dataset.schema, model.objective.floor)
        predictions = _predict(model, diagnostics, opened, dataset, split, columns, runtime)

        def report() -> dict[str, Any]:
            assert predictions is not None
            tree = build_report(predictions, by, user, at_random)
            if diagnostics is not None:
                tree["propensity"] |= _propensity(model, diagnostics)
            tree = {"run": _facts(run, opened, dataset, split, time.perf_counter() - started), **choice, **tree}
            with telling_of_disk(here, "run the same command again"):
                write_json(here / "report.json", tree)
                write_html(tree, here / "report.html", f"{opened.config.objective.kind} on {split}")
            if not isinstance(run, Path):
                for name in reversed(REPORTS):  # the one that is looked for comes last
                    (run / name).put(here / name)
            return {"report": str(run / "report.html"), "rows": predictions.height, **tree["run"], "metrics": flat_metrics(tree)}

        return on_main(runtime, report)


def _check_place(run: DataPath, overwrite: bool) -> None:
    """ConfigError where there is a report, DataError where a store takes none: before all is measured."""
    if (run / REPORTS[0]).exists() and not overwrite:
        raise ConfigError(f"{run / REPORTS[0]} exists", "pass --overwrite to replace it")
    if not isinstance(run, Path) and run.is_dir():
        tried = run / ".report.tried"
        tried.put(Path(os.devnull))
        tried.remove()


def _open(run: DataPath, here: Path, data: DataPath, split: Split) -> tuple[Run, Dataset]:
    opened, dataset = Run.open(here), Dataset.open(data)
    dataset.split_counts(split)
    if opened.schema.hash() != dataset.schema.hash():
        raise DataError(f"{run} was trained on another schema than that of {data}", "evaluate on the data set that the run was trained on")
    return opened, dataset


def _extra_columns(dataset: Dataset, kept: Sequence[str]) -> tuple[str, ...]:
    schema = dataset.schema
    for name in kept:
        if name not in schema.keep:
            known = ", ".join(schema.keep) or "none"
            raise ConfigError(f"the data set keeps no column {name!r}; it keeps: {known}", "name it under data.keep and preprocess again")
    return tuple(dict.fromkeys([KEPT_PREFIX + name for name in kept] + (["true_propensity", "true_cvr"] if schema.has_truth else [])))


def _predict(
    model: TrainedModel,
    diagnostics: PropensityDiagnostics | None,
    run: Run,
    dataset: Dataset,
    split: Split,
    columns: tuple[str, ...],
    runtime: Runtime,
) -> pl.DataFrame | None:
    """Labels, logits and extra columns of every row of the split, on rank 0 (None elsewhere); the diagnostics of all ranks' rows."""
    reader = Reader(
        dataset,
        split,
        run.config.training.global_batch_size,
        runtime.rank,
        runtime.world_size,
        lanes=runtime.world_size,
        shuffle=False,
        extra_columns=columns,
    )
    parts: list[pa.Table] = []
    with Progress("evaluate", reader.num_rows, runtime.is_main) as progress:
        for batch, extra in reader.read_ahead(0):
            logits, rows = model(batch), batch.num_rows
            if not rows:  # a small split leaves none for some ranks, and then no extra columns
                continue
            if diagnostics is not None:
                diagnostics.add(batch, model.propensity(logits), model.click_probability(logits))
            found = {"ctr_logit": logits.ctr_logit.numpy(), "cvr_logit": logits.cvr_logit.numpy()}
            found |= {name: getattr(batch, name)[:rows].numpy().astype(np.uint8) for name in ("click", "conversion")}
            if dataset.schema.has_weight:
                found["weight"] = batch.weight[:rows].numpy()
            parts.append(pa.table({**found, **dict(zip(extra.column_names, extra.columns, strict=True))}))
            progress.add(rows * runtime.world_size)
    if diagnostics is not None:
        diagnostics.reduce(runtime)
    gathered: list[Any] | None = [None] * runtime.world_size if runtime.is_main else None
    dist.gather_object(parts, gathered, dst=0, group=runtime.group)
    if gathered is None:
        return None
    frame = pl.from_arrow(pa.concat_tables([part for each in gathered for part in each]))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _propensity(model: TrainedModel, diagnostics: PropensityDiagnostics) -> Record:
    """The diagnostics, with what the run made of its propensity."""
    found = diagnostics.report()
    found["weights"] |= {"weighs": model.objective.estimator.weighs, "own_tower": "propensity" in model.objective.towers}
    if model.calibration is not None:
        found["weights"] |= dict(zip(("slope", "shift"), model.calibration.tolist(), strict=True))
    return found


def _choice(run: Path) -> Record:
    """`choice` of a run that was kept out of several: which, by what, among how many, and what follows for its figures."""
    path = run / CHOICE
    if not path.exists():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON: {error}", "it was changed after it was written: train again") from error
    if not isinstance(read, dict) or not {"taken", "by", "estimated_risk"} <= read.keys():
        message = f"{path} does not say what was taken, by what and among which"
        raise DataError(message, "it was changed after it was written: train again")
    taken, by, candidates = str(read["taken"]), str(read["by"]), len(read["estimated_risk"])
    why = f" ({read['why']})" if "why" in read else ""
    says = (
        f"Chosen: this run, {taken}, is one of {candidates} that were trained, chosen by the CVR risk on all impressions that the "
        f"validation split lets {by.upper()} estimate{why}. Its figures on the validation split may therefore be a little too good; those "
        "on the test split are not."
    )
    return {"choice": {"taken": taken, "by": by, "candidates": candidates, "says": says}}


def _facts(place: DataPath, run: Run, dataset: Dataset, split: Split, seconds: float) -> dict[str, Any]:
    return {
        "run": str(place),
        "objective": run.config.objective.kind,
        "data": str(dataset.path),
        "split": split,
        "checkpoint": str(run.manifest["checkpoint"]),
        "steps": run.manifest["steps"],
        "seconds": round(seconds, 3),
    }
