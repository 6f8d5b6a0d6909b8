"""A generated rating set that is missing not at random, through every verb that rating matrices take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from escm2rec.config import load_config
from escm2rec.evaluation import metrics
from escm2rec.evaluation.user_ranking import RANKING_METRICS
from escm2rec.preprocess import preprocess
from tests.preprocess_logs import read_split
from tests.ranks import run_ranks
from tests.rating_world import Ratings, matrix_data, write_ratings

USERS, ITEMS, TESTED = 60, 50, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ratings")


@pytest.fixture(scope="module")
def ratings(folder: Path) -> Ratings:
    return write_ratings(folder / "in", USERS, ITEMS, TESTED)


@pytest.fixture(scope="module")
def results(folder: Path, ratings: Ratings) -> dict[str, Any]:
    """What each verb returned; on 1 rank, and evaluate on 2 as well."""
    del ratings  # the files must be there
    tree = {
        "data": matrix_data(split={"validation_share": 0.1}),
        "model": {"embedding_dim": 8, "tower_hidden": [16]},
        "objective": {"kind": "escm2-ips"},
        "training": {"global_batch_size": 128, "dense_learning_rate": 0.01, "epochs": 8},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    made = preprocess(load_config(folder / "config.yaml").data, folder / "in", folder / "data")
    run, data = str(folder / "run"), str(folder / "data")
    calls: list[tuple[str, dict[str, Any]]] = [
        ("train_file", {"config_file": str(folder / "config.yaml"), "data": data, "out": run}),
        ("evaluate_run", {"run": run, "data": data, "split": "validation"}),
        ("evaluate_run", {"run": run, "data": data}),
        ("score_run", {"run": run, "inputs": [str(folder / "in")], "out": str(folder / "predictions")}),
        ("score_run", {"run": run, "inputs": [str(folder / "in" / "train.ascii")], "out": str(folder / "refused")}),
    ]
    found = run_ranks(1, [(f"tests.training_calls:{name}", arguments) for name, arguments in calls], folder / "one")
    (two,) = run_ranks(2, [(f"tests.training_calls:{calls[2][0]}", calls[2][1])], folder / "two")
    return {"preprocess": made, **dict(zip(("train", "validation", "test", "score", "refused"), found, strict=True)), "two": two}


def test_the_counts_are_those_of_the_matrices(results: dict[str, Any], ratings: Ratings) -> None:
    rated, both = ratings.train > 0, (ratings.train > 0) & (ratings.test > 0)
    splits = results["preprocess"]["splits"]
    logged = {name: splits["train"][name] + splits["validation"][name] for name in ("rows", "clicks", "conversions")}
    assert logged == {"rows": USERS * ITEMS, "clicks": rated.sum(), "conversions": (ratings.train >= 4).sum()}
    tested = ratings.test[~both]
    assert splits["test"] == {"rows": (tested > 0).sum(), "clicks": (tested > 0).sum(), "conversions": (tested >= 4).sum()}
    assert both.sum() > 20
    assert results["preprocess"]["rejected"] == {"rated in train and test": both.sum()}
    assert splits["test"]["rows"] + both.sum() == USERS * TESTED


def test_the_test_ratings_measure_the_entire_space(results: dict[str, Any], folder: Path) -> None:
    """What evaluate says of the random ratings is what the predictions of `score` say of them."""
    found = results["test"]["metrics"]
    predicted = pl.read_parquet(folder / "predictions" / "part-00000.parquet")
    tested = pl.DataFrame(read_split(folder / "data", "test")).select(
        pl.col("kept.user", "kept.item").name.map(lambda name: name[5:]), "conversion"
    )
    joined = tested.join(predicted, on=["user", "item"], validate="1:1")
    assert joined.height == results["test"]["rows"] == found["cvr_impressions"]
    assert found["cvr_auc"] == pytest.approx(metrics.auc(joined["p_cvr"], joined["conversion"]), abs=1e-4)
    assert found["cvr_mean_predicted"] == pytest.approx(joined["p_cvr"].mean(), rel=1e-4)
    assert found["cvr_auc"] > 0.65, "the model has learned"
    assert not any(name.startswith(("ctr", "ctcvr")) or "clicked" in name for name in found)
    assert results["two"]["metrics"] == pytest.approx(found, rel=1e-4, abs=1e-5)


def test_the_test_ratings_are_ranked_by_user(results: dict[str, Any], folder: Path, ratings: Ratings) -> None:
    found = results["test"]["metrics"]
    assert {f"cvr_{name}" for name in RANKING_METRICS} <= set(found)
    assert 0 < found["cvr_recall_at_2"] < found["cvr_recall_at_4"] < found["cvr_recall_at_6"] <= 1
    assert found["cvr_dcg_at_2"] < found["cvr_dcg_at_4"] < found["cvr_dcg_at_6"]
    report = json.loads((folder / "run" / "report.json").read_text())
    of_users = report["ranking_per_user"]["cvr"]
    tested = np.where(ratings.train > 0, 0, ratings.test)
    assert of_users["users_used"] == ((tested >= 4).any(axis=1)).sum()
    assert of_users["users_used"] + of_users["users_without_positive"] == (tested > 0).any(axis=1).sum()


def test_other_splits_are_logs(results: dict[str, Any]) -> None:
    found = results["validation"]["metrics"]
    assert {"ctr_auc", "ctcvr_auc", "cvr_auc_clicked"} <= set(found)
    assert "cvr_auc" not in found


def test_every_pair_is_scored(results: dict[str, Any], folder: Path) -> None:
    predicted = pl.read_parquet(folder / "predictions" / "part-00000.parquet")
    assert results["score"]["rows"] == USERS * ITEMS
    assert predicted["user"].to_list() == np.repeat(np.arange(USERS) + 1, ITEMS).tolist()
    assert predicted["item"].to_list() == np.tile(np.arange(ITEMS) + 1, USERS).tolist()
    assert "is no folder: rating matrices are read from one, which holds train.ascii" in results["refused"]["message"]
    assert "hint: pass the folder; score predicts every pair, pick yours by user and item" in results["refused"]["message"]
