"""Unclicked training impressions, kept at a rate: which are kept, and what they weigh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from escm2rec.errors import DataError
from escm2rec.preprocess import aliccp, pipeline, read, sources
from escm2rec.preprocess.block import RawBlock
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.negatives import keep_negatives
from escm2rec.preprocess.stable_hash import row_hash, split_points
from escm2rec.reader.dataset import Dataset
from escm2rec.schema import Schema
from tests.preprocess_logs import (
    aliccp_config,
    common_line,
    key,
    made,
    read_split,
    skeleton_line,
    table_config,
    write_aliccp,
    write_parquet,
)
from tests.rating_world import matrix_config, write_ratings

ROWS = 20_000
RATE = 0.1
FEATURES = [{"name": "c", "kind": "categorical"}, {"name": "n", "kind": "numeric"}]
HALVES = {"by": "hash", "train": 0.5, "validation": 0.1, "test": 0.4}


def block_of(rows: Any, click: Any, name: str = "a.parquet", **labels: Any) -> RawBlock:
    return RawBlock(RawFile(Path(name)), rows, rows + 1, {}, labels={"click": click, **labels})


def log(path: Path, **columns: Any) -> Path:
    """20,000 impressions, a tenth of them clicked."""
    rng = np.random.default_rng(1)
    click = (rng.random(ROWS) < 0.1).astype(np.int8)
    numbers = {"c": rng.integers(0, 500, ROWS), "n": rng.normal(size=ROWS)}
    return write_parquet(path, {**numbers, "row": np.arange(ROWS), "click": click, **columns})


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def kept_of(block: RawBlock) -> RawBlock:
    return keep_negatives(block, RATE, np.ones(len(block), np.bool_))


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 1.0])
def test_clicked_rows_stay_and_the_others_at_the_rate(rate: float) -> None:
    rng = np.random.default_rng(0)
    rows, click = np.arange(ROWS), (rng.random(ROWS) < 0.05).astype(np.uint8)
    own = rng.uniform(0.5, 2.0, ROWS).astype(np.float32)
    kept = keep_negatives(block_of(rows, click, weight=own), rate, np.ones(ROWS, np.bool_))
    negative = kept.labels["click"] == 0
    assert set(rows[click == 1]) <= set(kept.rows)
    expected, spread = (click == 0).sum() * rate, ((click == 0).sum() * rate * (1 - rate)) ** 0.5
    assert abs(negative.sum() - expected) <= 4 * spread
    assert kept.labels["weight"].dtype == np.float32
    np.testing.assert_allclose(kept.labels["weight"], own[kept.rows] * np.where(negative, 1 / rate, 1), rtol=1e-6)
    whole, estimate = float(own.sum(dtype=np.float64)), float(kept.labels["weight"].sum(dtype=np.float64))
    error = ((own[click == 0].astype(np.float64) ** 2).sum() * (1 - rate) / rate) ** 0.5
    assert abs(estimate - whole) <= 4 * error + 1e-6 * whole


def test_what_is_kept_does_not_depend_on_the_blocks() -> None:
    rng = np.random.default_rng(0)
    rows, click = np.arange(ROWS), (rng.random(ROWS) < 0.05).astype(np.uint8)
    whole = kept_of(block_of(rows, click)).rows.tolist()
    for size in (1_000, 7_777):
        parts = [block_of(rows[start : start + size], click[start : start + size]) for start in range(0, ROWS, size)]
        assert [row for part in parts for row in kept_of(part).rows.tolist()] == whole
    assert kept_of(block_of(rows, click, "b.parquet")).rows.tolist() != whole, "each file has rows of its own"


@pytest.mark.parametrize("salt", ["", "negatives"])
def test_what_is_kept_does_not_depend_on_a_split_by_the_same_place(salt: str) -> None:
    rows = np.arange(ROWS)
    training = rows[split_points(row_hash("a.parquet", rows), salt) < 0.5]
    kept = kept_of(block_of(training, np.zeros(len(training), np.uint8)))
    assert len(kept) / len(training) == pytest.approx(RATE, abs=0.012), "4 standard deviations; a shared hash would keep 0.2"


def test_a_data_set_is_the_same_for_any_blocks_and_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = log(tmp_path / "a.parquet")
    config = table_config(FEATURES, keep=["row"], split=HALVES, negative_keep_rate=RATE, rows_per_file=700, rows_per_group=300)
    first = made(config, source, tmp_path / "first")[0]
    again = made(config, source, tmp_path / "again")[0]
    monkeypatch.setattr(sources, "BLOCK_ROWS", 777)
    monkeypatch.setattr(read, "SPILL_BYTES", 100_000)
    monkeypatch.setattr(pipeline, "BUCKET_ROWS", 100)
    other = made(config, source, tmp_path / "other")[0]
    names = sorted(path.relative_to(first) for path in first.rglob("*.parquet"))
    assert len(names) >= 3 + 1 + 12
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes(), "the same input gives the same bytes"
    manifests = [{**manifest_of(folder), "seconds": 0} for folder in (first, again)]
    assert manifests[0] == manifests[1]
    for split in ("train", "validation", "test"):
        rows = [[{**row, "n": None} for row in read_split(folder, split)] for folder in (first, other)]
        assert rows[0] == rows[1]
        numbers = [[row["n"] for row in read_split(folder, split)] for folder in (first, other)]
        np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-5, atol=1e-6)  # moments are merged block by block


def test_only_the_training_split_is_thinned_and_all_have_weights(tmp_path: Path) -> None:
    source = log(tmp_path / "a.parquet")
    whole, before = made(table_config(FEATURES, keep=["row"], split=HALVES), source, tmp_path / "whole")
    out, result = made(table_config(FEATURES, keep=["row"], split=HALVES, negative_keep_rate=RATE), source, tmp_path / "out")
    assert Schema.load(out / "schema.json").has_weight
    for split in ("validation", "test"):
        rows = read_split(out, split)
        assert [row["kept.row"] for row in rows] == [row["kept.row"] for row in read_split(whole, split)]
        assert {row["weight"] for row in rows} == {1.0}
    kept = read_split(out)
    assert {(row["click"], row["weight"]) for row in kept} == {(0, 10.0), (1, 1.0)}
    clicked = [[row["kept.row"] for row in read_split(folder) if row["click"]] for folder in (out, whole)]
    assert clicked[0] == clicked[1]
    assert {row["kept.row"] for row in kept} < {row["kept.row"] for row in read_split(whole)}
    manifest = manifest_of(out)
    assert manifest["negative_keep_rate"] == RATE
    left_out = before["splits"]["train"]["rows"] - len(kept)
    assert manifest["negatives_left_out"] == result["negatives_left_out"] == left_out > 0
    assert (manifest_of(whole)["negatives_left_out"], manifest_of(whole)["negative_keep_rate"]) == (0, 1.0)


def test_counts_by_weight_are_those_of_the_whole_and_wrong_corrections_are_not(tmp_path: Path) -> None:
    """The base rate from the data set's weighted counts; uncorrected or corrected twice it is another one."""
    source = log(tmp_path / "a.parquet")
    whole = made(table_config(FEATURES), source, tmp_path / "whole")[1]["splits"]["train"]
    dataset = Dataset.open(made(table_config(FEATURES, negative_keep_rate=RATE), source, tmp_path / "out")[0])
    counts, kept = dataset.weighted_counts("train"), dataset.split_counts("train")
    truth = whole["clicks"] / whole["rows"]
    assert counts["clicks"] == whole["clicks"]
    assert counts["rows"] == pytest.approx(whole["rows"], abs=4 * (0.9 * ROWS * (1 - RATE) / RATE) ** 0.5)
    assert counts["clicks"] / counts["rows"] == pytest.approx(truth, rel=0.1)
    uncorrected = kept["clicks"] / kept["rows"]
    rate = counts["clicks"] / counts["rows"]
    twice = RATE * rate / (1 - rate) / (1 + RATE * rate / (1 - rate))
    assert uncorrected > 4 * truth
    assert twice < truth / 4


def test_own_weights_are_multiplied(tmp_path: Path) -> None:
    """A log that was down-sampled before says so by its weights, and can be thinned again."""
    source = log(tmp_path / "a.parquet", w=np.where(np.arange(ROWS) % 2, 0.5, 4.0))
    config = table_config(FEATURES, keep=["row"], source={"weight": "w"}, negative_keep_rate=0.25)
    rows = read_split(made(config, source, tmp_path / "out")[0])
    found = {(row["kept.row"] % 2, row["click"], row["weight"]) for row in rows}
    assert found == {(1, 1, 0.5), (1, 0, 2.0), (0, 1, 4.0), (0, 0, 16.0)}


def test_what_is_fitted_describes_the_rows_that_train(tmp_path: Path) -> None:
    """Vocabulary and moments are of the kept rows, each counting once."""
    out, _ = made(table_config(FEATURES, negative_keep_rate=RATE), log(tmp_path / "a.parquet"), tmp_path / "out")
    rows = read_split(out)
    numbers = np.array([row["n"] for row in rows])
    assert (numbers.mean(), numbers.std()) == pytest.approx((0, 1), abs=1e-5)
    vocabulary = pl.read_parquet(out / "vocabulary" / "c.parquet")
    assert vocabulary["count"].sum() == len(rows)
    np.testing.assert_array_equal(np.bincount([row["c"] for row in rows])[1:], vocabulary["count"])


def test_a_conversion_kept_as_a_click_is_no_negative(tmp_path: Path) -> None:
    source = log(tmp_path / "a.parquet", click=np.zeros(ROWS), conversion=np.arange(ROWS) % 4 == 0)
    config = table_config(FEATURES, conversion_without_click="click", negative_keep_rate=RATE)
    rows = read_split(made(config, source, tmp_path / "out")[0])
    assert sum(row["click"] for row in rows) == ROWS // 4
    assert {row["weight"] for row in rows if row["click"]} == {1.0}


def test_aliccp_joins_the_common_records_of_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [skeleton_line(row, int(row % 5 == 0), 0, key(row % 7), [("205", row % 3, 1.0)]) for row in range(2_000)]
    common = "".join(common_line(key(user), [("101", 100 + user, 1.0)]) for user in range(7))
    logs = write_aliccp(tmp_path / "logs", "".join(lines), common)
    config = aliccp_config(keep=["sample_id", "101"], negative_keep_rate=0.2)
    out, result = made(config, logs, tmp_path / "out")
    rows = read_split(out)
    assert result["splits"]["train"]["clicks"] == 400
    assert result["splits"]["train"]["rows"] == len(rows) == 2_000 - result["negatives_left_out"]
    assert 230 < len(rows) - 400 < 410
    assert {(row["click"], row["weight"]) for row in rows} == {(1, 1.0), (0, 5.0)}
    assert all(row["kept.101"] == 100 + row["kept.sample_id"] % 7 for row in rows)
    monkeypatch.setattr(aliccp, "BLOCK_BYTES", 1000)
    assert read_split(made(config, logs, tmp_path / "blocks")[0]) == rows


def test_pairs_of_a_matrix_are_thinned_too(tmp_path: Path) -> None:
    ratings = write_ratings(tmp_path / "in")
    out, result = made(matrix_config(negative_keep_rate=0.5), tmp_path / "in", tmp_path / "out")
    assert result["splits"]["train"]["clicks"] == (ratings.train > 0).sum()
    assert result["splits"]["train"]["rows"] == ratings.train.size - result["negatives_left_out"] < ratings.train.size
    assert {row["weight"] for row in read_split(out, "test")} == {1.0}


def test_a_data_set_with_a_rate_and_no_weights_is_refused(tmp_path: Path) -> None:
    out, _ = made(table_config(FEATURES), log(tmp_path / "a.parquet"), tmp_path / "out")
    (out / "manifest.json").write_text(json.dumps({**manifest_of(out), "negative_keep_rate": RATE}))
    said = r"kept its unclicked training impressions at rate 0\.1 and has no weights .*\nhint: preprocess again"
    with pytest.raises(DataError, match=said):
        Dataset.open(out)
