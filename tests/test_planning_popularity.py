"""Which rows are looked up how often: what a vocabulary says of it, and what follows for shards of rows and for caches."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import Perf, Shard, ShardingOption

from escm2rec.errors import ConfigError
from escm2rec.planning.cluster import parse_cluster
from escm2rec.planning.enumerator import BY_ROWS
from escm2rec.planning.options import perf_of, storage_of
from escm2rec.planning.planner import KERNELS, PlannerName, Request, find_plan, search_space
from escm2rec.planning.popularity import Lookups, Popularity, popularity_of_vocabulary, shares_of_rows
from escm2rec.planning.record import record_of, request_of
from escm2rec.planning.tables import Table, Tables, constraints_of, read_tables
from escm2rec.sharding.planner import ALL_TYPES, RowWiseSharder

HEAD = ((10_000, 0.9), (1_000_000, 1.0))
"""A hundredth of the rows has nine tenths of the lookups."""


def vocabulary(folder: Path, counts: list[int]) -> Path:
    path = folder / "vocabulary.parquet"
    pq.write_table(pa.table({"value": list(range(len(counts))), "count": counts}), path)
    return path


def test_a_vocabularys_counts_say_which_rows_are_looked_up(tmp_path: Path) -> None:
    """Against the counts themselves, for every block of rows: off by what rows between two points differ in."""
    counts = np.maximum(1, 100_000 / np.arange(1, 5_001)).astype(np.int64)
    popularity = popularity_of_vocabulary(vocabulary(tmp_path, counts.tolist()), 5_004, 4, 0.2)
    every = np.concatenate([np.full(4, 0.05), counts * 0.8 / counts.sum()])
    blocks = 0
    for size in (1, 7, 100, 1_251):
        bounds = np.minimum(np.arange(0, 5_004 + size, size), 5_004)
        expected = np.add.reduceat(every, bounds[:-1])
        assert np.abs(shares_of_rows(popularity, bounds) - expected).max() < 0.002
        blocks += len(expected)
    assert blocks > 5_000
    assert popularity[-1] == (5_004, 1.0)
    Table(name="its", rows=5_004, dimension=4, popularity=popularity)


@pytest.mark.parametrize(("counts", "rows"), [([], 1), ([3], 2), ([3, 1], 3)])
def test_the_smallest_vocabularies(counts: list[int], rows: int, tmp_path: Path) -> None:
    popularity = popularity_of_vocabulary(vocabulary(tmp_path, counts), rows, 1, 0.25)
    assert popularity == {0: (), 1: ((1, 0.25), (2, 1.0)), 2: ((1, 0.25), (2, 0.8125), (3, 1.0))}[len(counts)]
    Table(name="its", rows=rows, dimension=4, popularity=popularity)


def test_distinct_rows_and_misses_of_a_batch_are_those_of_drawn_ones() -> None:
    """Two hundred batches; the cache holds the fifth of the rows that are looked up most, which here are not the first."""
    popularity: Popularity = ((500, 0.05), (600, 0.7), (1_000, 1.0))
    probability = np.repeat([0.05 / 500, 0.65 / 100, 0.3 / 400], [500, 100, 400])
    draw = np.random.default_rng(0)
    lookups, distinct, missed = Lookups(popularity, 800), [], []
    held = np.argsort(-probability, kind="stable")[:200]
    for _ in range(200):
        rows = np.unique(draw.choice(1_000, 800, p=probability))
        distinct.append(len(rows))
        missed.append(len(np.setdiff1d(rows, held)))
    assert lookups.expected_lookups == pytest.approx(np.mean(distinct), rel=0.01)
    assert lookups.expected_miss_rate(0.2) == pytest.approx(np.sum(missed) / np.sum(distinct), rel=0.02)
    assert (lookups.expected_miss_rate(0), lookups.expected_miss_rate(1)) == (1, 0)
    assert lookups.cacheability < Lookups(((1_000, 1.0),), 800).cacheability == pytest.approx(0.5)


def options_of(table: Table, cluster: str, kernels: list[str] | None = None) -> dict[tuple[str, str], ShardingOption]:
    request = Request([table], parse_cluster(cluster), 1_024, allowed={"*": list(ALL_TYPES)}, kernels=kernels)
    return {(option.sharding_type, option.compute_kernel): option for option in search_space(request)}


@pytest.mark.parametrize("factor", [20.0, 1.0, 0.3])
def test_a_block_of_rows_is_priced_by_the_ids_that_it_is_asked_for(factor: float) -> None:
    """As much is sent back as ever; lookups are, where ids are not fewer than impressions, as TorchRec prices so much longer lists; all
    blocks together cost what those of rows looked up alike do; other ways stay."""
    cluster, blocks, longer = "2x4:h100-80gb", 0, 0
    table = Table(name="item", rows=1_000_000, dimension=128, pooling_factor=factor, popularity=HEAD)
    alike = options_of(table.model_copy(update={"popularity": ()}), cluster, ["fused", "dense"])
    for (kind, kernel), option in options_of(table, cluster, ["fused", "dense"]).items():
        same = alike[kind, kernel].shards
        if kind not in BY_ROWS:
            assert [shard.perf for shard in option.shards] == [shard.perf for shard in same]
            continue
        number = {"row_wise": 8}.get(kind, 4)
        for shard, equal in zip(option.shards, same, strict=True):
            (share,) = shares_of_rows(HEAD, np.array([shard.offset[0], shard.offset[0] + shard.size[0]]))
            ours, theirs = of(shard), of(equal)
            assert (ours.fwd_comms, ours.bwd_comms) == pytest.approx((theirs.fwd_comms, theirs.bwd_comms))
            if factor * share * number >= 1 and factor >= 1:
                lists = table.model_copy(update={"popularity": (), "pooling_factor": factor * share * number})
                expected = next(each for each in torchrecs(lists, cluster)[kind, kernel] if each.size == shard.size)
                assert (ours.fwd_compute, ours.bwd_compute) == pytest.approx((of(expected).fwd_compute, of(expected).bwd_compute), rel=1e-3)
                assert storage_of(shard)[0] == pytest.approx(storage_of(expected)[0], rel=1e-3)
                longer += 1
            blocks += 1
        assert sum(map(perf_of, option.shards)) == pytest.approx(sum(map(perf_of, same)), rel=1e-3)
        assert of(option.shards[0]).fwd_compute > 1.5 * of(option.shards[1]).fwd_compute
    assert (blocks, longer > 0) == (8 + 4 + 4, factor >= 1)


def of(shard: Shard) -> Perf:
    assert isinstance(shard.perf, Perf)
    return shard.perf


def torchrecs(table: Table, cluster: str) -> dict[tuple[str, str], list[Shard]]:
    asked = parse_cluster(cluster)
    constraints = {table.name: constraints_of(table, list(ALL_TYPES), KERNELS["cuda"], 8_192)}
    space = EmbeddingEnumerator(asked.topology(), 1_024, constraints).enumerate(Tables([table], "rowwise_adagrad"), [RowWiseSharder()])
    return {(option.sharding_type, option.compute_kernel): option.shards for option in space}


def test_a_table_with_a_few_rows_for_most_lookups_is_not_cut_by_rows() -> None:
    """Its lookups would be one rank's. Looked up alike it is cut so."""
    table = Table(name="item", rows=1_000_000, dimension=256, pooling_factor=200)
    request = Request([table], parse_cluster("1x8:a100-40gb"), 4_096, allowed={"*": ["row_wise", "column_wise"]})
    popular = replace(request, tables=[table.model_copy(update={"popularity": HEAD})])
    kinds = []
    for asked in (request, popular):
        planned = find_plan(asked)
        assert planned.chosen is not None
        kinds.append([option.sharding_type for option in planned.chosen])
        assert request_of(record_of(planned)).tables == asked.tables
    assert kinds == [["row_wise"], ["column_wise"]]


@pytest.mark.parametrize("planner", get_args(PlannerName))
def test_planners_of_torchrec_are_told_too(planner: PlannerName) -> None:
    tables = [Table(name="item", rows=1_000_000, dimension=64, popularity=HEAD)]
    prices = [
        [
            shard.perf
            for option in search_space(Request(tables, parse_cluster("1x8:a100-40gb"), 64, planner=each))
            for shard in option.shards
        ]
        for each in (get_args(PlannerName)[0], planner)
    ]
    assert prices[0] == prices[1]


def test_a_cache_is_filled_by_the_rows_that_it_does_not_hold() -> None:
    """Of a table in the host's memory the estimate has the misses: more where rows are looked up alike."""
    cached = [
        options_of(Table(name="item", rows=1_000_000, dimension=64, pooling_factor=20, popularity=popularity), "1x2:a100-40gb")
        for popularity in (HEAD, ((1_000_000, 1.0),), ())
    ]
    few, many, unknown = (of(options["table_wise", "fused_uvm_caching"].shards[0]).prefetch_compute for options in cached)
    lookups = Lookups(HEAD, 2_048 * 20)
    misses = lookups.expected_lookups * lookups.expected_miss_rate(0.2)
    rate = parse_cluster("1x2:a100-40gb").hardware.host_link_gb_per_s * 1e6
    assert few == pytest.approx(misses * 64 * 4 / rate)
    assert 0 == unknown < few < many
    for popularity in (HEAD, ((1_000, 0.2), (250_000, 0.6), (1_000_000, 1.0))):
        table = Table(name="item", rows=1_000_000, dimension=64, pooling_factor=20, popularity=popularity)
        shards = options_of(table, "1x4:a100-40gb")["row_wise", "fused_uvm_caching"].shards
        lookups, found = Lookups(popularity, 4_096 * 20), []
        for shard in shards:
            block = lookups.of_rows(shard.offset[0], shard.offset[0] + shard.size[0])
            assert block is not None
            found.append(block.expected_lookups * block.expected_miss_rate(0.2))
        assert [of(shard).prefetch_compute for shard in shards] == pytest.approx([each * 64 * 4 / rate for each in found])
    assert lookups.of_rows(0, 1_000_000).expected_lookups == pytest.approx(lookups.expected_lookups)  # type: ignore[union-attr]
    assert Lookups(((10, 0.0), (20, 1.0)), 5).of_rows(0, 10) is None


def test_tables_of_popular_rows_are_planned_no_worse_than_by_torchrec() -> None:
    """Many alike, so that the first block of each, cut by rows, would lie on the first rank of a host."""
    zipf = np.cumsum(1 / np.arange(1, 1_000_001))
    places = [*np.unique(np.geomspace(1, 999_999, 40).astype(np.int64)).tolist(), 1_000_000]
    popularity = tuple((place, float(zipf[place - 1] / zipf[-1])) for place in places)
    for pooling in (1, 20):
        tables = [Table(name=f"t{i}", rows=1_000_000, dimension=128, pooling_factor=pooling, popularity=popularity) for i in range(26)]
        request = Request(tables, parse_cluster("2x8:h100-80gb"), 4_096)
        ours, theirs = (record_of(find_plan(replace(request, planner=planner)))["estimate"] for planner in get_args(PlannerName)[:2])
        assert ours["step_ms"] <= 1.01 * theirs["step_ms"]


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ("[[10, 0.5]]", "its last point is of all 100 rows and of share 1, and is [10, 0.5]"),
        ("[[10, 0.5], [100, 0.9]]", "its last point is of all 100 rows and of share 1, and is [100, 0.9]"),
        ("[[10, 0.5], [10, 1.0]]", "rows and shares of its points rise, shares to 1 at the most; [10, 1.0] follows [10, 0.5]"),
        ("[[10, 0.5], [100, 0.4]]", "rows and shares of its points rise, shares to 1 at the most; [100, 0.4] follows [10, 0.5]"),
        ("[[100, 1.5]]", "rows and shares of its points rise, shares to 1 at the most; [100, 1.5] follows [0, 0.0]"),
        ("[[0, 0.0], [100, 1.0]]", "rows and shares of its points rise, shares to 1 at the most; [0, 0.0] follows [0, 0.0]"),
    ],
)
def test_points_that_are_none_are_refused(points: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "tables.yaml"
    path.write_text(f"- {{name: item, rows: 100, dimension: 4, popularity: {points}}}\n")
    with pytest.raises(ConfigError, match=re.escape(f"('item'): popularity: {said}")) as refused:
        read_tables(path)
    assert "popularity where rows are not looked up alike" in str(refused.value.hint)
