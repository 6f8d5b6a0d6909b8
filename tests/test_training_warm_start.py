"""A training that begins with what a run learned: which rows and weights it takes, and that they are the run's, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from escm2rec.config import parse_config
from escm2rec.preprocess import preprocess
from escm2rec.schema import Schema
from tests.encoded import write_dataset
from tests.preprocess_logs import values_of
from tests.ranks import run_ranks
from tests.raw_tables import raw_table

DIM = 8
FEATURES: list[dict[str, Any]] = [
    {"name": "user", "kind": "categorical"},
    {"name": "shop", "kind": "categorical", "min_count": 2, "oov_rows": 2},
    {"name": "tags", "kind": "list"},
    {"name": "history", "kind": "weighted_list", "weights_column": "history_weight", "hash_size": 40},
    {"name": "price", "kind": "numeric", "log1p": True},
    {"name": "priced", "kind": "numeric", "column": "price", "buckets": 5},
    {"name": "user_shop", "kind": "categorical", "cross": ["user", "shop"], "hash_size": 30},
]
OTHER_FEATURES: list[dict[str, Any]] = [
    {"name": "user", "kind": "categorical", "oov_rows": 3},
    {"name": "added", "kind": "categorical", "column": "shop"},
    {"name": "shop", "kind": "categorical", "column": "user"},
    {"name": "tags", "kind": "list", "hash_size": 20},
    {"name": "history", "kind": "weighted_list", "weights_column": "history_weight", "hash_size": 50},
    {"name": "price", "kind": "numeric"},
    {"name": "user_shop", "kind": "categorical", "cross": ["shop", "user"], "hash_size": 30},
]
STILL = ["training.dense_learning_rate=1e-12", "training.sparse_learning_rate=1e-12"]
ROW_WISE = "training.sharding={'*': row_wise}"
State = dict[str, Any]


def _config(features: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "data": {"source": {"kind": "table"}, "features": features, "split": {"by": "hash", "train": 1.0}},
        "model": {"embedding_dim": DIM, "tower_hidden": [16], "backbone": {"kind": "dcn_v2", "hidden": [12], "cross_layers": 1}},
        "training": {"global_batch_size": 128, "dense_learning_rate": 0.01},
    }


def _make(folder: Path, name: str, table: pa.Table, features: list[dict[str, Any]]) -> None:
    """`NAME.yaml` and the data set `NAME` of raw rows."""
    (folder / f"{name}-raw").mkdir()
    pq.write_table(table, folder / f"{name}-raw" / "rows.parquet")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(_config(features)))
    preprocess(parse_config(_config(features)).data, folder / f"{name}-raw", folder / name)


def _call(what: str, folder: Path, name: str, out: str, *overrides: str, warm_start: str | None = "source") -> tuple[str, dict[str, Any]]:
    arguments = {"config_file": str(folder / f"{name}.yaml"), "data": str(folder / name), "out": str(folder / out)}
    warm = {} if warm_start is None else {"warm_start": str(folder / warm_start)}
    return f"tests.training_calls:{what}", {**arguments, "overrides": list(overrides), **warm}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained on two ranks, and beginnings from it."""
    folder = tmp_path_factory.mktemp("warm")
    later = raw_table(700, 2, labels=True)
    users = pa.array([None if user is None else user + 100 for user in later["user"].to_pylist()], pa.int64())
    later = later.set_column(later.column_names.index("user"), "user", users)
    later = later.set_column(later.column_names.index("price"), "price", pa.array(np.asarray(later["price"]) * 3))
    _make(folder, "before", raw_table(900, 1, labels=True), FEATURES)
    _make(folder, "later", later, FEATURES)
    _make(folder, "other", later, OTHER_FEATURES)
    two = [
        _call("train_file", folder, "before", "source", ROW_WISE, warm_start=None),
        _call("begin", folder, "later", "later-2", "training.sharding={user: row_wise}"),
    ]
    one = [
        _call("begin", folder, "later", "later-cold", warm_start=None),
        _call("begin", folder, "later", "later-1"),
        _call("begin", folder, "other", "other-cold", warm_start=None),
        _call("begin", folder, "other", "other-1"),
        _call("begin", folder, "later", "wider", "model.embedding_dim=16", "objective.imputation.predicts=error"),
        _call("begin", folder, "later", "naive", "objective.kind=naive", "model.tower_hidden=[4]"),
        _call("begin", folder, "later", "mmoe", "model.backbone={kind: mmoe, hidden: [12]}"),
    ]
    trained, _ = run_ranks(2, two, folder / "ranks-2")
    assert trained["steps"] == 8, trained
    assert run_ranks(1, one, folder / "ranks-1") == [None] * len(one)
    return folder


def _state(checkpoint: Path) -> State:
    """A checkpoint by torch's own reader."""
    whole = checkpoint.with_name(f"{checkpoint.name}.pt")
    dcp_to_torch_save(checkpoint, whole)
    state: State = torch.load(whole, weights_only=False)
    return state


def _table(state: State, name: str) -> Tensor:
    (found,) = (value for key, value in state["model"].items() if key.endswith(f".embedding_bags.{name}.weight"))
    assert isinstance(found, Tensor)
    return found


def _adagrad(state: State, name: str) -> Tensor:
    (found,) = (value for key, value in state["optimizer"]["state"].items() if key.endswith(f".embedding_bags.{name}.weight"))
    (squares,) = found.values()
    assert isinstance(squares, Tensor)
    return squares


def _dense(state: State, name: str) -> Tensor:
    value = state["model"][f"model.head.{name}"]
    assert isinstance(value, Tensor)
    return value


def _source(folder: Path) -> State:
    (checkpoint,) = (path for path in (folder / "source" / "checkpoints").iterdir() if path.is_dir())
    return _state(checkpoint)


def _told(run: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((run / "warm_start.json").read_text())
    return told


def _rows_by_value(folder: Path, feature: str, oov_rows: int) -> dict[Any, int]:
    return {f"shared {row}": row for row in range(oov_rows)} | {value: row for row, value in values_of(folder, feature).items()}


@pytest.mark.parametrize("run", ["later-1", "later-2"])
def test_rows_follow_their_values_and_new_ones_are_as_ever(folder: Path, run: str) -> None:
    """On one rank and two, from a run of two whose tables were split by rows."""
    source, warm, cold = _source(folder), _state(folder / run / "beginning"), _state(folder / "later-cold" / "beginning")
    told = _told(folder / run)["tables"]
    for feature, oov_rows in (("user", 1), ("shop", 2), ("tags", 1)):
        before, now = (_rows_by_value(folder / name, feature, oov_rows) for name in ("before", "later"))
        both, new = before.keys() & now.keys(), now.keys() - before.keys()
        assert len(both) > 5, feature
        assert [now[value] for value in both] != [before[value] for value in both], "they moved"
        for value in both:
            assert torch.equal(_table(warm, feature)[now[value]], _table(source, feature)[before[value]]), (feature, value)
            assert _adagrad(warm, feature)[now[value]] == _adagrad(source, feature)[before[value]]
        for value in new:
            assert torch.equal(_table(warm, feature)[now[value]], _table(cold, feature)[now[value]]), (feature, value)
            assert _adagrad(warm, feature)[now[value]] == 0
        expected = {"rows": len(now), "matched": len(both), "new": len(new), "left": len(before.keys() - now.keys())}
        assert told[feature] == expected
        rows = pq.read_table(folder / run / "warm_start" / f"{feature}.parquet").to_pylist()
        by_row = {row: value for value, row in now.items()}
        assert rows == [{"row": row, "from_row": before.get(by_row[row])} for row in range(len(now))]
    assert float(_adagrad(source, "user").max()) > 0
    assert len(_rows_by_value(folder / "later", "user", 1).keys() - _rows_by_value(folder / "before", "user", 1).keys()) > 50


@pytest.mark.parametrize("run", ["later-1", "later-2"])
def test_hashed_rows_keep_their_places_and_buckets_need_their_boundaries(folder: Path, run: str) -> None:
    source, warm, cold = _source(folder), _state(folder / run / "beginning"), _state(folder / "later-cold" / "beginning")
    told = _told(folder / run)["tables"]
    for feature, rows in (("history", 40), ("user_shop", 30)):
        assert torch.equal(_table(warm, feature), _table(source, feature))
        assert torch.equal(_adagrad(warm, feature), _adagrad(source, feature))
        assert told[feature] == {"rows": rows, "matched": rows, "new": 0, "left": 0}
    assert torch.equal(_table(warm, "priced"), _table(cold, "priced"))
    assert told["priced"] == {"rows": 5, "matched": 0, "new": 5, "left": 5, "reason": "its buckets have other boundaries"}
    assert not (folder / run / "warm_start" / "priced.parquet").exists()
    dense = {name for name in warm["model"] if ".embedding_bags." not in name}
    assert len(dense) > 15
    for name in dense:
        assert torch.equal(warm["model"][name], source["model"][name]), name
    assert {each["taken"] for each in _told(folder / run)["dense"].values()} == {"yes"}
    moments = _told(folder / run)["numbers"]["price"]
    means = [Schema.load(folder / name / "schema.json").numeric[0].mean for name in ("before", "later")]
    assert moments["mean"] == means


def test_the_report_names_the_source_and_the_log_shows_it(folder: Path) -> None:
    told, source = _told(folder / "later-1"), folder / "source"
    assert {name: told[name] for name in ("run", "checkpoint", "schema_hash")} == {
        "run": str(source),
        "checkpoint": "step-8",
        "schema_hash": Schema.load(source / "schema.json").hash(),
    }


def test_features_that_changed_are_told_with_the_reason(folder: Path) -> None:
    source, warm, cold = _source(folder), _state(folder / "other-1" / "beginning"), _state(folder / "other-cold" / "beginning")
    told = _told(folder / "other-1")["tables"]
    reasons = {name: each.get("reason") for name, each in told.items()}
    assert reasons == {
        "user": "oov_rows was 1, is 3: those rows are new",
        "added": "the source has no such table",
        "shop": "value_type was string, is int64",
        "tags": "encoding was vocabulary, is hash",
        "history": "hash_size was 40, is 50: values have other rows",
        "user_shop": "cross was user x shop, is shop x user",
        "priced": "the data set has no such table",
    }
    assert told["priced"] == {"rows": 0, "matched": 0, "new": 0, "left": 5, "reason": reasons["priced"]}
    assert told["history"] == {"rows": 50, "matched": 0, "new": 50, "left": 40, "reason": reasons["history"]}
    for feature in ("added", "shop", "tags", "history", "user_shop"):
        assert torch.equal(_table(warm, feature), _table(cold, feature)), feature
    before, now = _rows_by_value(folder / "before", "user", 0), _rows_by_value(folder / "other", "user", 0)
    both = before.keys() & now.keys()
    assert told["user"]["matched"] == len(both) > 20
    for value in both:
        assert torch.equal(_table(warm, "user")[now[value]], _table(source, "user")[before[value]])
    assert torch.equal(_table(warm, "user")[:3], _table(cold, "user")[:3])


def test_layers_over_other_inputs_take_the_columns_of_those_that_both_have(folder: Path) -> None:
    """Of a cross layer both sides, and its bias; what reads no inputs is taken whole."""
    source, warm, cold = _source(folder), _state(folder / "other-1" / "beginning"), _state(folder / "other-cold" / "beginning")
    tables = {"before": ["user", "shop", "tags", "history", "priced", "user_shop"]}
    tables["other"] = ["user", "added", "shop", "tags", "history", "user_shop"]
    before, now = ({name: tables[which].index(name) * DIM for name in tables[which]} for which in ("before", "other"))
    both = [name for name in tables["other"] if name in before]
    to = [now[name] + column for name in both for column in range(DIM)] + [6 * DIM]  # the price stands last
    of = [before[name] + column for name in both for column in range(DIM)] + [6 * DIM]
    new = [now["added"] + column for column in range(DIM)]
    weight, kernel, bias = "backbone.layers.0.weight", "backbone.cross.kernels.0", "backbone.cross.bias.0"
    assert torch.equal(_dense(warm, weight)[:, to], _dense(source, weight)[:, of])
    assert torch.equal(_dense(warm, weight)[:, new], _dense(cold, weight)[:, new])
    assert torch.equal(_dense(warm, kernel)[to][:, to], _dense(source, kernel)[of][:, of])
    assert torch.equal(_dense(warm, kernel)[new], _dense(cold, kernel)[new])
    assert torch.equal(_dense(warm, kernel)[:, new], _dense(cold, kernel)[:, new])
    assert torch.equal(_dense(warm, bias)[to], _dense(source, bias)[of])
    told = _told(folder / "other-1")["dense"]
    partly = {name.removeprefix("model.head."): each["reason"] for name, each in told.items() if each["taken"] == "in part"}
    assert partly == dict.fromkeys([weight, kernel, bias], "inputs not of added; without priced")
    tower = "ctr.tower.layers.0.weight"
    assert torch.equal(_dense(warm, tower), _dense(source, tower))
    assert not torch.equal(_dense(warm, tower), _dense(cold, tower))


def test_numbers_that_moved_are_warned_of(folder: Path) -> None:
    said = (folder / "ranks-1" / "stderr").read_text()
    assert "numbers that are standardised otherwise than the source learned them: price (mean " in said
    assert "log1p True, is False)" in said


def test_another_width_of_tables_is_not_taken(folder: Path) -> None:
    told, warm, cold = _told(folder / "wider"), _state(folder / "wider" / "beginning"), _state(folder / "later-cold" / "beginning")
    assert {each["reason"] for name, each in told["tables"].items() if name != "priced"} == {"embedding_dim was 8, is 16"}
    assert {each["matched"] for each in told["tables"].values()} == {0}
    assert _table(warm, "user").shape[1] == 2 * _table(cold, "user").shape[1]
    dense = told["dense"]
    weight = "model.head.backbone.layers.0.weight"
    names = ", ".join(feature["name"] for feature in FEATURES if feature["name"] != "price")
    assert dense[weight] == {"taken": "in part", "reason": f"inputs not of {names}; without {names}"}
    assert torch.equal(_dense(warm, "backbone.layers.0.weight")[:, -1], _dense(_source(folder), "backbone.layers.0.weight")[:, -1])
    imputation = {each["reason"] for name, each in dense.items() if name.startswith("model.head.imputation.")}
    assert imputation == {"imputation.predicts was label, is error"}


def test_another_objective_takes_the_towers_that_both_have(folder: Path) -> None:
    source, warm, told = _source(folder), _state(folder / "naive" / "beginning"), _told(folder / "naive")["dense"]
    imputation = {name: each for name, each in told.items() if ".imputation." in name}
    assert len(imputation) == 4
    assert all(each == {"taken": "no", "reason": "the model has no such weights"} for each in imputation.values())
    assert told["model.head.ctr.tower.layers.0.weight"] == {"taken": "no", "reason": "its shape was [16, 12], is [4, 12]"}
    assert told["model.head.cvr.tower.output.bias"] == {"taken": "yes"}
    assert torch.equal(_dense(warm, "cvr.tower.output.bias"), _dense(source, "cvr.tower.output.bias"))
    assert _told(folder / "naive")["tables"]["history"]["matched"] == 40


def test_another_backbone_takes_no_layer(folder: Path) -> None:
    told = _told(folder / "mmoe")["dense"]
    reasons = {each["reason"] for name, each in told.items() if name.startswith("model.head.") and each["taken"] == "no"}
    assert {each["taken"] for each in told.values()} == {"no"}
    assert reasons == {"the backbone was dcn_v2, is mmoe", "the model has no such weights"}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a run of it, and one that began with it."""
    folder = tmp_path_factory.mktemp("encoded")
    data = str(write_dataset(folder / "set", {"train": 1000, "validation": 300}))
    train = "tests.training_calls:train_run"

    def call(out: str, *overrides: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
        return train, {"data": data, "out": str(folder / out), "overrides": list(overrides), **arguments}

    source, split = str(folder / "source"), ["model.embedding_dim=256", "training.sharding={'*': column_wise}"]
    results = run_ranks(1, [call("source"), call("warm-1", *STILL, warm_start=source)], folder / "ranks-1")
    more = [
        call("warm-2", *STILL, ROW_WISE, warm_start=source),
        call("split", *split),
        call("from-split-2", *split, *STILL, warm_start=str(folder / "split")),
    ]
    results += run_ranks(2, more, folder / "ranks-2")
    results += run_ranks(1, [call("from-split-1", split[0], *STILL, warm_start=str(folder / "split"))], folder / "ranks-1b")
    assert [result.get("steps") for result in results] == [4] * 6, results
    return folder


def test_predictions_begin_as_the_source_ends(encoded: Path) -> None:
    """On one rank, on two with another plan, and from columns that two ranks held: steps of 1e-12 move nothing."""
    runs = ["source", "warm-1", "warm-2"]
    calls = [
        ("tests.training_calls:logits", {"run": str(encoded / run), "data": str(encoded / "set"), "split": "validation"}) for run in runs
    ]
    source, *others = run_ranks(1, calls, encoded / "logits")
    assert np.std(source[0]) > 0.05
    for name, found in zip(runs[1:], others, strict=True):
        assert np.shape(found) == (2, 300)
        np.testing.assert_allclose(found, source, atol=1e-6, err_msg=name)


def test_states_of_split_columns_are_one_by_their_mean(encoded: Path, tmp_path: Path) -> None:
    """And a row's state is that of all its column shards again. One step of 256 rows adds to it: rows without values in it are looked at."""
    states = {
        name: _adagrad(_state(encoded / name / "checkpoints" / "step-4"), "user") for name in ("split", "from-split-1", "from-split-2")
    }
    mean = states["split"].view(2, 300).mean(dim=0)
    assert not torch.equal(states["split"][:300], states["split"][300:])
    grown = states["from-split-1"] - mean
    assert (grown >= -1e-9).all()
    assert mean.max() > 0
    # The second run adds the squared gradients of the same four batches to what it took: none to a user who is in none of them.
    absent = states["split"].view(2, 300).sum(dim=0) == 0
    assert torch.equal(states["from-split-1"][absent], mean[absent])
