"""Speed and memory of preprocess on a Parquet table of simulated impressions. Prints one JSON object.

    python -m benchmarks.table
    python -m benchmarks.table --impressions 100000000 --distinct 20000000 --shape single --memory-gib 2 --repeats 1

The table is what `simulate --format parquet` writes, and a column `device` of `--distinct` ids scattered over int64: each occurs, half of
the impressions have a few of them. Shapes: `single`, 15 columns of one id, 4 numbers and a short list; `lists`, 4 long weighted lists
besides. values_per_s_per_core: ids and numbers in the data set (weights not counted) by seconds of the whole command, its start included,
and cores. plain: the same columns and rows copied by pyarrow alone in one process and thread, raw ids and Parquet lists as they are, which
checks, encodes and shuffles nothing. Memory is the most that the command and all that it started held at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.machine import facts, run_and_watch
from escm2rec.config import SimulationConfig
from escm2rec.parallel import default_workers
from escm2rec.preprocess.write import layout_of
from escm2rec.simulate import simulate

PIECE_ROWS = 1_000_000
SCATTER = np.int64(0x9E3779B97F4A7C15 - (1 << 64))  # odd: it maps the first so many numbers to so many others
PROFILES = [f"profile_{field}" for field in ("121", "122", "124", "125", "126", "127", "128", "129")]
SINGLE = ["user_id", *PROFILES, "item_id", "category", "shop", "brand", "scene", "device"]
COUNTS = [f"user_{what}_count" for what in ("category", "shop", "brand", "intention")]
HISTORIES = [f"history_{what}" for what in ("categories", "shops", "brands", "intentions")]


def features_of(shape: str) -> list[dict[str, Any]]:
    """The features of a shape, as a config has them."""
    features: list[dict[str, Any]] = [{"name": name, "kind": "categorical"} for name in SINGLE]
    features += [{"name": name, "kind": "numeric"} for name in COUNTS]
    features.append({"name": "intentions", "kind": "list"})
    if shape == "lists":
        features += [{"name": name, "kind": "weighted_list", "weights_column": f"{name}_weight"} for name in HISTORIES]
    return features


def columns_of(shape: str) -> list[str]:
    """The columns that these are read from, and the labels."""
    named = [feature[key] for feature in features_of(shape) for key in ("name", "weights_column") if key in feature]
    return [*named, "click", "conversion"]


def write_table(folder: Path, impressions: int, distinct: int, shape: str) -> None:
    """The table, in files of a million rows; whole or absent."""
    partial_folder = folder.with_suffix(".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    with ProcessPoolExecutor(default_workers()) as pool:
        list(pool.map(partial(_write_piece, partial_folder, impressions, distinct, shape), range(-(-impressions // PIECE_ROWS))))
    partial_folder.rename(folder)


def _write_piece(folder: Path, impressions: int, distinct: int, shape: str, number: int) -> None:
    first = number * PIECE_ROWS
    rows = np.arange(first, min(first + PIECE_ROWS, impressions), dtype=np.int64)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        logs = Path(temporary) / "logs"
        with contextlib.redirect_stderr(io.StringIO()):
            simulate(logs, len(rows), number, SimulationConfig(), "parquet")
        table = pq.read_table(logs / "part-00000.parquet", columns=[name for name in columns_of(shape) if name != "device"])
    few = (distinct * np.random.default_rng(number).random(len(rows)) ** 8).astype(np.int64)
    device = np.where(rows % 2 == 0, rows // 2 % distinct, few) * SCATTER
    pq.write_table(table.append_column("device", pa.array(device)), folder / f"piece-{number:05d}.parquet", compression="zstd")


def config_of(shape: str) -> dict[str, Any]:
    """A config of preprocess for the table."""
    split = {"by": "hash", "train": 0.8, "validation": 0.1, "test": 0.1}
    return {"data": {"source": {"kind": "table"}, "split": split, "features": features_of(shape)}}


def whole(table: Path, work: Path, shape: str, memory_gib: float) -> dict[str, Any]:
    """Preprocess in processes of its own, once."""
    config, out = work / "config.yaml", work / "out"
    config.write_text(yaml.safe_dump(config_of(shape)), encoding="utf-8")
    command = [sys.executable, "-m", "escm2rec", "preprocess", "--config", str(config), "--input", str(table), "--out", str(out)]
    began = time.perf_counter()
    printed, peaks = run_and_watch([*command, "--overwrite", "--memory-gib", str(memory_gib)])
    seconds = time.perf_counter() - began
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    rows = sum(split["rows"] for split in json.loads(printed)["splits"].values())
    values = rows * sum(feature["pooling_factor"] for feature in manifest["features"].values())  # of training rows, like all others
    rate = values / seconds / default_workers()
    written = sum(file.stat().st_size for file in out.rglob("part-*.parquet"))
    return {"rows": rows, "values": round(values), "seconds": seconds, "rate": rate, "written_mb": round(written / 1e6, 1), **peaks}


def plain(table: Path, work: Path, shape: str) -> float:
    """Seconds of copying the columns by pyarrow."""
    began = time.perf_counter()
    for batch in _batches(table, shape):
        pq.write_table(pa.Table.from_batches([batch]), work / "plain.parquet", **layout_of(batch.schema))
    return time.perf_counter() - began


def _batches(table: Path, shape: str) -> Iterator[pa.RecordBatch]:
    for path in sorted(table.glob("*.parquet")):
        with pq.ParquetFile(path, pre_buffer=False) as file:
            yield from file.iter_batches(1 << 16, columns=columns_of(shape), use_threads=False)


def measure(table: Path, work: Path, shape: str, memory_gib: float, repeats: int) -> dict[str, Any]:
    """Medians of so many runs, in turn with the plain copy."""
    runs, copies = [], []
    for _ in range(repeats):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        runs.append(whole(table, work, shape, memory_gib))
        copies.append(plain(table, work, shape))
    rate = statistics.median(run["rate"] for run in runs)
    copied = statistics.median(runs[0]["values"] / seconds for seconds in copies)
    return {
        "columns": len(columns_of(shape)),
        "raw_mb": round(sum(file.stat().st_size for file in table.glob("*.parquet")) / 1e6, 1),
        **{name: runs[0][name] for name in ("rows", "values", "written_mb")},
        "memory_gib": memory_gib,
        "seconds": [round(run["seconds"], 2) for run in runs],
        "values_per_s_per_core": round(rate),
        "plain_values_per_s_per_core": round(copied),
        "share_of_plain": round(rate / copied, 2),
        "peak_own_mb": [round(run["own_mb"]) for run in runs],
        "peak_mapped_mb": [round(run["mapped_mb"]) for run in runs],
    }


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--impressions", type=int, default=2_000_000)
    options.add_argument("--distinct", type=int, default=400_000)
    options.add_argument("--shape", choices=["single", "lists"], action="append")
    options.add_argument("--memory-gib", type=float, default=4.0)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--folder", type=Path, help="where the table and data set go, and stay; by default a temporary one")
    arguments = options.parse_args()
    shapes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for shape in arguments.shape or ["single", "lists"]:
            folder = (arguments.folder or Path(temporary)) / shape
            if not (folder / "table").is_dir():
                write_table(folder / "table", arguments.impressions, arguments.distinct, shape)
            shapes[shape] = measure(folder / "table", folder / "work", shape, arguments.memory_gib, arguments.repeats)
    print(json.dumps({"machine": facts(), "processes": default_workers(), "distinct": arguments.distinct, "shapes": shapes}, indent=1))


if __name__ == "__main__":
    main()
