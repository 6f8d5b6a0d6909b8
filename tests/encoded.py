"""Small encoded data sets of every feature kind, written without preprocess, for tests of the reader, training and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from escm2rec.cells import from_cells, to_cells
from escm2rec.config import Config, TableSource, parse_config
from escm2rec.folder import new_folder, write_manifest
from escm2rec.schema import Feature, Schema

TABLE_ROWS = {"user": 300, "tags": 60, "history": 80, "scene": 5}


def schema() -> Schema:
    """A categorical, a list, a weighted list, a small categorical with missing values, and two numbers."""
    tables = [("user", "categorical"), ("tags", "list"), ("history", "weighted_list"), ("scene", "categorical")]
    features = [
        Feature(name=name, kind=kind, column=name, value_type="int64", encoding="hash", num_embeddings=TABLE_ROWS[name])
        for name, kind in tables
    ]
    numbers = [Feature(name=name, kind="numeric", column=name) for name in ("price", "age")]
    return Schema(source=TableSource(kind="table"), features=(*features, *numbers), keep=("row_id", "group"), has_truth=True)


def impressions(rows: int, seed: int) -> pa.Table:
    """Encoded impressions whose clicks and conversions depend on the features; `kept.row_id` counts them."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, TABLE_ROWS["user"], rows)
    scene = rng.integers(0, TABLE_ROWS["scene"], rows)
    price, age = rng.normal(size=rows), rng.normal(size=rows)
    propensity = 1 / (1 + np.exp(1.0 - 0.8 * price - np.sin(user)))
    cvr = 1 / (1 + np.exp(1.2 - 0.8 * price - 0.5 * scene + age))
    click = rng.random(rows) < propensity
    conversion = click & (rng.random(rows) < cvr)
    tags, history = _lists(rng, rows, TABLE_ROWS["tags"]), _lists(rng, rows, TABLE_ROWS["history"])
    held, offsets = from_cells(history, pa.int32())
    weights = to_cells(rng.random(len(held)).astype(np.float32), offsets)
    return pa.table(
        {
            "user": pa.array(user.astype(np.int32)),
            "tags": tags,
            "history": history,
            "history.weight": weights,
            "scene": pa.array(scene.astype(np.int32), mask=rng.random(rows) < 0.2),
            "price": price.astype(np.float32),
            "age": age.astype(np.float32),
            "click": click.astype(np.uint8),
            "conversion": conversion.astype(np.uint8),
            "true_propensity": propensity.astype(np.float32),
            "true_cvr": cvr.astype(np.float32),
            "kept.row_id": np.arange(rows),
            "kept.group": pa.array(np.where(price > 0, "dear", "cheap")),
        }
    )


def write_dataset(out: Path, rows: dict[str, int], rows_per_file: int = 700, rows_per_group: int = 128) -> Path:
    """A complete data set with so many rows in each split."""
    with new_folder(out, "data set", overwrite=False) as folder:
        splits: dict[str, Any] = {}
        for number, (split, count) in enumerate(rows.items()):
            (folder / split).mkdir()
            table, files = impressions(count, number), []
            for start in range(0, count, rows_per_file):
                part = table.slice(start, rows_per_file)
                name = f"{split}/part-{start // rows_per_file:05d}.parquet"
                pq.write_table(part, folder / name, row_group_size=rows_per_group)
                files.append({"path": name, **_counts(part)})
            splits[split] = {**_counts(table), "files": files}
        (folder / "vocabulary").mkdir()
        schema().save(folder / "schema.json")
        write_manifest(folder, "data set", {"schema_hash": schema().hash(), "splits": splits, "negative_keep_rate": 1.0})
    return out


def config(*overrides: str) -> Config:
    """A small config; its data section is not used, because the data set is there already."""
    tables = [{"name": each.name, "kind": each.kind, "hash_size": each.num_embeddings} for each in schema().tables]
    numbers = [{"name": each.name, "kind": each.kind} for each in schema().numeric]
    data = {"source": {"kind": "table"}, "features": [*tables, *numbers]}
    tree = {
        "data": {**data, "split": {"by": "hash", "train": 1.0}},
        "model": {"embedding_dim": 8, "tower_hidden": [16]},
        "training": {"global_batch_size": 256, "log_every_steps": 1, "dense_learning_rate": 0.01},
    }
    return parse_config(tree, overrides)


def _counts(table: pa.Table) -> dict[str, int]:
    return {"rows": table.num_rows, "clicks": int(np.sum(table["click"])), "conversions": int(np.sum(table["conversion"]))}


def _lists(rng: np.random.Generator, rows: int, size: int) -> pa.Array:
    offsets = np.concatenate(([0], np.cumsum(rng.integers(0, 5, rows)))).astype(np.int32)
    return to_cells(rng.integers(0, size, offsets[-1]).astype(np.int32), offsets)
