"""Plans and initial weights: what is asked for is planned, and no plan changes a weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from escm2rec.errors import ConfigError, RunError
from escm2rec.models.embeddings import PooledEmbeddings
from escm2rec.schema import Feature
from escm2rec.sharding.initialise import _fill, initialise_tables
from escm2rec.sharding.planner import ALL_TYPES, plan_as_json, plan_tables, refuse_empty_shards, warn_of_uncut_columns

STD = 0.5
MEMORY = 2**30


def tables(rows: int = 1_000) -> list[Feature]:
    kinds = [("user", "categorical"), ("tags", "list"), ("history", "weighted_list")]
    return [Feature(name=name, kind=kind, column=name, encoding="hash", num_embeddings=rows) for name, kind in kinds]


def model(rows: int = 1_000, device: str = "meta") -> nn.Module:
    return PooledEmbeddings(tables(rows), 128, torch.device(device))


NAMES = [feature.name for feature in tables()]


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_a_forced_kind_is_planned_for_the_tables_that_ask(kind: str) -> None:
    plan = plan_as_json(plan_tables(model(), NAMES, {"tags": kind}, 4, 2, "cpu", MEMORY, 64))["tables"]
    assert {name: table["sharding_type"] for name, table in plan.items()} == {"user": "table_wise", "tags": kind, "history": "table_wise"}
    for name, table in plan.items():
        if table["sharding_type"] == "data_parallel":  # each rank has all of it
            assert (table["compute_kernel"], table["ranks"], table["shards"]) == ("dense", [0, 1, 2, 3], [])
            continue
        covered = sum(rows * columns for rows, columns in (shard["size"] for shard in table["shards"]))
        assert covered == 1_000 * 128, name
        assert all(0 <= shard["rank"] < 4 for shard in table["shards"])


def test_a_star_forces_all_tables_and_a_name_comes_first() -> None:
    plan = plan_as_json(plan_tables(model(), NAMES, {"*": "row_wise", "user": "table_wise"}, 2, 2, "cpu", MEMORY, 64))["tables"]
    assert [plan[name]["sharding_type"] for name in NAMES] == ["table_wise", "row_wise", "row_wise"]


def test_tables_that_fit_nowhere_are_told() -> None:
    with pytest.raises(
        RunError, match=r"fits 2 rank\(s\) of 1\.0 GiB each: the weights of the tables alone take 143,051\.1 GiB\nhint: use more ranks"
    ):
        plan_tables(model(rows=10**11), NAMES, {}, 2, 2, "cpu", MEMORY, 64)


def test_a_table_that_every_rank_holds_must_fit_on_each_with_its_gradients() -> None:
    """Tables of 0.5 GiB each: three by three on two ranks of 2 GiB, which have room for one of them three times, and not for two."""
    fits = plan_as_json(plan_tables(model(10**6), NAMES, {"tags": "data_parallel"}, 2, 2, "cpu", 2 * MEMORY, 64))["tables"]
    assert fits["tags"]["ranks"] == [0, 1]
    with pytest.raises(
        RunError, match=r"tables alone take 1\.4 GiB, 1\.0 of them on every rank, with twice as much for gradients \(data_parallel\)\nhint"
    ):
        plan_tables(model(10**6), NAMES, {"tags": "data_parallel", "user": "data_parallel"}, 2, 2, "cpu", 2 * MEMORY, 64)


def test_a_rank_that_would_hold_no_row_is_told() -> None:
    plans = [plan_as_json(plan_tables(model(rows=5), NAMES, {"tags": "row_wise"}, ranks, ranks, "cpu", MEMORY, 64)) for ranks in (3, 4)]
    refuse_empty_shards(plans[0]["tables"])  # 2, 2 and 1
    with pytest.raises(
        ConfigError, match="row_wise cuts the 5 rows of table 'tags' over 4 ranks and leaves rank 3 none, which cannot be"
    ) as told:
        refuse_empty_shards(plans[1]["tables"])
    assert str(told.value.hint).startswith("name another type for it, such as {tags: table_wise}")


def test_columns_that_are_to_be_split_and_are_not_are_told(caplog: pytest.LogCaptureFixture) -> None:
    wide = PooledEmbeddings(tables(), 256, torch.device("meta"))
    for split, said in ((wide, False), (model(), True)):
        caplog.clear()
        forced = {"tags": "column_wise", "user": "grid_shard", "history": "row_wise"}
        warn_of_uncut_columns(plan_as_json(plan_tables(split, NAMES, forced, 4, 2, "cpu", MEMORY, 64))["tables"])
        told = (
            "training.sharding: column_wise, grid_shard keeps all columns of tags, user together: TorchRec makes no piece of less than 128"
        )
        assert (told in caplog.text) is said


def test_a_shard_holds_its_part_of_the_table() -> None:
    whole = torch.empty(1_000, 128)
    _fill(whole, "user", 0, 0, seed=3, std=STD, dim=128)
    for first_row, first_column, rows, columns in [(0, 0, 500, 128), (500, 0, 500, 128), (0, 64, 1_000, 64), (250, 32, 10, 32)]:
        shard = torch.empty(rows, columns)
        _fill(shard, "user", first_row, first_column, seed=3, std=STD, dim=128)
        assert torch.equal(shard, whole[first_row : first_row + rows, first_column : first_column + columns])


def test_initial_weights_are_uniform_and_their_own_in_every_table_and_seed() -> None:
    filled: dict[tuple[int, str], torch.Tensor] = {}
    for seed in (0, 1):
        unsharded = model(device="cpu")
        initialise_tables(unsharded, seed, STD)
        filled |= {(seed, name): weight for name, weight in unsharded.state_dict().items()}
    assert len(filled) == 6
    for weight in filled.values():
        assert abs(float(weight.mean())) < 0.01
        assert float(weight.std()) == pytest.approx(STD, rel=0.01)
        assert float(weight.abs().max()) == pytest.approx(STD * 3**0.5, rel=0.01)
    stacked = torch.stack([weight.flatten() for weight in filled.values()])
    correlations = torch.corrcoef(stacked) - torch.eye(6)
    assert float(correlations.abs().max()) < 0.02
