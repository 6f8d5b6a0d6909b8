"""A whole real funnel, the Hillstrom campaign, through every verb that real logs take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from benchmarks.hillstrom import SECTIONS, over_splits
from escm2rec.evaluation.metrics import Z_95
from escm2rec.scoring.options import Options
from escm2rec.scoring.score import score
from tests.preprocess_logs import shared_data

SPLITS = 5
CUSTOMERS = 64_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared_data()
    return tmp_path_factory.mktemp("hillstrom")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return over_splits(shared_data() / "hillstrom", folder, SPLITS)


def test_mean_calibration_over_five_splits(found: dict[str, Any]) -> None:
    means = found["mean_calibration"]
    assert len(found["splits"]) == SPLITS
    assert abs(means["ctr"] - 1) <= 0.03
    assert abs(means["cvr_clicked"] - 1) <= 0.10
    assert abs(means["ctcvr"] - 1) <= 0.10


def test_every_split_is_inside_its_interval_or_listed(found: dict[str, Any]) -> None:
    outside = {(entry["split"], entry["section"]) for entry in found["outside"]}
    checked = 0
    for number, split in enumerate(found["splits"]):
        for section in SECTIONS:
            low, high = split[section]["interval"]
            assert (low <= 1 <= high) != ((number, section) in outside)
            # An interval as wide as so few positives leave it: not one that holds everything.
            assert high / low < 1 + 3 * Z_95 / split[section]["positives"] ** 0.5
            checked += 1
    assert checked == 3 * SPLITS
    assert len(outside) <= 3, found["outside"]


def test_clicks_can_be_told_apart(found: dict[str, Any]) -> None:
    assert min(split["ctr"]["auc"] for split in found["splits"]) > 0.6


def test_every_customer_is_scored(found: dict[str, Any], folder: Path) -> None:
    del found  # the runs must be there
    run = folder / "split-0" / "run"
    result = score(run, [shared_data() / "hillstrom" / "hillstrom.csv"], folder / "predictions", Options(keep=["segment", "zip_code"]))
    assert (result["rows"], result["parts"]) == (CUSTOMERS, 1)
    predicted = pl.read_parquet(folder / "predictions" / "part-00000.parquet")
    raw = pl.read_csv(shared_data() / "hillstrom" / "hillstrom.csv", columns=["zip_code", "visit"])
    assert predicted["zip_code"].to_list() == raw["zip_code"].to_list()
    assert predicted["p_ctr"].mean() == pytest.approx(raw["visit"].mean(), rel=0.1)
