"""Spills merged before parts are written: the same bytes, from few files."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from escm2rec.preprocess import merge, pipeline, portions, write
from tests.preprocess_logs import made, table_config, write_parquet

FILES, ROWS = 11, 60
FEATURES: list[dict[str, Any]] = [
    {"name": "id", "kind": "categorical"},
    {"name": "word", "kind": "categorical"},
    {"name": "number", "kind": "numeric"},
    {"name": "seen", "kind": "list"},
    {"name": "liked", "kind": "weighted_list", "weights_column": "likes"},
    {"name": "tags", "kind": "list"},
]
KEPT = ["row", "times", "note"]


def log(folder: Path) -> Path:
    """Files of ids that are narrow and wide, lists of which some files have none, strings, and kept columns with nulls."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for number in range(FILES):
        lengths = rng.integers(0, 4, ROWS) if number % 4 else np.zeros(ROWS, np.int64)
        ids = [rng.integers(0, 2**40 if number == 7 else 50, length).tolist() for length in lengths]
        columns: dict[str, Any] = {
            "id": rng.integers(-5, 2**40 if number == 5 else 30, ROWS),
            "word": [None if row % 7 == 0 else f"w{row % 5}" for row in range(ROWS)],
            "number": [None if row % 5 == 0 else row / 3 for row in range(ROWS)],
            "seen": pa.array(ids, pa.list_(pa.int64())),
            "liked": pa.array(ids, pa.list_(pa.int64())),
            "likes": pa.array([[value % 3 + 0.5 for value in each] for each in ids], pa.list_(pa.float64())),
            "tags": pa.array([[f"t{value % 4}" for value in each] for each in ids], pa.list_(pa.string())),
            "click": rng.integers(0, 2, ROWS),
            "row": [number * ROWS + row for row in range(ROWS)],
            "times": [[start + timedelta(seconds=row), None] if row % 3 else None for row in range(ROWS)],
            "note": [b"x" * (row % 4) if row % 2 else None for row in range(ROWS)],
        }
        write_parquet(folder / f"{number:02d}.parquet", columns)
    return folder


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.parquet")}


@pytest.mark.parametrize("at_once", [2, 3, 10])
def test_merged_spills_give_the_same_bytes_from_few_files(tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "PORTION_BYTES", 100)  # a portion a file
    monkeypatch.setattr(pipeline, "BUCKET_ROWS", 40)
    split = {"by": "hash", "train": 0.7, "validation": 0.1, "test": 0.2}
    config = table_config(FEATURES, keep=KEPT, split=split, rows_per_file=150, rows_per_group=50)
    plain = content(made(config, log(tmp_path / "log"), tmp_path / "plain")[0])
    assert len([name for name in plain if name.startswith("train/")]) > 2
    monkeypatch.setattr(merge, "MERGED", at_once)
    read, left = [], []

    def watched(*arguments: Any) -> Any:
        for rows in merge.sorted_rows(*arguments):
            read.append(len(rows.batches))
            left.append(sorted(path.name for path in rows.batches[0].parent.glob("rows-*-*.arrow")))
            yield rows

    monkeypatch.setattr(write, "sorted_rows", watched)
    assert content(made(config, tmp_path / "log", tmp_path / "merged")[0]) == plain
    merges = -(-FILES // at_once)
    assert set(read) <= {merges, merges - 1}, "a file of each merge, or none where it has no row there"
    assert len(read) > len([name for name in plain if "part" in name])
    assert all(name.startswith("rows-merged-") for name in left[0])
    assert merges < len(left[0]) <= merges * at_once


def test_a_merge_that_another_run_has_done_meanwhile_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a task on a node thought lost: the other run ends, and removes the spills, when this one has begun."""
    monkeypatch.setattr(portions, "PORTION_BYTES", 100)
    monkeypatch.setattr(merge, "MERGED", 4)
    whole, runs = merge._merge, []

    def overtaken(job: Any, number: int, folder: Path) -> Any:
        runs.append(number)
        if runs.count(number) == 1:
            merge.merge(job, number)
        return whole(job, number, folder)

    plain = content(made(table_config(FEATURES), log(tmp_path / "log"), tmp_path / "plain")[0])
    monkeypatch.setattr(merge, "_merge", overtaken)
    assert content(made(table_config(FEATURES), tmp_path / "log", tmp_path / "out")[0]) == plain
    assert runs == [0, 0, 1, 1, 2, 2]


def test_few_spills_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "PORTION_BYTES", 100)
    monkeypatch.setattr(merge, "MERGED", FILES)
    monkeypatch.setattr(merge, "_merge", None)  # is not called
    made(table_config(FEATURES), log(tmp_path / "log"), tmp_path / "out")
