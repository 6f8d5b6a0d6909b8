"""A run that goes on under other plans and on other numbers of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from escm2rec.sharding.planner import ALL_TYPES
from escm2rec.training.column_shards import _shares
from tests.encoded import TABLE_ROWS, write_dataset
from tests.ranks import run_ranks

NUM_STEPS = 29
SETTINGS = ["objective.kind=escm2-ips", "training.learning_rate_decay=none"]
IN_TWO_SHARDS = "model.embedding_dim=256"  # TorchRec makes no column shard of less than 128
CONVERTED = (
    "splits the columns of history, scene, tags, user otherwise than this plan does: "
    "what their optimizer holds for each row and column shard becomes the mean over the old shards"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": NUM_STEPS * 256 - 37, "validation": 600})


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _under(plan: str) -> str:
    return f"training.sharding={{'*': {plan}}}"


def test_a_run_goes_on_under_every_plan_on_2_then_1_then_3_ranks(data: Path, tmp_path: Path) -> None:
    """Told to end every three steps, and resumed under another plan: as no column is split, the steps are those of nobody told."""
    call: dict[str, Any] = {"data": str(data), "at_step": 1, "of_rank": 0, "resume": True}
    alone = {"data": str(data), "out": str(tmp_path / "undisturbed"), "overrides": [*SETTINGS, _under("row_wise")]}
    legs = [
        (2, ["row_wise", "table_wise", "column_wise", "data_parallel"]),
        (1, ["table_row_wise", "data_parallel", "grid_shard"]),
        (3, ["data_parallel", "table_column_wise", "row_wise"]),
    ]
    assert {plan for _, plans in legs for plan in plans} == set(ALL_TYPES)
    step = 0
    for world_size, plans in legs:
        calls = [{**call, "out": str(tmp_path / "run"), "overrides": [*SETTINGS, _under(plan)]} for plan in plans]
        told = [("tests.training_calls:train_until_told", each) for each in calls]
        beside = [("tests.training_calls:train_run", alone)] if world_size == 2 else []
        results = run_ranks(world_size, told + beside, tmp_path / f"on-{world_size}")
        for plan, result in zip(plans, results, strict=False):
            step = min(step + 3, NUM_STEPS)
            assert f"stopped by SIGTERM after step {step} of {NUM_STEPS}" in result.get("message", "") or result.get("steps") == step, plan
        planned = json.loads((tmp_path / "run" / "plan.json").read_text())
        assert planned["world_size"] == world_size
        assert {table["sharding_type"] for table in planned["tables"].values()} == {plans[-1]}
        assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["sharding"] == {"*": plans[-1]}, (
            "what is evaluated by"
        )
        said = (tmp_path / f"on-{world_size}" / "stderr").read_text()
        assert "otherwise than this plan" not in said
        assert "Sharding spec" not in said, "what TorchRec's planner says of data_parallel"
    assert step == NUM_STEPS
    undisturbed, seen = _records(tmp_path / "undisturbed"), _records(tmp_path / "run")
    assert len(undisturbed) == NUM_STEPS
    names = [name for name in undisturbed[0] if name in ("step", "rows") or name.startswith("loss_")]
    assert len(names) == 5
    for record, expected in zip(seen, undisturbed, strict=True):
        assert {name: record[name] for name in names} == pytest.approx({name: expected[name] for name in names}, abs=1e-5)


def test_tables_without_a_state_go_on_under_other_plans(data: Path, tmp_path: Path) -> None:
    """SGD's: a rank that begins to hold a table finds nothing of it in the checkpoint's optimizer, and is to look for nothing."""
    call = {"data": str(data), "out": str(tmp_path / "run"), "at_step": 1, "of_rank": 0, "resume": True}
    step = 0
    for world_size, plans in ((1, ["table_wise"]), (2, ["table_wise", "data_parallel", "table_wise", "row_wise", "table_wise"])):
        every = [{**call, "overrides": [*SETTINGS, "training.sparse_optimizer=sgd", _under(plan)]} for plan in plans]
        told = [("tests.training_calls:train_until_told", each) for each in every]
        for plan, result in zip(plans, run_ranks(world_size, told, tmp_path / f"on-{world_size}"), strict=True):
            step += 3
            assert f"after step {step} of {NUM_STEPS}" in result["message"], (plan, result)


def test_a_state_of_other_columns_is_converted_by_the_rule_and_told(data: Path, tmp_path: Path) -> None:
    """From whole rows to two column shards, a copy; back, their mean, on any ranks; among plans that split alike, as it was, untold."""
    out, settings = tmp_path / "run", [*SETTINGS, IN_TWO_SHARDS]

    def train(plan: str) -> tuple[str, dict[str, Any]]:
        told = {"data": str(data), "out": str(out), "overrides": [*settings, _under(plan)], "at_step": 1, "of_rank": 1, "resume": True}
        return ("tests.training_calls:train_until_told", told)

    def states(plan: str) -> tuple[str, dict[str, Any]]:
        return ("tests.training_calls:table_states", {"data": str(data), "out": str(out), "overrides": [*settings, _under(plan)]})

    def told(world_size: int) -> int:
        return (tmp_path / f"on-{world_size}" / "stderr").read_text().count(CONVERTED)

    calls = [
        *(train("row_wise"), states("row_wise"), states("data_parallel"), states("column_wise")),
        *(train("grid_shard"), states("grid_shard")),
    ]
    _, whole, unsplit, copied, _, split = run_ranks(2, calls, tmp_path / "on-2")
    assert told(2) == 2, "by rank 0, of the two that found another split"
    assert {table: len(state) for table, state in whole.items()} == TABLE_ROWS
    assert unsplit == whole
    assert copied == {table: state * 2 for table, state in whole.items()}

    halves = {table: (state[: TABLE_ROWS[table]], state[TABLE_ROWS[table] :]) for table, state in split.items()}
    assert {table: len(second) for table, (_, second) in halves.items()} == TABLE_ROWS
    assert all(first != second for first, second in halves.values()), "trained apart, so that a mean is neither"
    means = {table: [(a + b) / 2 for a, b in zip(*pair, strict=True)] for table, pair in halves.items()}
    table_wise, column_wise = run_ranks(1, [states("table_wise"), states("column_wise")], tmp_path / "on-1")
    assert table_wise == {table: pytest.approx(mean, rel=1e-6) for table, mean in means.items()}
    assert column_wise == split
    assert told(1) == 1

    calls = [states("row_wise"), states("data_parallel"), states("table_column_wise"), states("grid_shard"), train("data_parallel")]
    row_wise, data_parallel, *alike, resumed = run_ranks(3, calls, tmp_path / "on-3")
    assert row_wise == data_parallel == table_wise
    assert alike == [split, split]
    assert f"after step 9 of {NUM_STEPS}" in resumed["message"]
    assert told(3) == 3
    assert [record["step"] for record in _records(out)] == list(range(1, 10))


def test_a_run_in_column_shards_is_evaluated_under_another_split(data: Path, tmp_path: Path) -> None:
    """Weights alone are loaded then, so nothing is converted, or told."""
    out, other = tmp_path / "run", tmp_path / "row_wise"
    call = {"data": str(data), "out": str(out), "overrides": [*SETTINGS, IN_TWO_SHARDS, _under("column_wise")]}
    run_ranks(2, [("tests.training_calls:train_run", call)], tmp_path / "on-2")
    shutil.copytree(out, other)
    config = json.loads((other / "config.json").read_text())
    config["training"]["sharding"] = {"*": "row_wise"}
    (other / "config.json").write_text(json.dumps(config))
    evaluates = [("tests.training_calls:evaluate_run", {"run": str(run), "data": str(data), "split": "validation"}) for run in (out, other)]
    column_wise, row_wise = run_ranks(1, evaluates, tmp_path / "on-1")
    metrics = column_wise["metrics"]
    assert len(metrics) > 5
    assert row_wise["metrics"] == pytest.approx(metrics, abs=1e-6)
    assert "otherwise than this plan" not in (tmp_path / "on-1" / "stderr").read_text()


@pytest.mark.parametrize(
    ("columns", "before", "shares"),
    [
        ((0, 12), [(0, 4), (4, 4), (8, 4)], {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}),
        ((4, 4), [(0, 12)], {0: 1.0}),
        ((0, 6), [(0, 4), (4, 4), (8, 4)], {0: 4 / 6, 1: 2 / 6}),
        ((6, 6), [(0, 4), (4, 4), (8, 4)], {1: 2 / 6, 2: 4 / 6}),
    ],
)
def test_a_shard_takes_from_others_by_the_columns_they_share(columns: tuple[int, int], before: Any, shares: dict[int, float]) -> None:
    """Splits that no plan of this package makes today are weighed too."""
    assert _shares(columns, before) == pytest.approx(shares)
    assert sum(shares.values()) == pytest.approx(1)


def test_half_the_bytes_between_ranks_teach_nearly_the_same(data: Path, tmp_path: Path) -> None:
    """Under plans that send by all-to-all and by reduce-scatter; the losses move, so it is at work, and hardly.

    Tables that every rank holds send nothing that they pool, and their gradients whole.
    """
    calls: list[tuple[str, dict[str, Any]]] = []
    for plan in ("table_wise", "row_wise", "data_parallel"):
        for sends in ("full", "half"):
            overrides = [f"training.sharding={{'*': {plan}}}", f"training.communication={sends}"]
            calls.append(
                ("tests.training_calls:train_run", {"data": str(data), "out": str(tmp_path / f"{plan}-{sends}"), "overrides": overrides})
            )
    results = [result["last_metrics"] for result in run_ranks(2, calls, tmp_path / "ranks")]
    assert results[4]["loss_ctr"] == results[5]["loss_ctr"]
    for full, half in (results[:2], results[2:4]):
        assert half["loss_ctr"] != full["loss_ctr"]
        assert half["loss_ctr"] == pytest.approx(full["loss_ctr"], abs=1e-4)
