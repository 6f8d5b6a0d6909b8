"""Speed of the reader alone on one core, and how well its order is mixed. Prints one JSON object.

    python -m benchmarks.reader

speed: rows/s on one core and one thread, global batch 8,192, shuffled as training reads it, for 20 single-valued features and for the
reference shape (14 single, 6 lists, 29 ids a row; `benchmarks/reference.py`). Beside it, in turn in the same process: `iter_batches`, which
is pyarrow's iteration over the same files into such batches, neither shuffled nor checked; `data_loader`, torch's DataLoader, shuffled,
over the rows of one row group as Python numbers in memory (only so many, because it is slow). Medians of all rounds.

order: clicks in the order of reading, where rows lie grouped by user and users differ in their click rate (a Beta distribution), against
a full shuffle and the order of the files. autocorrelation: of the clicks, at some lags. batch_variance: the variance of the batches' click
rates over that of batches drawn without replacement: 1 is a full shuffle.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.machine import facts
from benchmarks.reference import reference_schema, write_reference_data
from escm2rec.cells import CELLS, from_cells, with_lists
from escm2rec.config import TableSource
from escm2rec.folder import new_folder, write_manifest
from escm2rec.reader.batch import Batch
from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from escm2rec.schema import Feature, Schema

GLOBAL_BATCH = 8192
LAGS = (1, 2, 4, 8, 64, 1024)
SHAPES = {"20 single": (20, 0), "14 single, 6 lists": (14, 6)}
Row = dict[str, Any]


def iter_batches(dataset: Dataset) -> Iterator[Batch]:
    """The plain way: pyarrow's record batches, each made a batch; in the order of the files."""
    names = [feature.name for feature in dataset.schema.tables]
    for path in dict.fromkeys(str(group.path) for group in dataset.row_groups("train")):
        for table in pq.ParquetFile(path, memory_map=True).iter_batches(GLOBAL_BATCH, columns=[*names, "click", "conversion"]):
            lengths, values = [], []
            for name in names:
                column = table.column(name)
                flat, offsets = from_cells(column, pa.int32()) if column.type == CELLS else (column, np.arange(len(column) + 1))
                lengths.append(np.diff(offsets).astype(np.int32))
                values.append(flat.to_numpy())
            yield _batch(names, np.concatenate(lengths), np.concatenate(values), table["click"].to_numpy(), table["conversion"].to_numpy())


def data_loader(dataset: Dataset) -> Iterator[Batch]:
    """The other plain way: torch's DataLoader over the rows of the first row group, each a dictionary."""
    names = [feature.name for feature in dataset.schema.tables]
    group = dataset.row_groups("train")[0]
    rows: list[Row] = with_lists(pq.ParquetFile(str(group.path)).read_row_group(group.index)).to_pylist()

    def collate(drawn: Sequence[Row]) -> Batch:
        ids = [row[name] if isinstance(row[name], list) else [row[name]] for name in names for row in drawn]
        lengths, values = np.array([len(each) for each in ids], np.int32), np.array([value for each in ids for value in each])
        return _batch(names, lengths, values, np.array([row["click"] for row in drawn]), np.array([row["conversion"] for row in drawn]))

    return iter(DataLoader(rows, batch_size=GLOBAL_BATCH, shuffle=True, collate_fn=collate))  # type: ignore[arg-type]


def _batch(names: list[str], lengths: NDArray[Any], values: NDArray[Any], click: NDArray[Any], conversion: NDArray[Any]) -> Batch:
    ids = KeyedJaggedTensor(names, torch.from_numpy(values.astype(np.int64)), lengths=torch.from_numpy(lengths), stride=len(click))
    labels = [torch.from_numpy(label.astype(np.float32)) for label in (click, conversion)]
    return Batch(ids, None, torch.empty(len(click), 0), *labels, torch.ones(len(click)), len(click))


def rate(batches: Iterator[Batch]) -> float:
    """Rows/s until the batches end, each dropped as it comes."""
    rows, began = 0, time.perf_counter()
    for batch in batches:
        rows += batch.num_rows
    return rows / (time.perf_counter() - began)


def speed(data: Path, rounds: int) -> dict[str, Any]:
    """Rates of the reader and the plain ways, in turn."""
    dataset = Dataset.open(data)
    reader = Reader(dataset, "train", GLOBAL_BATCH)
    rate(batch for batch, _ in reader.batches(0))  # warm-up: the files are cached then
    rates: dict[str, list[float]] = {"reader": [], "iter_batches": [], "data_loader": []}
    for epoch in range(rounds):
        rates["reader"].append(rate(batch for batch, _ in reader.batches(epoch)))
        rates["iter_batches"].append(rate(iter_batches(dataset)))
        rates["data_loader"].append(rate(data_loader(dataset)))
    medians = {name: statistics.median(each) for name, each in rates.items()}
    return {
        "rows": reader.num_rows,
        "rows_per_s": {name: round(median) for name, median in medians.items()},
        "range": {name: [round(min(each)), round(max(each))] for name, each in rates.items()},
        "reader_over": {name: round(medians["reader"] / medians[name], 2) for name in ("iter_batches", "data_loader")},
    }


def write_grouped_data(out: Path, rows: int, rows_per_group: int, rows_per_user: int = 100) -> None:
    """A data set whose rows come user by user; a user clicks at a rate of their own, drawn from Beta(0.2, 1.8): 10% in the mean."""
    users = -(-rows // rows_per_user)
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(users, dtype=np.int32), rng.multinomial(rows, np.full(users, 1 / users)))
    click = (rng.random(rows) < rng.beta(0.2, 1.8, users)[user]).astype(np.uint8)
    table = pa.table({"user": user, "click": click, "conversion": np.zeros(rows, np.uint8), "kept.place": np.arange(rows)})
    feature = Feature(name="user", kind="categorical", column="user", value_type="int64", encoding="hash", num_embeddings=users)
    schema = Schema(source=TableSource(kind="table"), features=(feature,), keep=("place",))
    with new_folder(out, "data set", overwrite=True) as folder:
        (folder / "train").mkdir()
        (folder / "vocabulary").mkdir()
        pq.write_table(table, folder / "train" / "part-00000.parquet", row_group_size=rows_per_group)
        schema.save(folder / "schema.json")
        counts = {"rows": rows, "clicks": int(click.sum()), "conversions": 0}
        splits = {"train": {**counts, "files": [{"path": "train/part-00000.parquet", **counts}]}}
        write_manifest(folder, "data set", {"schema_hash": schema.hash(), "splits": splits})


def mixing(clicks: NDArray[np.float64], batch: int) -> dict[str, Any]:
    """How well an order of clicks is mixed: see above."""
    centred = clicks - clicks.mean()
    spread = float(centred @ centred)
    autocorrelation = {str(lag): round(float(centred[lag:] @ centred[:-lag]) / spread, 5) for lag in LAGS if lag < len(clicks)}
    means = clicks[: len(clicks) // batch * batch].reshape(-1, batch).mean(axis=1)
    expected = clicks.var() / batch * (len(clicks) - batch) / (len(clicks) - 1)
    return {"autocorrelation": autocorrelation, "batch_variance": round(float(np.mean((means - clicks.mean()) ** 2) / expected), 3)}


def order(data: Path, batch: int, lanes: Sequence[int], epochs: int = 4) -> dict[str, Any]:
    """`mixing` of the reader by number of lanes, of a full shuffle and of the files; means over epochs."""
    dataset = Dataset.open(data)
    in_files = pq.read_table(data / "train" / "part-00000.parquet", columns=["click"])["click"].to_numpy().astype(np.float64)

    def read(of_lanes: int, epoch: int) -> NDArray[np.float64]:
        batches = Reader(dataset, "train", batch, lanes=of_lanes).batches(epoch)
        return np.concatenate([each.click.numpy() for each, _ in batches]).astype(np.float64)

    orders = {"files": [in_files], "full shuffle": [np.random.default_rng(epoch).permutation(in_files) for epoch in range(epochs)]}
    orders |= {f"reader, {of_lanes} lanes": [read(of_lanes, epoch) for epoch in range(epochs)] for of_lanes in lanes}
    return {name: _mean([mixing(clicks, batch) for clicks in each]) for name, each in orders.items()}


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    lags = found[0]["autocorrelation"]
    return {
        "autocorrelation": {lag: round(statistics.mean(each["autocorrelation"][lag] for each in found), 5) for lag in lags},
        "batch_variance": round(statistics.mean(each["batch_variance"] for each in found), 3),
    }


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=1_048_576)
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args()
    machine = facts()
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            data = Path(folder) / "-".join(map(str, shape))
            write_reference_data(data, arguments.rows, schema=reference_schema(*shape))
            found[name] = speed(data, arguments.rounds)
        grouped = Path(folder) / "grouped"
        write_grouped_data(grouped, 2_097_152, rows_per_group=32_768)
        mixed = order(grouped, GLOBAL_BATCH, lanes=(1, 8, 32))
    print(json.dumps({"machine": machine, "cores": 1, "global_batch_size": GLOBAL_BATCH, "speed": found, "order": mixed}, indent=1))


if __name__ == "__main__":
    main()
