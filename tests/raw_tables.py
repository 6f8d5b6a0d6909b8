"""Raw tables of every feature kind with a config for them, for tests of the whole way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

FEATURES = [
    {"name": "user", "kind": "categorical"},
    {"name": "shop", "kind": "categorical", "min_count": 2},
    {"name": "tags", "kind": "list"},
    {"name": "history", "kind": "weighted_list", "weights_column": "history_weight"},
    {"name": "price", "kind": "numeric", "log1p": True},
]
CONFIG: dict[str, Any] = {
    "data": {"source": {"kind": "table"}, "features": FEATURES, "keep": ["row"], "split": {"by": "hash", "train": 0.9, "test": 0.1}},
    "model": {"embedding_dim": 8, "tower_hidden": [16]},
    "training": {"global_batch_size": 128, "dense_learning_rate": 0.01, "epochs": 2},
}


def write_config(path: Path) -> Path:
    """Write the config that fits `raw_table`."""
    path.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return path


def raw_table(rows: int, seed: int, users: int = 200, labels: bool = False) -> pa.Table:
    """Raw rows of all kinds, with missing values; `row` says which is which."""
    rng = np.random.default_rng(seed)
    price = rng.exponential(20.0, rows)
    lengths = rng.integers(0, 4, rows)
    offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
    columns: dict[str, Any] = {
        "row": [f"{seed}-{row}" for row in range(rows)],
        "user": pa.array(rng.integers(0, users, rows), pa.int64(), mask=rng.random(rows) < 0.05),
        "shop": pa.array([f"shop {number}" for number in rng.zipf(1.6, rows)], pa.string()),
        "tags": pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, 30, lengths.sum()), pa.int64())),
        "history": pa.ListArray.from_arrays(offsets, pa.array(rng.integers(0, 50, lengths.sum()), pa.int64())),
        "history_weight": pa.ListArray.from_arrays(offsets, pa.array(rng.random(lengths.sum()), pa.float32())),
        "price": price,
    }
    if labels:
        click = rng.random(rows) < 1 / (1 + price / 20)
        columns |= {"click": click.astype(np.int8), "conversion": (click & (rng.random(rows) < 0.3)).astype(np.int8)}
    return pa.table(columns)
