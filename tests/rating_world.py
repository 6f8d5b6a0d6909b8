"""Small rating sets that are missing not at random, as the text matrices that `source: matrix` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from escm2rec.config import DataConfig

Matrix = npt.NDArray[np.int64]

FEATURES: list[dict[str, Any]] = [
    {"name": "user", "kind": "categorical"},
    {"name": "item", "kind": "categorical"},
    {"name": "user_profile", "kind": "list", "column": "user_features"},
    {"name": "item_profile", "kind": "weighted_list", "column": "item_features"},
    {"name": "item_price", "kind": "numeric", "column": "item_feature_3"},
]


class Ratings(NamedTuple):
    """What was written: [users, items] ratings from 1 to 5, 0 where unrated, and the feature matrices."""

    train: Matrix
    test: Matrix
    user_features: Matrix
    item_features: Matrix


def write_ratings(folder: Path, users: int = 60, items: int = 50, tested: int = 8, seed: int = 0) -> Ratings:
    """Users rate what they like (train), and `tested` items each that were drawn at random (test), some of them for the second time."""
    rng = np.random.default_rng(seed)
    taste, kind = rng.normal(size=(users, 2)), rng.normal(size=(items, 2))
    liking = taste @ kind.T + rng.normal(size=(1, items)) + rng.normal(size=(users, items)) / 2
    rating = np.digitize(liking, [-1.5, -0.5, 0.5, 1.5]) + 1
    train = np.where(rng.random((users, items)) < 1 / (1 + np.exp(2.5 - liking)), rating, 0)
    drawn = rng.random((users, items)).argsort(axis=1).argsort(axis=1) < tested
    made = Ratings(
        train,
        np.where(drawn, rating, 0),
        (taste > [[0.0, 0.5]]).astype(np.int64),
        np.column_stack([kind > 0, rng.integers(1, 100, items)]).astype(np.int64),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, matrix in made._asdict().items():
        np.savetxt(folder / f"{name}.ascii", matrix, fmt="%d")
    return made


def matrix_data(**changes: Any) -> dict[str, Any]:
    """The data section of a config for such files."""
    files = {"user_features": "user_features.ascii", "item_features": "item_features.ascii"}
    source = {"kind": "matrix", **files, **changes.pop("source", {})}
    split = {"by": "file", "train": "train.ascii", "test": "test.ascii", **changes.pop("split", {})}
    return {"source": source, "features": FEATURES, "keep": ["user", "item"], "split": split, **changes}


def matrix_config(**changes: Any) -> DataConfig:
    """The same, checked."""
    return DataConfig.model_validate(matrix_data(**changes))
