"""A training that begins with what a run learned: which rows and weights it takes, and that they are the run's, bit for bit."""

from __future__ import annotations

import json
import logging
import shutil
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
from escm2rec.training.run import Run
from escm2rec.training.warm_start import log_taken
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
MIXED = "training.sharding={'*': row_wise, tags: data_parallel, history: data_parallel}"
SPLIT = ["model.embedding_dim=256", "training.sharding={'*': column_wise}"]
CHOICE = ["objective={kind: escm2-ips, propensity: {cross_fit: true}}", "choice.objectives=[{kind: naive}]"]
AVERAGED = ["training.sparse_optimizer=adagrad", "training.ema_decay=0.9"]
STEPS = 6
State = dict[str, Any]
Call = tuple[str, dict[str, Any]]


def _config(features: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "data": {
            "source": {"kind": "table"},
            "features": features,
            "split": {"by": "hash", "train": 0.8, "validation": 0.2},
            "rows_per_group": 256,
        },
        "model": {"embedding_dim": DIM, "tower_hidden": [16], "backbone": {"kind": "dcn_v2", "hidden": [12], "cross_layers": 1}},
        "training": {"global_batch_size": 128, "dense_learning_rate": 0.01},
    }


def _make(folder: Path, name: str, table: pa.Table, features: list[dict[str, Any]]) -> None:
    """`NAME.yaml` and the data set `NAME` of raw rows."""
    (folder / f"{name}-raw").mkdir()
    pq.write_table(table, folder / f"{name}-raw" / "rows.parquet")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(_config(features)))
    preprocess(parse_config(_config(features)).data, folder / f"{name}-raw", folder / name)


def _call(what: str, folder: Path, name: str, out: str, *overrides: str, warm_start: str | None = "source", **arguments: Any) -> Call:
    given = {"config_file": str(folder / f"{name}.yaml"), "data": str(folder / name), "out": str(folder / out), **arguments}
    warm = {} if warm_start is None else {"warm_start": str(folder / warm_start)}
    return f"tests.training_calls:{what}", {**given, "overrides": list(overrides), **warm}


def _make_data(folder: Path) -> None:
    """One data set, and of later rows one with the same features and one with others: half of the users are new, prices have grown."""
    later = raw_table(700, 2, labels=True)
    users = pa.array([None if user is None else user + 100 for user in later["user"].to_pylist()], pa.int64())
    later = later.set_column(later.column_names.index("user"), "user", users)
    later = later.set_column(later.column_names.index("price"), "price", pa.array(np.asarray(later["price"]) * 3))
    _make(folder, "before", raw_table(900, 1, labels=True), FEATURES)
    _make(folder, "later", later, FEATURES)
    _make(folder, "other", later, OTHER_FEATURES)


def _break(folder: Path) -> None:
    """Runs that are not what they were: unfinished, damaged, without a checkpoint yet, begun with a run that is gone."""
    for name, of in (("unfinished", "source"), ("damaged", "source"), ("started", "warm-2"), ("orphan", "warm-2")):
        shutil.copytree(folder / of, folder / name)
    (folder / "unfinished" / "manifest.json").unlink()
    largest = max((folder / "damaged" / "checkpoints").rglob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    (folder / "started" / "manifest.json").unlink()
    shutil.rmtree(folder / "started" / "checkpoints")
    for name, changed in (("started", {}), ("orphan", {"run": str(folder / "gone")})):
        known = {key: _told(folder / name)[key] for key in ("run", "checkpoint", "schema_hash")}
        (folder / name / "warm_start.json").write_text(json.dumps(known | changed))


def _run(world_size: int, calls: dict[str, Call], folder: Path) -> dict[str, Any]:
    return dict(zip(calls, run_ranks(world_size, list(calls.values()), folder / f"ranks-{world_size}"), strict=True))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name what each call gave, and `folder`: a run that was trained on two ranks, and what began with it there and on one."""
    folder = tmp_path_factory.mktemp("warm")
    _make_data(folder)

    def train(*arguments: Any, **more: Any) -> Call:
        return _call("train_file", folder, *arguments, **more)

    def begin(*arguments: Any, **more: Any) -> Call:
        return _call("begin", folder, *arguments, **more)

    def logits(run: str) -> Call:
        return "tests.training_calls:logits", {"run": str(folder / run), "data": str(folder / "before"), "split": "validation"}

    two = {
        "source": train("before", "source", MIXED, warm_start=None),
        "split": train("before", "split", *SPLIT, warm_start=None),
        "averaged": train("before", "averaged", *AVERAGED, warm_start=None),
        "warm-2": train("before", "warm-2", *STILL),
        "later-2": begin("later", "later-2", "training.sharding={user: row_wise, shop: data_parallel, history: data_parallel}"),
        "from-split-2": begin("before", "from-split-2", *SPLIT, warm_start="split"),
    }
    found = _run(2, two, folder)
    _break(folder)
    one = {
        "later-cold": begin("later", "later-cold", warm_start=None),
        "later-1": begin("later", "later-1"),
        "other-cold": begin("other", "other-cold", warm_start=None),
        "other-1": begin("other", "other-1"),
        "wider": begin("later", "wider", "model.embedding_dim=16", "objective.imputation.predicts=error"),
        "naive": begin("later", "naive", "objective.kind=naive", "model.tower_hidden=[4]"),
        "mmoe": begin("later", "mmoe", "model.backbone={kind: mmoe, hidden: [12]}"),
        "from-split-1": begin("before", "from-split-1", SPLIT[0], "training.sharding={history: data_parallel}", warm_start="split"),
        "from-averaged": begin("before", "from-averaged", *AVERAGED, warm_start="averaged"),
        "from-adagrad": begin("before", "from-adagrad", warm_start="averaged"),
        "warm-1": train("before", "warm-1", *STILL),
        "logits source": logits("source"),
        "logits warm-1": logits("warm-1"),
        "logits warm-2": logits("warm-2"),
        "absent": train("before", "none", warm_start="nowhere"),
        "unfinished": train("before", "none", warm_start="unfinished"),
        "damaged": train("before", "none", warm_start="damaged"),
        "itself": train("before", "source", warm_start="source", overwrite=True),
        "another": train("before", "warm-1", *STILL, warm_start="split", resume=True),
        "began cold": train("before", "source", MIXED, resume=True),
        "started": train("before", "started", *STILL, warm_start=None, resume=True),
        "orphan": train("before", "orphan", *STILL, "training.epochs=2", warm_start=None, resume=True),
        "choice": train("before", "choice", *CHOICE),
        "choice again": train("before", "choice", *CHOICE, warm_start=None, resume=True),
        "choice of another": train("before", "choice", *CHOICE, warm_start="split", resume=True),
    }
    return {"folder": folder} | found | _run(1, one, folder)


@pytest.fixture(scope="module")
def folder(results: dict[str, Any]) -> Path:
    folder: Path = results["folder"]
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
    """On one rank and two, from a run of two whose tables were split by rows, or whole on both."""
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


def test_the_report_names_the_source(folder: Path) -> None:
    told, source = _told(folder / "later-1"), folder / "source"
    assert {name: told[name] for name in ("run", "checkpoint", "schema_hash")} == {
        "run": str(source),
        "checkpoint": f"step-{STEPS}",
        "schema_hash": Schema.load(source / "schema.json").hash(),
    }


def test_the_log_shows_it_as_a_table(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, told = Run.open(folder / "source"), _told(folder / "other-1")
    with caplog.at_level(logging.INFO, "escm2rec"):
        log_taken(source, told)
    lines = caplog.messages[0].splitlines()
    user = told["tables"]["user"]
    assert lines[0] == f"warm start from {source.path}, step-{STEPS}"
    assert lines[1].split() == ["table", "rows", "matched", "new", "left"]
    numbers = [str(user[name]) for name in ("rows", "matched", "new", "left")]
    assert lines[2].split(maxsplit=5) == ["user", *numbers, "oov_rows was 1, is 3: those rows are new"]
    assert len(lines[2:9]) == len(told["tables"])
    assert lines[9] == f"  dense: {len(told['dense']) - 3} taken, 3 in part, 0 not"
    assert "    model.head.backbone.layers.0.weight: inputs not of added; without priced" in lines[10:]


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


def test_predictions_begin_as_the_source_ends(results: dict[str, Any]) -> None:
    """On one rank and on two, from two ranks with another plan: what steps of 1e-12 leave."""
    source, rows = results["logits source"], pq.read_table(results["folder"] / "before" / "validation").num_rows
    assert np.shape(source) == (2, rows)
    assert rows > 100
    assert np.std(source[0]) > 0.05
    for name in ("warm-1", "warm-2"):
        assert results[name]["steps"] == STEPS
        np.testing.assert_allclose(results[f"logits {name}"], source, atol=1e-6, err_msg=name)


def test_states_of_split_columns_become_one_by_their_mean(folder: Path) -> None:
    """And one state is that of all column shards: what two ranks held of each row's columns begins anew on one rank, and on two."""
    (checkpoint,) = (folder / "split" / "checkpoints").glob("step-*")
    source, one, two = (_state(path) for path in (checkpoint, folder / "from-split-1" / "beginning", folder / "from-split-2" / "beginning"))
    for feature in ("user", "history"):
        states = _adagrad(source, feature).view(2, -1)
        assert not torch.equal(states[0], states[1])
        assert torch.equal(_adagrad(one, feature), states[0] * 0.5 + states[1] * 0.5)
        assert torch.equal(_adagrad(two, feature), _adagrad(one, feature).repeat(2))
        for warm in (one, two):
            assert torch.equal(_table(warm, feature), _table(source, feature))


def test_a_moving_average_is_what_is_taken_and_goes_on(folder: Path) -> None:
    """A run that keeps one predicts with it. Adagrad's state an element goes along; to another optimizer no state does."""
    (checkpoint,) = (folder / "averaged" / "checkpoints").glob("step-*")
    source, warm, other = (
        _state(path) for path in (checkpoint, *(folder / name / "beginning" for name in ("from-averaged", "from-adagrad")))
    )
    names = [name for name in warm["model"] if ".embedding_bags." not in name]
    assert len(names) > 15
    for name in names:
        average = source["optimizer"]["state"][f"dense.{name}"]["ema"]
        assert torch.equal(warm["model"][name], average), name
        assert torch.equal(other["model"][name], average), name
        assert torch.equal(warm["optimizer"]["state"][f"dense.{name}"]["ema"], average), name
        assert not warm["optimizer"]["state"][f"dense.{name}"]["exp_avg"].any(), "AdamW begins anew"
    assert not torch.equal(source["model"]["model.head.ctr.tower.layers.0.weight"], warm["model"]["model.head.ctr.tower.layers.0.weight"])
    for feature in ("user", "history"):
        assert _adagrad(source, feature).shape == _table(source, feature).shape
        assert torch.equal(_adagrad(warm, feature), _adagrad(source, feature))
        assert torch.equal(_table(other, feature), _table(source, feature))
        assert not _adagrad(other, feature).any()
    assert _told(folder / "from-averaged")["table_states"] == {"taken": "yes"}
    assert _told(folder / "from-adagrad")["table_states"] == {"taken": "no", "reason": "sparse_optimizer was adagrad, is rowwise_adagrad"}


@pytest.mark.parametrize(
    ("call", "error", "said", "hint"),
    [
        ("absent", "DataError", "no run at {}/nowhere", "did you mean {}/"),
        (
            "unfinished",
            "DataError",
            "the run at {}/unfinished is incomplete: it has no manifest.json",
            "train with --resume goes on with it",
        ),
        (
            "damaged",
            "DataError",
            "checkpoint {}/damaged/checkpoints/step-6 is damaged: ",
            "start from another run, or leave --warm-start out",
        ),
        ("itself", "ConfigError", "--warm-start {0}/source: a run cannot begin with itself", "train into another --out; --resume goes on"),
        ("another", "ConfigError", "--warm-start {0}/split: {0}/warm-1 began with {0}/source, and goes on", "leave --warm-start out"),
        ("began cold", "ConfigError", "--warm-start {0}/source: {0}/source began without one, and goes on", "leave --warm-start out"),
        (
            "choice of another",
            "ConfigError",
            "--warm-start {0}/split: {0}/choice began with {0}/source, and goes on",
            "leave --warm-start out",
        ),
    ],
)
def test_what_cannot_be_is_refused(results: dict[str, Any], call: str, error: str, said: str, hint: str) -> None:
    result, folder = results[call], results["folder"]
    assert result["error"] == error
    assert result["message"].startswith(said.format(folder)), result["message"]
    assert result["hint"].startswith(hint.format(folder)), result["hint"]


def test_what_goes_on_does_not_begin_again(results: dict[str, Any]) -> None:
    """Not even if the source is gone; but a start that left no checkpoint begins with its source, though nobody names it again."""
    folder = results["folder"]
    assert results["orphan"]["steps"] == 2 * STEPS
    assert "tables" not in _told(folder / "orphan")
    assert results["started"]["steps"] == STEPS
    assert _told(folder / "started") == _told(folder / "warm-2")


def test_candidates_begin_alike_and_what_must_know_nothing_begins_anew(results: dict[str, Any]) -> None:
    """The judge, and the halves of a cross-fitted propensity: the source may have seen the rows that they must not know."""
    folder = results["folder"]
    assert results["choice again"] == results["choice"], "there is nothing left to do"
    begun = {str(path.parent.relative_to(folder / "choice")) for path in (folder / "choice").rglob("config.json")}
    warm = {str(path.parent.relative_to(folder / "choice")) for path in (folder / "choice").rglob("warm_start.json")}
    assert begun - warm == {"candidates/judge", *(name for name in begun if "/half-" in f"/{name}")}
    assert len(warm) == 2
    assert len(begun) == 5
