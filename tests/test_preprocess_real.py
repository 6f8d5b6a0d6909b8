"""The configs of the public data sets, on the real logs that are at hand."""

import shutil
from pathlib import Path

import pytest

from escm2rec.config import DataConfig, load_config
from escm2rec.preprocess import preprocess
from escm2rec.schema import Schema
from tests.preprocess_logs import read_split, shared_data, values_of

CONFIGS = Path(__file__).resolve().parents[1] / "data"


def public(name: str) -> DataConfig:
    return load_config(CONFIGS / f"{name}.yaml").data


@pytest.mark.parametrize("name", ["aliccp", "aliexpress", "hillstrom"])
def test_public_configs_are_valid(name: str) -> None:
    assert len(public(name).features) > 5


def test_hillstrom_becomes_a_data_set(tmp_path: Path) -> None:
    result = preprocess(public("hillstrom"), shared_data() / "hillstrom", tmp_path / "out")
    counts = {name: sum(split[name] for split in result["splits"].values()) for name in ("rows", "clicks", "conversions")}
    assert counts == {"rows": 64_000, "clicks": 9_394, "conversions": 578}
    assert abs(result["splits"]["train"]["rows"] - 44_800) < 500
    assert abs(result["splits"]["test"]["rows"] - 12_800) < 400
    assert result["rejected"] == {}
    schema = Schema.load(tmp_path / "out" / "schema.json")
    assert "spend" not in {feature.column for feature in schema.features}
    assert set(values_of(tmp_path / "out", "segment").values()) == {"Mens E-Mail", "Womens E-Mail", "No E-Mail"}


def test_aliexpress_becomes_a_data_set(tmp_path: Path) -> None:
    result = preprocess(public("aliexpress"), shared_data() / "aliexpress", tmp_path / "out")
    assert [result["splits"][split]["rows"] for split in ("train", "validation", "test")] == [100, 0, 100]


def test_real_aliccp_lines_become_a_data_set(tmp_path: Path) -> None:
    folder = shared_data() / "aliccp_raw" / "derived_10rows"
    logs = tmp_path / "logs"
    logs.mkdir()
    shutil.copyfile(folder / "sample_skeleton.csv", logs / "sample_skeleton_train.csv")
    shutil.copyfile(folder / "common_features.csv", logs / "common_features_train.csv")
    result = preprocess(public("aliccp"), logs, tmp_path / "out")
    assert result["splits"]["train"]["rows"] == 10
    rows = read_split(tmp_path / "out")
    histories = {"category_history": 117, "shop_history": 342, "brand_history": 209, "intention_history": 191}
    for row in rows:
        assert {name: len(row[name]) for name in histories} == histories
        assert {name: len(row[f"{name}.weight"]) for name in histories} == histories
    assert [len(row["intention"]) for row in rows] == [3, 5, 11, 4, 3, 14, 6, 3, 3, 3]
    assert [row["brand"] is None for row in rows] == [False] * 10
    lines = (logs / "sample_skeleton_train.csv").read_text().splitlines()
    assert [row["click"] for row in rows] == [int(line.split(",")[1]) for line in lines]
    assert {row["kept.101"] for row in rows} == {12}
