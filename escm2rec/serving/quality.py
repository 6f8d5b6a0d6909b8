"""What an exported model loses: beside the same model in float32, on rows of a data set."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from escm2rec.config import Split
from escm2rec.errors import RunError
from escm2rec.evaluation.metrics import Floats, auc, calibration, ctcvr_logits
from escm2rec.paths import open_parquet
from escm2rec.reader.columns import Columns, decode, encoded_columns
from escm2rec.reader.dataset import Dataset
from escm2rec.serving.formats import Served
from escm2rec.serving.model import OUTPUTS, Inputs, model_inputs

BATCH_ROWS = 4_096
BLOCK_ROWS = 65_536
ROUNDS, ROUND_SECONDS = 5, 0.2  # of a rate
SAME, SAME_IN_HALF = 1e-5, 1e-2  # of probabilities: what a model that is read back may differ from the one that was written
Record = dict[str, Any]


def sample(dataset: Dataset, split: Split, rows: int) -> Iterator[Columns]:
    """The first rows of a split, with their labels."""
    left = rows
    names = encoded_columns(dataset.schema, labels=True)
    for entry in dataset.manifest["splits"][split]["files"]:
        path = dataset.path / entry["path"]
        with open_parquet(path) as file:
            for batch in file.iter_batches(BLOCK_ROWS, columns=names):
                if left <= 0:
                    return
                table = pa.Table.from_batches([batch]).slice(0, left)
                left -= len(table)
                yield decode(table, dataset.schema, labels=True, where=str(path))


def measure(fp32: Served, served: Served, dataset: Dataset, split: Split, rows: int) -> Record:
    """Largest and mean difference of each output, AUC and calibration of both and their change, and rows a second of both.

    CTR and CTCVR are measured on all rows, CVR on those clicked. Both run on as many threads as torch has here, `BATCH_ROWS` at a time.
    """
    blocks = list(sample(dataset, split, rows))
    batches = [model_inputs(block, *part, dataset.schema) for block in blocks for part in _parts(block.num_rows)]
    expected, found = (_run(model, batches) for model in (fp32, served))
    labels = {name: np.concatenate([block.labels[name] for block in blocks]) for name in ("click", "conversion", "weight")}
    rates = _rows_per_s({"fp32": fp32, "artifact": served}, batches)
    return {
        "rows": len(labels["click"]),
        "split": split,
        "difference": {name: _difference(expected[name], found[name]) for name in OUTPUTS},
        "metrics": _metrics(expected, found, labels),
        "rows_per_s": rates,
        "threads": torch.get_num_threads(),
        "batch_rows": BATCH_ROWS,
    }


def _parts(rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, BATCH_ROWS):
        yield start, min(start + BATCH_ROWS, rows)


@torch.no_grad()
def _run(model: Served, batches: list[Inputs]) -> dict[str, Floats]:
    found = [model(*batch) for batch in batches]
    return {name: np.concatenate([outputs[place].numpy() for outputs in found]).astype(np.float64) for place, name in enumerate(OUTPUTS)}


@torch.no_grad()
def _rows_per_s(models: dict[str, Served], batches: list[Inputs]) -> dict[str, int]:
    """The median of some rounds in which the models take turns: a machine that is slow for a while is so for all."""
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            done, began = 0, time.perf_counter()
            for batch in cycle(batches):
                model(*batch)
                done += batch[1].shape[1]
                if (seconds := time.perf_counter() - began) >= ROUND_SECONDS:
                    break
            rates[name].append(done / seconds)
    return {name: round(statistics.median(each)) for name, each in rates.items()}


def _difference(expected: Floats, found: Floats) -> Record:
    apart = np.abs(expected - found)
    return {"largest": float(apart.max()), "mean": float(apart.mean())}


def _metrics(expected: dict[str, Floats], found: dict[str, Floats], labels: dict[str, Any]) -> Record:
    """By task; None where it has no rows of both labels."""
    clicked = labels["click"] > 0
    every = np.ones(len(clicked), bool)
    told: Record = {}
    for task, rows, label in (
        ("ctr", every, labels["click"]),
        ("cvr", clicked, labels["conversion"]),
        ("ctcvr", every, labels["conversion"]),
    ):
        both = [_logits(outputs, task)[rows] for outputs in (expected, found)]
        of_task: Record = {}
        for name, metric in (("auc", auc), ("calibration", calibration)):
            before, after = (metric(logits, label[rows], labels["weight"][rows]) for logits in both)
            values = {"fp32": before, "artifact": after, "change": after - before}
            of_task[name] = {key: value if np.isfinite(value) else None for key, value in values.items()}
        told[task] = of_task
    return told


def _logits(outputs: dict[str, Floats], task: str) -> Floats:
    ctr, cvr = outputs["ctr_logit"], outputs["cvr_logit"]
    return {"ctr": ctr, "cvr": cvr, "ctcvr": ctcvr_logits(ctr, cvr)}[task]


@torch.no_grad()
def refuse_other(exported: Served, model: Served, batch: Inputs, in_half: bool) -> None:
    """RunError unless a model that was read back gives what the one that was written gives; less closely if its layers are in bfloat16."""
    tolerance = SAME_IN_HALF if in_half else SAME
    for name, expected, found in zip(OUTPUTS[:3], model(*batch), exported(*batch), strict=False):
        apart = float((expected - found).abs().max()) if len(expected) else 0.0
        if not apart <= tolerance:
            message = f"the exported model gives another {name} than the run's, by {apart:.2g} on a batch of {len(expected)}"
            raise RunError(message, "choose another --format, and report this")
