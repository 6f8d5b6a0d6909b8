"""Small raw logs for the tests of preprocess, and plain readers to compare with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from escm2rec.cells import with_lists
from escm2rec.config import DataConfig
from escm2rec.preprocess import preprocess
from escm2rec.preprocess.read import order_of
from escm2rec.preprocess.stable_hash import row_hash

Features = Sequence[tuple[str, int | str, float | str]]

ALICCP_FEATURES = [
    {"name": "user", "kind": "categorical", "column": "101"},
    {"name": "shops", "kind": "weighted_list", "column": "110_14"},
    {"name": "item", "kind": "categorical", "column": "205"},
    {"name": "words", "kind": "list", "column": "210"},
    {"name": "match", "kind": "numeric", "column": "508"},
]


def listed(features: Features) -> str:
    """A feature list in Ali-CCP's notation."""
    return "\x01".join(f"{field}\x02{identifier}\x03{value}" for field, identifier, value in features)


def skeleton_line(sample: int | str, click: Any, buy: Any, index: str, features: Features, num: Any = None) -> str:
    """One skeleton line."""
    return f"{sample},{click},{buy},{index},{len(features) if num is None else num},{listed(features)}\n"


def common_line(index: str, features: Features, num: Any = None) -> str:
    """One common line."""
    return f"{index},{len(features) if num is None else num},{listed(features)}\n"


def key(number: int) -> str:
    """A common index."""
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


def write_aliccp(folder: Path, skeleton: str, common: str, part: str = "train") -> Path:
    """A folder with one pair of files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"sample_skeleton_{part}.csv").write_text(skeleton)
    (folder / f"common_features_{part}.csv").write_text(common)
    return folder


SMALL_RECORDS = [0, 0, 1, 2, 0]


def small_aliccp(folder: Path, part: str = "train") -> Path:
    """Three users and five impressions, repeats apart from each other, fields missing."""
    common = [
        common_line(key(1), [("110_14", 7, 0.69315), ("101", 11, 1.0), ("110_14", 8, 1.5), ("110_14", 7, 2.25)]),
        common_line(key(2), [("101", 12, 1.0)]),
        common_line(key(3), [("110_14", 9, 3.0)]),
    ]
    skeleton = [
        skeleton_line(1, 1, 1, key(1), [("210", 5, 1.0), ("205", 21, 1.0), ("210", 6, 1.0), ("508", 90, 0.5)]),
        skeleton_line(2, 0, 0, key(1), [("205", 22, 1.0), ("999", 1, 1.0)]),
        skeleton_line(3, 1, 0, key(2), [("210", 5, 1.0), ("210", 5, 1.0), ("508", 91, 1.5)]),
        skeleton_line(4, 0, 0, key(3), []),
        skeleton_line(5, 0, 0, key(1), [("205", 21, 1.0)]),
    ]
    return write_aliccp(folder, "".join(skeleton), "".join(common), part)


def aliccp_config(**changes: Any) -> DataConfig:
    """A config for such logs."""
    source = {"kind": "aliccp", **changes.pop("source", {})}
    split = {"by": "file", "train": "*train*", "test": "*test*"}
    return DataConfig.model_validate({"source": source, "features": ALICCP_FEATURES, "split": split, **changes})


def table_config(features: list[dict[str, Any]], **changes: Any) -> DataConfig:
    """A config for a table whose files all train."""
    source = {"kind": "table", **changes.pop("source", {})}
    return DataConfig.model_validate({"source": source, "features": features, "split": {"by": "file", "train": "*"}, **changes})


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    """A Parquet table; click and conversion are added where they lack."""
    rows = len(next(iter(columns.values())))
    labels = {name: [0] * rows for name in ("click", "conversion") if name not in columns}
    pq.write_table(pa.table({**columns, **labels}), path)
    return path


def read_split(folder: Path, split: str = "train", **places: int | Sequence[int]) -> list[dict[str, Any]]:
    """Rows of a split of a data set, as they lie there; with `places`, in the order of the input, of which they are all.

    `places` names tables (without .parquet) with how many rows they have, or common files (without .csv) with each impression's record.
    """
    files = sorted((folder / split).glob("*.parquet"))
    rows = [row for file in files for row in with_lists(pq.read_table(file)).to_pylist()]
    if not places:
        return rows
    order = np.argsort(np.concatenate([_keys(name, numbers) for name, numbers in places.items()]), kind="stable")
    return [rows[place] for place in np.argsort(order)]


def _keys(name: str, numbers: int | Sequence[int]) -> Any:
    if isinstance(numbers, int):
        return order_of(row_hash(f"{name}.parquet", np.arange(numbers)))
    return order_of(row_hash(f"{name}.csv", np.array(numbers)))


def values_of(folder: Path, feature: str) -> dict[int, Any]:
    """Value by table row."""
    frame = pl.read_parquet(folder / "vocabulary" / f"{feature}.parquet")
    return dict(zip(frame["row"].to_list(), frame["value"].to_list(), strict=True))


def made(config: DataConfig, source: Path, out: Path) -> tuple[Path, dict[str, Any]]:
    """The data set's folder and the result of making it."""
    return out, preprocess(config, source, out)


def shared_data() -> Path:
    """The folder of real data, or a skip."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("ESCM2REC_SHARED_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
