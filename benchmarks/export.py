"""What an exported model loses and how fast it is, beside the run's in float32.

    python -m benchmarks.export [--hillstrom FOLDER]

quality: a run on 500,000 simulated impressions, and one on the real funnel of Hillstrom's campaign where its folder is given, dimension 16
and 64: bytes of the tables over those of float32, changes of AUC and calibration, the largest difference of a probability (test split).

rates: the reference shape (20 tables of 1M x 16, 29 ids a row), batches of 4,096 on all cores. Rounds take the models in turn: float32 in
eager PyTorch, and the artifacts; a ratio is of the rows/s of one round. `call_us`: one call of 1 and of 100 impressions on one thread.

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import facts
from benchmarks.reference import write_reference_data
from escm2rec.config import load_config, load_simulation, parse_config
from escm2rec.preprocess import preprocess
from escm2rec.reader.dataset import Dataset
from escm2rec.schema import Schema
from escm2rec.serving.artifact import Artifact
from escm2rec.serving.export import eager_model, export
from escm2rec.serving.formats import Format, Served
from escm2rec.serving.model import Inputs, model_inputs
from escm2rec.serving.quality import BATCH_ROWS, sample
from escm2rec.serving.weights import Weights
from escm2rec.simulate import simulate
from escm2rec.training.run import Run
from escm2rec.training.train import train

CONFIGS = Path(__file__).resolve().parents[1] / "data"
IMPRESSIONS = 500_000
DIMS = (16, 64)
PACKED: tuple[Weights, ...] = ("bf16", "int8", "int4")
CASES: tuple[tuple[Format, Weights], ...] = (
    *(("torchscript", weights) for weights in ("fp32", *PACKED)),
    *((format, weights) for format in ("torch-export", "aoti") for weights in ("fp32", "int8")),
)
BATCHES = 48
ROUND_SECONDS = 1.5
CALLS = 300


def quality(name: str, logs: Path, root: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Of a config of `data/` by dimension and weights."""
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    preprocess(config.data, logs, root / f"data-{name}")
    found: dict[str, Any] = {}
    for dim in DIMS:
        run = root / f"run-{name}-{dim}"
        train(load_config(CONFIGS / f"{name}.yaml", [*overrides, f"model.embedding_dim={dim}"]), root / f"data-{name}", run)
        for weights in PACKED:
            told = export(run, root / "quality", "torchscript", weights, overwrite=True)
            kept = ("tables_of_fp32", "measured_rows", "auc_change", "calibration_change", "largest_difference")
            found[f"{weights}, dimension {dim}"] = {key: told[key] for key in kept}
            print(name, dim, weights, told["auc_change"], file=sys.stderr, flush=True)
    return found


def rates(root: Path, rounds: int) -> dict[str, Any]:
    """Of the reference shape."""
    data, run = root / "data", root / "run"
    write_reference_data(data, BATCH_ROWS * BATCHES)
    schema = Schema.load(data / "schema.json")
    train(_config_of(schema), data, run)
    models: dict[str, Served] = {}
    exported: dict[str, Any] = {}
    for format, weights in CASES:
        name = f"{format}, {weights}"
        place = root / f"{format}-{weights}"
        told = export(run, place, format, weights, data, "train", BATCH_ROWS)
        exported[name] = {key: told[key] for key in ("model_bytes", "tables_of_fp32", "seconds")}
        models[name] = Artifact.open(place).load()
        print(name, exported[name], file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=root) as work:
        models = {"eager, fp32": eager_model(Run.open(run), Path(work)), **models}
        blocks = list(sample(Dataset.open(data), "train", BATCH_ROWS * BATCHES))
        batches = [
            model_inputs(block, start, start + BATCH_ROWS, schema)
            for block in blocks
            for start in range(0, block.num_rows - BATCH_ROWS + 1, BATCH_ROWS)
        ]
        found = [_round(models, batches, reverse=number % 2 == 1) for number in range(rounds)]
        calls = {name: _call_us(model, [model_inputs(blocks[0], 0, rows, schema) for rows in (1, 100)]) for name, model in models.items()}
    for name, call in calls.items():
        of_eager = [each[name] / each["eager, fp32"] for each in found]
        rate = {"rows_per_s": round(statistics.median(each[name] for each in found)), "of_eager": _median(of_eager)}
        if not name.endswith("fp32"):
            whole = f"{name.partition(', ')[0]}, fp32"
            rate["of_fp32"] = _median([each[name] / each[whole] for each in found])
        exported[name] = {**exported.get(name, {}), **rate, "call_us": call}
    return exported


def _median(ratios: Sequence[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(ratios), 3), "rounds": [round(each, 3) for each in ratios]}


def _config_of(schema: Schema) -> Any:
    features = [{"name": each.name, "kind": each.kind, "hash_size": each.num_embeddings} for each in schema.features]
    return parse_config(
        {
            "data": {"source": {"kind": "table"}, "split": {"by": "hash", "train": 1.0}, "features": features},
            "model": {"embedding_dim": 16, "tower_hidden": [128, 64]},
            "objective": {"kind": "escm2-dr"},
            "training": {"epochs": 1, "global_batch_size": 8_192},
        }
    )


@torch.inference_mode()
def _round(models: dict[str, Served], batches: list[Inputs], reverse: bool) -> dict[str, float]:
    """Rows/s of each model, one after the other."""
    found: dict[str, float] = {}
    for name in reversed(models) if reverse else models:
        models[name](*batches[0])
        rows, began = 0, time.perf_counter()
        for batch in cycle(batches):
            models[name](*batch)
            rows += BATCH_ROWS
            if (seconds := time.perf_counter() - began) >= ROUND_SECONDS:
                break
        found[name] = rows / seconds
    print(json.dumps({name: round(rate) for name, rate in found.items()}), file=sys.stderr, flush=True)
    return found


@torch.inference_mode()
def _call_us(model: Served, inputs: Sequence[Inputs]) -> dict[str, float]:
    """Median time of a call, by the number of impressions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    told = {}
    for batch in inputs:
        spent = []
        for _ in range(CALLS):
            began = time.perf_counter()
            model(*batch)
            spent.append(time.perf_counter() - began)
        told[str(batch[1].shape[1])] = round(statistics.median(spent) * 1e6, 1)
    torch.set_num_threads(threads)
    return told


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--hillstrom", type=Path, help="folder with hillstrom.csv")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="escm2rec-bench-") as name:
        root = Path(name)
        simulate(root / "logs", IMPRESSIONS, 0, load_simulation(CONFIGS / "simulated.yaml"), "parquet")
        found = {"simulated": quality("simulated", root / "logs", root)}
        if asked.hillstrom is not None:
            found["hillstrom"] = quality("hillstrom", asked.hillstrom, root)
        print(json.dumps({**facts(), "quality": found, "rates": rates(root, asked.rounds)}, indent=1))


if __name__ == "__main__":
    main()
