"""Plans are followed: the built model has each shard where the plan says, and trains as the unsharded one does."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from escm2rec.errors import ConfigError
from escm2rec.planning.cluster import parse_cluster
from escm2rec.planning.plan import make_plan
from escm2rec.planning.planner import Request
from escm2rec.planning.record import Record
from escm2rec.planning.tables import Table, Tables
from escm2rec.sharding.followed import follow
from escm2rec.sharding.planner import ALL_TYPES
from tests.encoded import TABLE_ROWS, schema, write_dataset
from tests.ranks import run_ranks
from tests.training_calls import initial, looked_up

NUM_STEPS = 6
DIMENSION = 256  # TorchRec makes no column shard of less than 128
LEARNING_RATE = 1.0  # of `Tables`
SETTINGS = [f"model.embedding_dim={DIMENSION}", "training.sparse_optimizer=adagrad"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": NUM_STEPS * 256 - 37, "validation": 600})


def request(types: dict[str, list[str]], cluster: str = "1x2:cpu-epyc-7763") -> Request:
    weighted = {feature.name for feature in schema().tables if feature.kind == "weighted_list"}
    tables = [Table(name=name, rows=rows, dimension=DIMENSION, weighted=name in weighted) for name, rows in TABLE_ROWS.items()]
    return Request(tables, parse_cluster(cluster), 128, "adagrad", allowed=types)


def write(record: Record, path: Path) -> str:
    path.write_text(json.dumps(record))
    return str(path)


def where(record: Record) -> dict[str, list[list[Any]]]:
    """As `shards_held`: what each rank has of every table."""
    found = {}
    for name, table in record["tables"].items():
        found[name] = sorted([shard["rank"], shard["offset"], shard["size"]] for shard in table["shards"])
    return found


def test_every_type_is_built_as_planned_and_trains_as_the_unsharded(data: Path, tmp_path: Path) -> None:
    """Element-wise Adagrad, whose state does not depend on how a table is cut, so that one unsharded training is the truth for all."""
    plans = {kind: make_plan(request({"*": [kind]})) for kind in ALL_TYPES}
    mixed = {"user": ["row_wise"], "tags": ["column_wise"], "history": ["table_wise"], "scene": ["data_parallel"]}
    plans["mixed"] = make_plan(request(mixed))
    calls: list[tuple[str, dict[str, Any]]] = []
    for name, record in plans.items():
        told = {"data": str(data), "overrides": [*SETTINGS, f"training.plan={write(record, tmp_path / f'{name}.json')}"]}
        calls += [
            ("tests.training_calls:shards_held", {**told, "out": str(tmp_path / "built")}),
            ("tests.training_calls:train_run", {**told, "out": str(tmp_path / name)}),
        ]
    results = run_ranks(2, calls, tmp_path / "on-2")
    run_ranks(1, [("tests.training_calls:train_run", {"data": str(data), "out": str(tmp_path / "alone"), "overrides": SETTINGS})], tmp_path)
    alone = _losses(tmp_path / "alone")
    assert len(alone) == NUM_STEPS
    for (name, record), held in zip(plans.items(), results[::2], strict=True):
        assert held == where(record), name
        run = json.loads((tmp_path / name / "plan.json").read_text())
        assert {table: told["sharding_type"] for table, told in run["tables"].items()} == {
            table: told["sharding_type"] for table, told in record["tables"].items()
        }
        assert _losses(tmp_path / name) == [pytest.approx(each, abs=1e-5) for each in alone], name


def _losses(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name.startswith("loss_")} for record in records]


def stepped_alone(rows: int, steps: int, ranks: int, pieces: int) -> torch.Tensor:
    """Row-wise Adagrad written out, with a state for each row of each of `pieces` column pieces: what such a plan is to compute."""
    weights, state = initial(rows, DIMENSION), torch.zeros(rows, pieces)
    for step in range(steps):
        gradient = torch.zeros(rows, DIMENSION)
        for rank in range(ranks):
            ids, coefficients = looked_up(step, rank, rows, DIMENSION)
            gradient.index_add_(0, ids, coefficients / ranks)  # as the dense part's gradients are averaged
        by_piece = gradient.view(rows, pieces, -1)
        state += by_piece.square().mean(dim=2)
        weights -= LEARNING_RATE * (by_piece / (state.sqrt() + 1e-8).unsqueeze(2)).view(rows, DIMENSION)
    return weights


def test_row_wise_adagrad_has_a_state_for_each_column_shard(tmp_path: Path) -> None:
    """Cut by columns the tables step as an unsharded one with a state for each piece of a row; not cut, as one with a state a row."""
    pieces = {"column_wise": 2, "table_column_wise": 2, "grid_shard": 2, "table_wise": 1, "row_wise": 1, "table_row_wise": 1}
    calls = []
    for kind, count in pieces.items():
        tables = [Table(name="table", rows=40, dimension=DIMENSION)]
        record = make_plan(Request(tables, parse_cluster("1x2:cpu-epyc-7763"), 16, allowed={"*": [kind]}))
        assert len({tuple(shard["offset"])[1] for shard in record["tables"]["table"]["shards"]}) == count
        told = {"plan": write(record, tmp_path / f"{kind}.json"), "rows": 40, "dimension": DIMENSION, "steps": 4}
        calls.append(("tests.training_calls:step_by_plan", told))
    results = run_ranks(2, calls, tmp_path / "on-2")
    expected = {count: stepped_alone(40, 4, 2, count) for count in (1, 2)}
    assert not torch.allclose(expected[1], expected[2], atol=1e-3)
    for (kind, count), weights in zip(pieces.items(), results, strict=True):
        assert torch.allclose(torch.tensor(weights), expected[count], atol=1e-5), kind


class _Model(nn.Module):
    def __init__(self, tables: list[Table]) -> None:
        super().__init__()
        self.embeddings = Tables(tables, "sgd")


def test_plans_for_something_else_are_refused(tmp_path: Path) -> None:
    asked = request({"*": ["row_wise"]})
    record = make_plan(asked)
    path = tmp_path / "plan.json"
    model = _Model(list(asked.tables))

    def refused(said: str, ranks: tuple[int, int, str] = (2, 2, "cpu"), of: nn.Module = model) -> None:
        with pytest.raises(ConfigError, match=re.escape(said)) as error:
            follow(path, of, *ranks)
        assert "plan" in error.value.hint

    refused("cannot be read")
    path.write_text("{}")
    refused("holds no plan")
    write(record, path)
    assert follow(path, model, 2, 2, "cpu").plan.keys() == {"embeddings.collection", "embeddings.weighted_collection"}
    assert follow(tmp_path, model, 2, 2, "cpu").plan.keys() == {"embeddings.collection", "embeddings.weighted_collection"}
    refused(f"the plan at {path} is for 2 rank(s), and there are 4", (4, 2, "cpu"))
    refused("is for device 'cpu', and ranks have 'cuda'", (2, 2, "cuda"))
    refused("has a table user, which the data set has not", of=_Model([table for table in asked.tables if table.name != "user"]))
    more = [*asked.tables, Table(name="item", rows=7, dimension=DIMENSION)]
    refused("has no table item, which the data set has", of=_Model(more))
    grown = [table.model_copy(update={"rows": 2 * table.rows}) for table in asked.tables]
    refused("table 'user': its shards cover 76,800 numbers, it has 600 rows of 256", of=_Model(grown))
    twice = {**record, "tables": {**record["tables"], "user": {**record["tables"]["user"]}}}
    twice["tables"]["user"]["shards"] = [record["tables"]["user"]["shards"][0]] * 2
    write(twice, path)
    refused("table 'user': its shards cover 38,400 numbers, it has 300 rows of 256")
    assert torch.device("meta") == next(model.parameters()).device


def test_a_plan_and_forced_types_exclude_each_other(data: Path, tmp_path: Path) -> None:
    from tests.encoded import config

    with pytest.raises(ConfigError, match="plan says how every table is sharded"):
        config("training.plan=plan.json", "training.sharding={user: row_wise}")


def test_a_followed_run_is_evaluated_on_other_ranks(data: Path, tmp_path: Path) -> None:
    """The plan was of the ranks that trained: those that measure plan anew."""
    plan = write(make_plan(replace(request({"*": ["row_wise"]}))), tmp_path / "plan.json")
    out = str(tmp_path / "run")
    train = ("tests.training_calls:train_run", {"data": str(data), "out": out, "overrides": [*SETTINGS, f"training.plan={plan}"]})
    resumed = ("tests.training_calls:train_run", {**train[1], "resume": True})
    run_ranks(2, [train, resumed], tmp_path / "on-2")
    measure = ("tests.training_calls:evaluate_run", {"data": str(data), "run": out, "split": "validation"})
    (report,) = run_ranks(1, [measure], tmp_path / "on-1")
    assert report["rows"] == 600
