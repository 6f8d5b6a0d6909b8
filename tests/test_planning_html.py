"""The page of plans: complete, offline, escaped, to scale, and small whatever the plan."""

from __future__ import annotations

import copy
import re
import time
from html import escape, unescape
from pathlib import Path
from typing import NamedTuple

import pytest

from escm2rec.planning.cluster import Cluster, parse_cluster
from escm2rec.planning.html import (
    FILLS,
    MAX_TABLES_SHOWN,
    RIGHT,
    WIDTH,
    Block,
    _merged,
    _table_blocks,
    _ticks,
    write_plans,
)
from escm2rec.planning.planner import PlannerName, Request, find_plan
from escm2rec.planning.record import MEMORY, TIMES, Record, cost_of, record_of
from escm2rec.planning.tables import Table
from escm2rec.planning.text import ranges
from tests.test_evaluation_html import Page

ODD = '<b>&"it\'s"'
TABLES = [
    Table(name=ODD, rows=3_000_000, dimension=64),
    Table(name="history", rows=2_000_000, dimension=64, pooling_factor=30, dtype="fp16"),
    Table(name="wide", rows=200_000, dimension=512),
    Table(name="tiny", rows=1000, dimension=16, weighted=True),
    *(Table(name=f"scene-{i}", rows=400_000 * i, dimension=32, pooling_factor=i) for i in range(1, 5)),
]
ALLOWED = {"wide": ["column_wise"], "tiny": ["data_parallel"], "history": ["row_wise"]}
ON_DEVICE = ["fused", "dense"]
WHOLE = {"weights", "optimizer"}


class Drawn(NamedTuple):
    """A block of a chart."""

    kind: str
    x: float
    y: float
    width: float
    says: str


def page_of(records: list[Record], folder: Path, prices: dict[str, float] | None = None) -> tuple[Page, str]:
    write_plans(records, folder / "plan.html", prices)
    assert [path.name for path in folder.iterdir()] == ["plan.html"]
    text = (folder / "plan.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.outside == []
    assert "script" not in page.tags
    assert re.findall(r"https?://|@import|url\((?!#)", text) == []
    return page, text


def charts(text: str) -> list[list[Drawn]]:
    """Blocks of each chart."""
    form = r'<rect class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="[\d.]+"><title>(.*?)</title>'
    return [
        [Drawn(kind, float(x), float(y), float(width), says) for kind, x, y, width, says in re.findall(form, part)]
        for part in text.split('<svg class="chart"')[1:]
    ]


def bars(blocks: list[Drawn]) -> list[list[Drawn]]:
    """Blocks of a chart by bar, from above."""
    return [[block for block in blocks if block.y == y] for y in sorted({block.y for block in blocks})]


def plan(cluster: str, kernels: list[str], planner: PlannerName = "priced") -> Record:
    request = Request(TABLES, parse_cluster(cluster), 4096, planner=planner, allowed=ALLOWED, kernels=kernels, dense_bytes=10**8)
    return record_of(find_plan(request))


@pytest.fixture(scope="module")
def tight() -> Record:
    """All tables in the host's memory with a cache on the GPU, but for tiny, which every GPU has: no other kernel is allowed."""
    return plan("2x2:h100-80gb,memory_gib=1,host_memory_gib=6,price_per_hour=3", ["fused_uvm_caching", "dense"])


@pytest.fixture(scope="module")
def roomy() -> Record:
    """All tables on the GPUs."""
    return plan("1x2:h100-80gb,memory_gib=8", ON_DEVICE)


@pytest.fixture(scope="module")
def cores() -> Record:
    return plan("1x2:cpu-epyc-7763", ON_DEVICE)


def test_one_plan_is_one_page_of_all_that_it_holds(tight: Record, tmp_path: Path) -> None:
    page, text = page_of([tight], tmp_path)
    assert page.headings == [
        "Sharding plan for 2x2:h100-80gb,memory_gib=1,host_memory_gib=6,price_per_hour=3",
        "Memory of the ranks",
        "The ranks' shares of the host's memory",
        "Time by rank",
        "Tables",
        "What the words mean",
    ]
    assert ODD not in text
    device, host, ms = charts(text)
    said = [block.says for block in device + host]
    for table in TABLES:
        assert f'<th scope="row" class="text">{escape(table.name)}</th>' in text
        assert any(says.startswith(f"{escape(table.name)}, ") for says in said), table.name
    assert {block.kind for block in ms} <= set(TIMES)
    assert text.count(">rank 3</text>") == 3
    estimate = tight["estimate"]
    above = f"{100 * (estimate['step_ms'] / estimate['bound_ms'] - 1):.1f}%"
    assert re.search(rf"<dt>above the lower bound</dt><dd>{above} .bound ", text)
    assert re.search(rf"<dt>slowest rank</dt><dd>rank {estimate['worst_rank']}, ", text)


def test_bars_are_to_scale_and_add_up_to_what_is_told(tight: Record, roomy: Record, cores: Record, tmp_path: Path) -> None:
    for name in ("tight", "roomy", "cores"):
        (tmp_path / name).mkdir()
    device, host, ms = charts(page_of([tight], tmp_path / "tight")[1])
    on_device, _ = charts(page_of([roomy], tmp_path / "roomy")[1])
    on_cores, _ = charts(page_of([cores], tmp_path / "cores")[1])
    pixels = WIDTH - device[0].x - RIGHT
    drawings = ((device, tight, "bytes"), (host, tight, "host_bytes"), (on_device, roomy, "bytes"), (on_cores, cores, "host_bytes"))
    for drawn, record, place in drawings:
        cluster = Cluster.from_json(record["cluster"])
        capacity = cluster.device_bytes if place == "bytes" else cluster.host_bytes
        taken = [sum(rank[place].values()) for rank in record["ranks"]]
        end = max(taken) if record is cores else capacity  # of which cores have so much more that the axis ends before
        assert 0 < max(taken) <= capacity
        for blocks, size in zip(bars(drawn), filter(None, taken), strict=True):
            assert sum(block.width for block in blocks) == pytest.approx(size / end * pixels, abs=0.2)
            ends = [block.x + block.width for block in blocks]
            assert [block.x for block in blocks[1:]] == pytest.approx(ends[:-1], abs=0.02)
        for rank, of_tables in enumerate(_table_blocks(record, place, range(record["world_size"]))):
            assert sum(block.size for block in of_tables) == sum(record["ranks"][rank][place][part] for part in WHOLE)
    times = [sum(rank["ms"].values()) for rank in tight["ranks"]]
    widths = [sum(block.width for block in blocks) for blocks in bars(ms)]
    assert widths == pytest.approx([each / max(times) * pixels for each in times], abs=0.1)


def test_cores_have_one_map_whose_axis_says_where_it_ends(cores: Record, tmp_path: Path) -> None:
    page, text = page_of([cores], tmp_path)
    assert page.headings[1:3] == ["The ranks' shares of the host's memory", "Time by rank"]
    assert "The axis ends at the fullest rank: the capacity is " in text
    assert "capacity " not in text.split('<svg class="chart"')[1]


def test_states_of_column_shards_are_told_where_there_are_any(tight: Record, tmp_path: Path) -> None:
    assert len(tight["tables"]["wide"]["shards"]) > 1
    others = copy.deepcopy(tight)
    others["optimizer"] = "sgd"
    whole = copy.deepcopy(tight)
    del whole["tables"]["wide"]
    for number, (record, told) in enumerate(((tight, True), (others, False), (whole, False))):
        (tmp_path / str(number)).mkdir()
        assert ("one state for each row of each column shard" in page_of([record], tmp_path / str(number))[1]) == told


def test_the_cost_is_of_the_own_price_or_of_the_one_given(tight: Record, cores: Record, tmp_path: Path) -> None:
    priced = tight["estimate"]["step_ms"] / 3.6e6 * 3 * 4 / (4096 * 4) * 1e6
    assert cost_of(tight, {}) == pytest.approx(priced)
    assert cost_of(tight, {"h100-80gb": 6.0}) == pytest.approx(2 * priced)
    assert cost_of(cores, {"h100-80gb": 7.0}) is None
    assert cost_of(cores, {"cpu-epyc-7763": 0.5}) == pytest.approx(cores["estimate"]["step_ms"] / 3.6e6 * 0.5 / 4096 * 1e6)
    text = page_of([cores], tmp_path)[1]
    assert "Price of a rank" not in text
    assert "Price of a rank" in page_of([cores], tmp_path, {"cpu-epyc-7763": 0.5})[1]


def test_several_plans_are_compared_and_each_unfolds(tight: Record, cores: Record, tmp_path: Path) -> None:
    named = {**plan("1x2:cpu-epyc-7763", ON_DEVICE, "greedy"), "name": ODD}
    page, text = page_of([tight, cores, named], tmp_path)
    assert page.headings == ["Sharding plans", "Comparison", "Each plan", "What the words mean"]
    rows = re.findall(r"<tr><th[^>]*>(.*?)</th>(.*?)</tr>", text.split("</table>")[0].split("<tbody>")[1])
    assert [unescape(name) for name, _ in rows] == [
        "2x2:h100-80gb,memory_gib=1,host_memory_gib=6,price_per_hour=3, batch 4,096, priced",
        "1x2:cpu-epyc-7763, batch 4,096, priced",
        ODD,
    ]
    cells = [re.sub(r'<span class="pad".*?</span>|<.*?>', " ", row).split() for _, row in rows]
    assert [row[0] for row in cells] == ["4", "2", "2"]
    assert [row[-1] == "–" for row in cells] == [False, True, True]  # without a price no cost
    assert f"{100 * tight['estimate']['fullest_share']:.1f}%" in cells[0]
    assert text.count("<details>") == 3
    compared, *drawn = charts(text)
    assert len(bars(compared)) == 3
    assert len(drawn) == 3 + 2 + 2


def test_a_thousand_tables_on_128_ranks_stay_small(tmp_path: Path) -> None:
    record = large()
    began = time.perf_counter()
    page, text = page_of([record], tmp_path)
    assert time.perf_counter() - began < 5
    assert len(text.encode()) < 3 * 2**20
    device, ms = charts(text)
    fullest = sorted(range(128), key=lambda rank: -sum(record["ranks"][rank]["bytes"].values()))
    shown = [int(rank) for rank in re.findall(r">rank (\d+)</text>", text.split('<svg class="chart"')[1])]
    assert shown == [*fullest[:16], *fullest[-16:]]
    assert len(bars(device)) == len(bars(ms)) == 32
    assert "Above the 16 fullest of 128 ranks, below the 16 emptiest" in text
    assert max(len(blocks) for blocks in bars(device)) > 100
    for blocks, rank in zip(bars(device), shown, strict=True):
        (merged,) = (block for block in blocks if block.kind == "smaller")
        held = sum(rank in table["ranks"] for table in record["tables"].values())
        assert merged.says.startswith(f"{held - len(blocks) + 1 + 2} smaller, ")  # two blocks are of no table
    assert f"The {MAX_TABLES_SHOWN} that take longest; 940 more, with " in text
    assert page.headings[-2:] == ["Tables", "What the words mean"]


def large() -> Record:
    """A plan such as `record_of` makes: tables cut over all ranks, over four, and whole ones."""
    cluster = parse_cluster("16x8:h100-80gb")
    tables: dict[str, Record] = {}
    ranks: list[Record] = [
        {"rank": rank, **{name: dict.fromkeys(parts, 0) for name, parts in (("ms", TIMES), ("bytes", MEMORY), ("host_bytes", MEMORY))}}
        for rank in range(128)
    ]
    for number in range(1000):
        shares = 128 if number < 400 else 4 if number < 600 else 1
        kind = {128: "row_wise", 4: "column_wise", 1: "table_wise"}[shares]
        rows, dimension = (128 * (600_000 if number < 200 else 1000), 128) if shares == 128 else (50_000 * (number % 9 + 1), 512)
        size = [rows // 128, dimension] if shares == 128 else [rows, dimension // shares]
        shards = [
            {"offset": [0, 0] if shares == 1 else [size[0] * i, 0] if shares == 128 else [0, size[1] * i], "size": size, "rank": rank}
            for i, rank in enumerate(range(128) if shares == 128 else [(number * 7 + i) % 128 for i in range(shares)])
        ]
        table = Table(name=f"a_table_of_a_name_as_long_as_many_have_{number}", rows=rows, dimension=dimension)
        tables[table.name] = {
            **table.model_dump(mode="json", exclude={"name"}),
            "sharding_type": kind,
            "compute_kernel": "fused",
            "ranks": [shard["rank"] for shard in shards],
            "shards": shards,
            "ms": 0.01 * shares,
            "longest_ms": 0.01,
            "bytes": table.weight_bytes,
            "host_bytes": 0,
        }
        for rank in tables[table.name]["ranks"]:
            ranks[rank]["ms"]["lookup"] += 0.01
            ranks[rank]["bytes"]["weights"] += size[0] * size[1] * 4
    for each in ranks:
        each["bytes"] |= {"activations": 10**9, "reserved": 12 * 2**30}
    return {
        "kind": "plan",
        "version": 1,
        "world_size": 128,
        "cluster": cluster.as_json(),
        "batch_size": 4096,
        "optimizer": "sgd",
        "dense_bytes": 0,
        "planner": "priced",
        "allowed": {},
        "kernels": None,
        "estimate": {
            "step_ms": 10.0,
            "mean_ms": 8.0,
            "bound_ms": 7.0,
            "imbalance": 1.25,
            "worst_rank": 0,
            "limited_by": "lookup",
            "fullest_rank": 0,
            "fullest_share": 0.9,
            "capacity_bytes": cluster.device_bytes,
        },
        "ranks": ranks,
        "tables": tables,
        "seconds": 30.0,
    }


def test_small_blocks_are_merged_and_none_alone() -> None:
    blocks = [Block(name, size, "table_wise", name) for name, size in (("a", 9.0), ("b", 1.0), ("c", 5.0), ("d", 0.5))]
    assert _merged(blocks, 0.1, 4) == blocks
    assert _merged(blocks, 1.0, 4) == blocks  # one of one is no smaller block
    *kept, others = _merged(blocks, 2.0, 4)
    assert (kept, others.label, others.size, others.kind) == ([blocks[0], blocks[2]], "2 smaller", 1.5, "smaller")
    *kept, others = _merged(blocks, 0.1, 1)
    assert (kept, others.label, others.size) == ([blocks[0]], "3 smaller", 6.5)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([3], "3"),
        ([7, 0, 1, 2, 3, 4, 5, 6, 9, 9], "0-7, 9"),
        (range(128), "0-127"),
        (range(0, 16, 2), "0, 2, 4, … (8 ranks)"),
    ],
)
def test_ranks_are_said_in_short(ranks: list[int], said: str) -> None:
    assert ranges(ranks) == said


@pytest.mark.parametrize("end", [1e-4, 0.7, 1.0, 9.99, 80.0, 3000.0])
def test_axes_have_a_few_round_numbers(end: float) -> None:
    ticks = _ticks(end)
    assert ticks[0] == 0
    assert 0.7 * end < ticks[-1] <= end * (1 + 1e-9)
    assert 4 <= len(ticks) <= 8
    assert f"{ticks[1]:.0e}"[0] in "125"


def test_every_part_and_type_has_a_colour(tight: Record) -> None:
    assert {*TIMES, *MEMORY[2:], *(each["sharding_type"] for each in tight["tables"].values())} <= set(FILLS)
