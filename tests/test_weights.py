"""Impression weights, from a raw column to every number that training and evaluation tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from escm2rec.config import SimulationConfig, load_config
from escm2rec.preprocess import preprocess
from escm2rec.simulate import simulate
from tests.ranks import run_ranks
from tests.raw_tables import CONFIG, raw_table

KEEP_RATE = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log whose unclicked impressions were kept at a rate of 0.1 and weigh 10; a run of it, evaluated."""
    root = tmp_path_factory.mktemp("weights")
    (root / "logs").mkdir()
    table = raw_table(40_000, seed=5, labels=True)
    click = table["click"].to_numpy()
    kept = (click > 0) | (np.random.default_rng(0).random(len(click)) < KEEP_RATE)
    weights = pa.array(np.where(click > 0, 1.0, 1 / KEEP_RATE))
    pq.write_table(table.append_column("w", weights).filter(pa.array(kept)), root / "logs" / "a.parquet")
    data = {**CONFIG["data"], "source": {"kind": "table", "weight": "w"}}
    config = {**CONFIG, "data": data, "objective": {"kind": "escm2-ips"}}
    config["training"] = {**config["training"], "log_every_steps": 5}
    (root / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    preprocess(load_config(root / "config.yaml").data, root / "logs", root / "data")
    names = {name: str(root / name) for name in ("data", "run")}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("tests.training_calls:train_file", {"config_file": str(root / "config.yaml"), "data": names["data"], "out": names["run"]}),
        ("tests.training_calls:evaluate_run", {"run": names["run"], "data": names["data"]}),
    ]
    for result in run_ranks(2, calls, root / "ranks"):
        assert "error" not in result, result
    (root / "ctr.json").write_text(json.dumps(float(click.mean())))
    return root


def test_rates_and_warm_up_are_those_of_all_impressions(folder: Path) -> None:
    ctr = json.loads((folder / "ctr.json").read_text())
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["base_ctr"] == pytest.approx(ctr, rel=0.05)
    first = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["propensity_mean_weight"] == pytest.approx(1, abs=0.15), "sum w o / q over sum w, with q the base rate"
    assert first["ctr_calibration"] == pytest.approx(1, abs=0.2)


def test_evaluation_weighs_too(folder: Path) -> None:
    ctr = json.loads((folder / "ctr.json").read_text())
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["weighted"] is True
    assert report["ctr"]["mean_observed"] == pytest.approx(ctr, rel=0.15)
    assert report["ctr"]["calibration"] == pytest.approx(1, abs=0.15)
    assert report["propensity"]["weights"]["mean_weight"] == pytest.approx(1, abs=0.15)


@pytest.fixture(scope="module")
def thinned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated log with a CTR of 10% whose training negatives preprocess keeps at the same rate; a run of it, evaluated."""
    root = tmp_path_factory.mktemp("thinned")
    simulate(root / "logs", 80_000, 3, SimulationConfig(ctr=0.1, cvr=0.2, users=500, items=200), "parquet")
    data = {
        "source": {"kind": "table", "true_propensity": "true_propensity", "true_cvr": "true_cvr"},
        "features": [{"name": name, "kind": "categorical"} for name in ("scene", "category", "profile_121")],
        "split": {"by": "hash", "train": 0.65, "test": 0.35},
        "negative_keep_rate": KEEP_RATE,
    }
    training = {"global_batch_size": 256, "epochs": 2, "log_every_steps": 20, "dense_learning_rate": 0.003}
    config = {"data": data, "model": {"embedding_dim": 8, "tower_hidden": [16]}, "training": training, "objective": {"kind": "escm2-ips"}}
    (root / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    preprocess(load_config(root / "config.yaml").data, root / "logs", root / "data")
    names = {name: str(root / name) for name in ("data", "run")}
    calls: list[tuple[str, dict[str, Any]]] = [
        ("tests.training_calls:train_file", {"config_file": str(root / "config.yaml"), "data": names["data"], "out": names["run"]}),
        ("tests.training_calls:evaluate_run", {"run": names["run"], "data": names["data"]}),
    ]
    for result in run_ranks(2, calls, root / "ranks"):
        assert "error" not in result, result
    return root


def test_a_rate_of_preprocess_is_corrected_once(thinned: Path) -> None:
    """p_hat is the click probability of the log, on a test split that stayed whole. Not at all or twice would be a factor of 5 and more."""
    ctr = json.loads((thinned / "logs" / "manifest.json").read_text())["ctr"]
    split = json.loads((thinned / "data" / "manifest.json").read_text())["splits"]["train"]
    base = json.loads((thinned / "run" / "manifest.json").read_text())["base_ctr"]
    assert base == pytest.approx(ctr, rel=0.05)
    uncorrected, twice = split["clicks"] / split["rows"], KEEP_RATE * base
    assert uncorrected > 4 * base > 16 * twice
    report = json.loads((thinned / "run" / "report.json").read_text())
    assert report["weighted"] is False, "all of them weigh 1"
    assert report["ctr"]["mean_observed"] == pytest.approx(ctr, rel=0.07)
    # Of 28,000 impressions 2,800 are clicked: one standard deviation is 2%; training saw 4,700 negatives, 1.5%.
    assert report["ctr"]["calibration"] == pytest.approx(1, abs=0.1)
    assert report["propensity"]["ctr_bias_ratio"] == pytest.approx(1, abs=0.08), "against the known truth"
    assert report["cvr_clicked"]["calibration"] == pytest.approx(1, abs=0.2)


def test_training_says_rates_of_all_impressions(thinned: Path) -> None:
    last = json.loads((thinned / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["ctr_calibration"] == pytest.approx(1, abs=0.1)
    assert last["propensity_mean_weight"] == pytest.approx(1, abs=0.15)
