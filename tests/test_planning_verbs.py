"""`escm2rec plan` on the command line: what it plans from, writes, prints and refuses, and the verbs that read what it wrote."""

from __future__ import annotations

import io
import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from escm2rec import cli
from escm2rec.config import parse_config
from escm2rec.planning.cluster import Cluster
from escm2rec.planning.plan import make_plan
from escm2rec.planning.popularity import shares_of_rows
from escm2rec.planning.record import MEMORY, PLAN_VERSION, TIMES, Record, read_plan, request_of
from escm2rec.preprocess import preprocess
from tests.raw_tables import CONFIG, raw_table

TABLES: list[dict[str, Any]] = [  # not by name, in which order plan.json has them
    {"name": "user", "rows": 3_000_000, "dimension": 64},
    {"name": "history", "rows": 2_000_000, "dimension": 64, "pooling_factor": 30, "features": 2},
    {"name": "tags", "rows": 200_000, "dimension": 128, "pooling_factor": 4, "weighted": True, "dtype": "fp16"},
    {"name": "scene", "rows": 1_000, "dimension": 16},
]
NAMES = ["history", "scene", "tags", "user"]
GPUS, CORES = "1x2:h100-80gb", "1x2:cpu-epyc-7763"
GIB = 2**30


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def result(self) -> Record:
        """What stdout has, which is one JSON object and nothing else."""
        assert self.code == 0, self.err
        found: Record = json.loads(self.out)
        return found


def plan(*argv: str | Path) -> Done:
    """Run `escm2rec plan` in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as left:
        cli.main(["plan", *map(str, argv)])
    return Done(int(left.value.code or 0), out.getvalue(), err.getvalue())


def refused(said: str, hint: str, *argv: str | Path, code: int = 2) -> None:
    done = plan(*argv)
    assert (done.code, done.out) == (code, ""), done.err
    message, _, rest = done.err.partition("\nhint: ")
    assert message.startswith("error: ")
    assert said in message
    assert hint in rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planned")


@pytest.fixture(scope="module")
def tables(folder: Path) -> Path:
    path = folder / "tables.yaml"
    path.write_text(yaml.safe_dump(TABLES))
    return path


@pytest.fixture(scope="module")
def gpus(folder: Path, tables: Path) -> tuple[Path, Done]:
    """A plan's folder, and what was said."""
    return folder / "gpus", plan("--tables", tables, "--cluster", GPUS, "--out", folder / "gpus")


@pytest.fixture(scope="module")
def cores(folder: Path, tables: Path) -> Path:
    assert plan("--tables", tables, "--cluster", f"{CORES},price_per_hour=0.5", "--types", "row_wise", "--out", folder / "cores").code == 0
    return folder / "cores"


def is_complete(record: Record) -> None:
    """Memory by part within the capacity, times that add up, and every table whole."""
    cluster, estimate, ranks = Cluster.from_json(record["cluster"]), record["estimate"], record["ranks"]
    assert [rank["rank"] for rank in ranks] == list(range(record["world_size"]))
    taken, hosts = ([sum(rank[place].values()) for rank in ranks] for place in ("bytes", "host_bytes"))
    own = hosts if cluster.hardware.device == "cpu" else taken
    assert all(set(rank[place]) == set(MEMORY) and min(rank[place].values()) >= 0 for rank in ranks for place in ("bytes", "host_bytes"))
    assert 0 < max(own) <= estimate["capacity_bytes"] == cluster.device_bytes
    assert max(hosts) <= cluster.host_bytes
    assert own[estimate["fullest_rank"]] == max(own)
    assert estimate["fullest_share"] == pytest.approx(max(own) / cluster.device_bytes)
    ms = [sum(rank["ms"].values()) for rank in ranks]
    assert ms[estimate["worst_rank"]] == pytest.approx(max(ms)) == pytest.approx(estimate["step_ms"])
    assert sum(ms) / len(ms) == pytest.approx(estimate["mean_ms"])
    assert sum(ms) == pytest.approx(sum(table["ms"] for table in record["tables"].values()))
    assert estimate["bound_ms"] <= estimate["step_ms"] * (1 + 1e-9)
    assert estimate["limited_by"] in TIMES
    for name, table in record["tables"].items():
        assert table["ranks"] == [shard["rank"] for shard in table["shards"]]
        copies = record["world_size"] if table["sharding_type"] == "data_parallel" else 1
        assert sum(rows * columns for rows, columns in (shard["size"] for shard in table["shards"])) == (
            copies * table["rows"] * table["dimension"]
        ), name


# --- of a list of tables ------------------------------------------------------------------------


def test_a_plan_is_written_whole_and_told(gpus: tuple[Path, Done]) -> None:
    out, done = gpus
    record = read_plan(out)
    is_complete(record)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "plan.html", "plan.json"]
    assert "<h1>Sharding plan for 1x2:h100-80gb</h1>" in (out / "plan.html").read_text()
    assert (record["world_size"], record["batch_size"], record["planner"], list(record["tables"])) == (2, 4096, "priced", NAMES)
    for told in TABLES:
        assert {key: record["tables"][told["name"]][key] for key in told if key != "name"} == {
            key: value for key, value in told.items() if key != "name"
        }
    result = done.result
    assert result["plan"] == str(out / "plan.json")
    assert result["estimate"] == record["estimate"]
    assert {name: table["ms"] for name, table in result["tables"].items()} == {name: record["tables"][name]["ms"] for name in NAMES}
    assert re.search(r"^history +\w+ +\w+ +0-1 +2,000,000 +64 +30 ", done.err, re.MULTILINE)
    assert f"The slowest rank, {record['estimate']['worst_rank']}, takes {record['estimate']['step_ms']:.3f} ms a step" in done.err


def test_what_a_plan_was_made_from_gives_it_again(gpus: tuple[Path, Done]) -> None:
    record = read_plan(gpus[0] / "plan.json")
    again = make_plan(request_of(record))
    assert again["tables"] == record["tables"]
    assert again["estimate"]["step_ms"] == pytest.approx(record["estimate"]["step_ms"])  # added up in another order of the tables
    for key in record.keys() - {"estimate", "ranks", "seconds"}:
        assert again[key] == record[key], key


def test_options_reach_the_request(tables: Path, tmp_path: Path) -> None:
    options = ["--types", "row_wise", "--types", "scene=data_parallel", "--kernels", "fused_uvm_caching,dense", "--batch-size", "512"]
    done = plan("--tables", tables, "--cluster", GPUS, *options, "--optimizer", "adam", "--planner", "greedy", "--out", tmp_path / "plan")
    record = read_plan(tmp_path / "plan")
    is_complete(record)
    assert (record["batch_size"], record["optimizer"], record["planner"]) == (512, "adam", "greedy")
    ways = {name: (table["sharding_type"], table["compute_kernel"]) for name, table in done.result["tables"].items()}
    assert ways == {name: ("row_wise", "fused_uvm_caching") for name in NAMES} | {"scene": ("data_parallel", "dense")}
    assert all(rank["host_bytes"]["weights"] > rank["bytes"]["weights"] and rank["bytes"]["cache"] > 0 for rank in record["ranks"])


def test_a_plan_is_replaced_only_when_asked(tables: Path, tmp_path: Path) -> None:
    argv: list[str | Path] = ["--tables", tables, "--cluster", CORES, "--out", tmp_path / "plan"]
    assert plan(*argv).code == 0
    before = (tmp_path / "plan" / "plan.json").read_bytes()
    refused("plan exists", "--overwrite", *argv, "--batch-size", "64")
    assert (tmp_path / "plan" / "plan.json").read_bytes() == before
    assert plan(*argv, "--batch-size", "64", "--overwrite").code == 0
    assert read_plan(tmp_path / "plan")["batch_size"] == 64


def test_without_out_nothing_is_written(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plan("--tables", tables, "--cluster", CORES).result["plan"] is None
    assert list(tmp_path.iterdir()) == []


# --- of a config and its data set ---------------------------------------------------------------


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    """With a managed table and a forced type."""
    user, *others = CONFIG["data"]["features"]
    tree = {**CONFIG, "data": {**CONFIG["data"], "features": [{**user, "managed_size": 400}, *others]}}
    tree["training"] = {**CONFIG["training"], "sharding": {"tags": "data_parallel"}, "sparse_optimizer": "sgd"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def data(folder: Path, config: Path) -> Path:
    (folder / "logs").mkdir()
    pq.write_table(raw_table(2_000, 1, labels=True), folder / "logs" / "a.parquet")
    preprocess(parse_config(yaml.safe_load(config.read_text())).data, folder / "logs", folder / "data")
    return folder / "data"


def test_a_config_is_planned_as_its_data_was_measured(config: Path, data: Path, tmp_path: Path) -> None:
    done = plan("--config", config, "--data", data, "--cluster", CORES, "--set", "model.embedding_dim=16", "--out", tmp_path / "plan")
    record = read_plan(tmp_path / "plan")
    is_complete(record)
    manifest, schema = (json.loads((data / f"{name}.json").read_text()) for name in ("manifest", "schema"))
    rows = {feature["name"]: feature["num_embeddings"] for feature in schema["features"] if feature.get("num_embeddings")}
    assert done.result["tables"].keys() == {"user", "shop", "tags", "history"} == rows.keys()
    for name, table in record["tables"].items():
        assert table["pooling_factor"] == manifest["features"][name]["pooling_factor"]
        assert (table["rows"], table["dimension"], table["weighted"]) == (rows[name], 16, name == "history")
    assert record["tables"]["tags"]["pooling_factor"] == pytest.approx(1.5, abs=0.1)  # lists of 0 to 3
    assert record["tables"]["user"]["popularity"] == []  # managed: nothing was counted
    encoded = pq.read_table(data / "train", columns=["shop"])["shop"].drop_null().to_numpy()
    bounds = np.arange(rows["shop"] + 1)
    found = shares_of_rows(tuple(map(tuple, record["tables"]["shop"]["popularity"])), bounds)
    assert found == pytest.approx(np.bincount(encoded, minlength=rows["shop"]) / len(encoded), abs=0.01)
    assert (record["tables"]["user"]["sharding_type"], record["tables"]["tags"]["sharding_type"]) == ("row_wise", "data_parallel")
    assert (record["batch_size"], record["optimizer"]) == (64, "sgd")  # 128 over two ranks
    assert all(rank["host_bytes"]["dense"] == record["dense_bytes"] > 0 for rank in record["ranks"])


def test_types_given_come_after_those_of_the_config(config: Path, data: Path) -> None:
    done = plan("--config", config, "--data", data, "--cluster", CORES, "--types", "table_wise", "--types", "shop=column_wise")
    types = {name: table["sharding_type"] for name, table in done.result["tables"].items()}
    assert types == {"user": "row_wise", "tags": "data_parallel", "history": "table_wise", "shop": "column_wise"}


def test_a_data_set_that_was_not_measured_is_refused(config: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    del manifest["features"]["shop"]["pooling_factor"]
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    said = "the manifest says no pooling factor of feature 'shop'"
    refused(said, "preprocess again", "--config", config, "--data", tmp_path / "data", "--cluster", CORES)


# --- what does not fit --------------------------------------------------------------------------

LARGEST = "the largest weights are user (0.7 GiB), history (0.5 GiB), tags (0.0 GiB)"
LACKS = r"still [\d.,]+ GiB.* short|nothing is short, but no way was found to cut the tables"
TRIED = re.compile(rf"  fits: (.+) \((\d+\.\d\d) ms a step, fullest rank (\d+)%\)|  not enough: (.+) \((?:{LACKS})\)")


def does_not_fit(tables: Path, cluster: str, *options: str) -> tuple[str, dict[str, int], list[str]]:
    """The message; changes that were enough, with how full the fullest rank is, and those that were not."""
    done = plan("--tables", tables, "--cluster", cluster, *options)
    assert (done.code, done.out) == (1, "")
    message, rest = done.err.split("\nhint: each of these was tried alone:\n")
    *lines, last = rest.splitlines()
    assert last.startswith("  not tried: weights in int8")
    matches = [TRIED.fullmatch(line) for line in lines]
    assert all(matches), rest
    found = [match.groups() for match in matches if match]
    assert [each[0] is None for each in found] == sorted(each[0] is None for each in found)  # what helps comes first
    assert all(float(ms) > 0 and 0 < int(share) <= 100 for change, ms, share, _ in found if change)
    return message, {change: int(share) for change, _, share, _ in found if change}, [change for *_, change in found if change]


def test_short_of_all_memory(tables: Path) -> None:
    message, enough, short = does_not_fit(tables, f"{CORES},host_memory_gib=1.2")
    assert re.match(
        r"error: no plan fits 1x2:cpu-epyc-7763,host_memory_gib=1\.2: with their optimizer and outputs tables take 1\.3 GiB at the least, ",
        message,
    )
    assert message.endswith(f"0.2 GiB more than all ranks have for them; {LARGEST}")
    assert {"weights in bf16", "half the dimension", "2 times the nodes"} <= enough.keys()
    assert not {change for change in (*enough, *short) if "kernel" in change or "sharding type" in change or "instead of" in change}


def test_what_is_said_to_fit_fits(tables: Path, tmp_path: Path) -> None:
    cluster = "nodes:cpu-epyc-7763,host_memory_gib=1.2"
    _, enough, _ = does_not_fit(tables, cluster.replace("nodes", "1x2"))
    assert plan("--tables", tables, "--cluster", cluster.replace("nodes", "2x2"), "--out", tmp_path / "plan").code == 0
    assert round(100 * read_plan(tmp_path / "plan")["estimate"]["fullest_share"]) == enough["2 times the nodes"]


def test_short_of_the_gpus_memory_alone(tables: Path) -> None:
    options = ["--kernels", "fused", "--types", "row_wise", "--optimizer", "adagrad"]
    message, enough, short = does_not_fit(tables, f"{GPUS},memory_gib=0.4,host_memory_gib=64", *options)
    assert "tables take 2.5 GiB of the GPUs' memory at the least, 1.9 GiB more than all ranks have for them" in message
    assert "any kernel, those in the host's memory too" in enough
    assert "rowwise_adagrad instead of adagrad" in short
    assert "any sharding type for every table" in short


def test_short_of_the_hosts_memory_alone(tables: Path) -> None:
    message, enough, _ = does_not_fit(tables, f"{GPUS},host_memory_gib=0.2", "--kernels", "fused_uvm")
    assert "tables take 1.3 GiB of the hosts' memory at the least, 1.1 GiB more than all ranks have for them" in message
    assert list(enough) == ["any kernel, those in the host's memory too"]


def test_short_of_no_memory_but_of_a_way_to_cut(tables: Path) -> None:
    message, enough, _ = does_not_fit(tables, f"{CORES},host_memory_gib=1.6", "--types", "table_wise", "--types", "user=row_wise")
    assert "tables take 1.3 GiB at the least, and all ranks have 1.5 GiB, but no way was found to cut them" in message
    assert "any sharding type for every table" in enough


def test_a_planner_that_finds_nothing_is_no_proof(tables: Path) -> None:
    """TorchRec's grid search proposes nothing where there is too much to choose from."""
    done = plan("--tables", tables, "--cluster", GPUS, "--planner", "grid")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: planner grid found no plan for 1x2:h100-80gb, though there are some: its search is at fault\nhint: ")
    assert re.search(r"hint: choose another planner; fits: planner priced \(\d+\.\d\d ms a step", done.err)


# --- compare ------------------------------------------------------------------------------------


def test_plans_are_compared(gpus: tuple[Path, Done], cores: Path, tmp_path: Path) -> None:
    first, second, page = gpus[0], cores / "plan.json", tmp_path / "page.html"
    done = plan("compare", first, second, "--html", page, "--price", "h100-80gb=2.5")
    records, result = [read_plan(first), read_plan(second)], done.result
    assert [row["name"] for row in result["plans"]] == [str(first), str(second)]
    assert [row["step_ms"] for row in result["plans"]] == [record["estimate"]["step_ms"] for record in records]
    costs = [price * record["estimate"]["step_ms"] / 3.6e6 / 4096 * 1e6 for price, record in zip((2.5, 0.5), records, strict=True)]
    assert [row["cost_per_million_rows"] for row in result["plans"]] == pytest.approx(costs)
    assert result["fastest"] == str(first)
    assert result["tables_alike"] + len(result["tables_otherwise"]) == len(NAMES)
    assert result["tables_otherwise"].keys() == set(NAMES)  # of other hardware, so of other ms
    assert result["tables_otherwise"]["scene"][str(second)]["sharding_type"] == "row_wise"
    assert "<h1>Sharding plans</h1>" in page.read_text()
    assert "Plans" in done.err
    refused(f"--html {page} exists", "--overwrite", "compare", first, second, "--html", page)
    assert plan("compare", first, second, "--html", page, "--overwrite").code == 0


def test_three_plans_tell_what_moved(tables: Path, cores: Path, folder: Path) -> None:
    fewer, table_wise = folder / "fewer.yaml", folder / "table-wise"
    fewer.write_text(yaml.safe_dump(TABLES[:-1]))
    same = ["--cluster", f"{CORES},price_per_hour=0.5", "--types", "row_wise"]
    assert plan("--tables", fewer, *same, "--out", folder / "fewer").code == 0
    assert plan("--tables", tables, *same, "--types", "tags=table_wise", "--out", table_wise).code == 0
    paths = [str(path) for path in (cores, folder / "fewer", table_wise)]
    done = plan("compare", *paths, "--html", folder / "moved.html")
    result = done.result
    assert (result["tables_alike"], result["tables_otherwise"].keys()) == (2, {"scene", "tags"})
    assert [each and each["sharding_type"] for each in result["tables_otherwise"]["scene"].values()] == ["row_wise", None, "row_wise"]
    assert [result["tables_otherwise"]["tags"][path]["sharding_type"] for path in paths] == ["row_wise", "row_wise", "table_wise"]
    (rank,) = result["tables_otherwise"]["tags"][paths[2]]["ranks"]
    told = re.sub(r"\s+", " ", done.err), (folder / "moved.html").read_text()
    assert all(f"table_wise, fused, rank {rank}: " in each and "Tables that are sharded otherwise" in each for each in told)
    assert "is not there" in told[0]
    assert "All tables are sharded alike." in plan("compare", paths[0], paths[0]).err


def test_a_comparison_needs_two_and_a_place(gpus: tuple[Path, Done], tmp_path: Path) -> None:
    refused("there is nothing to compare", "give two plans or more", "compare", gpus[0])
    page = tmp_path / "none" / "page.html"
    refused(f"no folder {page.parent} for the page", "make it first", "compare", gpus[0], gpus[0], "--html", page)
    refused(f"--html {tmp_path} exists", "another file", "compare", gpus[0], gpus[0], "--html", tmp_path, "--overwrite")


# --- sweep --------------------------------------------------------------------------------------


def test_a_page_takes_the_place_of_a_page_alone(gpus: tuple[Path, Done], cores: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.html"
    notes.write_text("mine")
    refused("it is no page that escm2rec made", "choose another", "compare", gpus[0], cores, "--html", notes, "--overwrite")
    assert notes.read_text() == "mine"


def test_a_plan_that_was_cut_is_refused(gpus: tuple[Path, Done], tmp_path: Path) -> None:
    record = read_plan(gpus[0])
    del record["cluster"], record["kernels"]
    (tmp_path / "plan.json").write_text(json.dumps(record))
    refused("lacks cluster, kernels", "plan again", "explain", "user", "--plan", tmp_path)


def test_a_sweep_plans_every_combination(tables: Path, tmp_path: Path) -> None:
    small = f"{GPUS},memory_gib=0.4"
    sizes = ["--batch-size", "512", "--batch-size", "4096"]
    clusters = ["--cluster", GPUS, "--cluster", small, "--kernels", "fused,dense"]
    options = [*clusters, *sizes, "--planner", "priced", "--planner", "greedy", "--price", "h100-80gb=2"]
    done = plan("sweep", "--tables", tables, *options, "--out", tmp_path / "sweep")
    rows, out = done.result["plans"], tmp_path / "sweep"
    expected = [(c, b, p) for c in (GPUS, small) for b in (512, 4096) for p in ("priced", "greedy")]
    assert [row["name"] for row in rows] == [f"{cluster}, batch {size}, {planner}" for cluster, size, planner in expected]
    assert [row["fits"] for row in rows] == [True] * 4 + [False] * 4
    assert json.loads((out / "sweep.json").read_text()) == rows
    fitting = [row for row in rows if row["fits"]]
    assert [row["plan"] for row in fitting] == [f"plans/{number:03}.json" for number in range(1, 5)]
    plans = sorted((out / "plans").iterdir())
    assert [path.name for path in plans] == ["001.json", "002.json", "003.json", "004.json"]
    for row, path in zip(fitting, plans, strict=True):
        record = read_plan(path)
        is_complete(record)
        assert (record["name"], record["planner"], record["batch_size"]) == (row["name"], row["planner"], row["batch_size"])
        assert row["cost_per_million_rows"] == pytest.approx(2 * record["estimate"]["step_ms"] / 3.6e6 / row["batch_size"] * 1e6)
    assert done.err.count("does not fit") == 4
    page = (out / "sweep.html").read_text()
    for row in rows:
        if row["fits"]:
            assert row["impressions_per_s"] == pytest.approx(row["ranks"] * row["batch_size"] / row["step_ms"] * 1e3)
            assert f"{row['impressions_per_s'] / 1e6:,.4g}" in done.err
        else:
            assert re.search(r"found no plan for|no plan fits", row["why"])
            assert f"{row['name']}: {row['why']}" in done.err
            assert f"<li><b>{row['name']}</b>: {escape(row['why'])}</li>" in page
    refused("no plan at", f"a sweep has its plans in {out / 'plans'}", "explain", "scene", "--plan", out)
    nothing = plan("sweep", "--tables", tables, "--cluster", small, "--kernels", "fused,dense", "--out", tmp_path / "nothing")
    assert (nothing.code, nothing.out) == (1, "")
    assert "error: none of 1 plans fits\nhint: escm2rec plan with one of these" in nothing.err
    assert (out / "sweep.html").read_text().count("<details>") == 4
    assert plan("explain", "scene", "--plan", plans[-1]).result["table"] == "scene"
    refused("sweep exists", "--overwrite", "sweep", "--tables", tables, "--cluster", GPUS, "--out", out)


def test_a_sweep_divides_a_configs_batch_by_the_ranks_of_each_cluster(config: Path, data: Path, tmp_path: Path) -> None:
    clusters = ["--cluster", GPUS, "--cluster", "2x4:h100-80gb"]
    done = plan(
        "sweep", "--config", config, "--data", data, *clusters, "--set", "training.global_batch_size=640", "--out", tmp_path / "sweep"
    )
    assert [row["batch_size"] for row in done.result["plans"]] == [320, 80]


def test_a_sweep_varies_dimensions_and_types(tables: Path, tmp_path: Path) -> None:
    options = ["--dimension", "32", "--dimension", "64", "--types", "row_wise", "--types", "table_wise,column_wise"]
    plan("sweep", "--tables", tables, "--cluster", CORES, *options, "--out", tmp_path / "sweep")
    records = [read_plan(path) for path in sorted((tmp_path / "sweep" / "plans").iterdir())]
    assert [record["name"] for record in records] == [
        f"dimension {dimension}, {types}" for dimension in (32, 64) for types in ("row_wise", "table_wise+column_wise")
    ]
    for number, record in enumerate(records):
        assert {table["dimension"] for table in record["tables"].values()} == {(32, 32, 64, 64)[number]}
        assert {table["sharding_type"] for table in record["tables"].values()} <= [{"row_wise"}, {"table_wise", "column_wise"}][number % 2]


# --- explain, hardware --------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["history", "scene"])
def test_every_option_of_a_table_is_explained(gpus: tuple[Path, Done], table: str) -> None:
    out, _ = gpus
    record, done = read_plan(out), plan("explain", table, "--plan", out)
    result, own = done.result, record["tables"][table]
    ways = [(option["sharding_type"], option["compute_kernel"]) for option in result["options"]]
    types = ("table_wise", "column_wise", "table_column_wise", "row_wise", "table_row_wise")
    kernels = ("fused", "fused_uvm", "fused_uvm_caching")
    assert sorted(ways) == sorted([*((kind, kernel) for kind in types for kernel in kernels), ("data_parallel", "dense")])
    chosen, *others = result["options"]
    assert [option["chosen"] for option in others] == [False] * len(others)
    assert (chosen["chosen"], ways[0]) == (True, (own["sharding_type"], own["compute_kernel"]))
    assert chosen["step_ms"] == pytest.approx(record["estimate"]["step_ms"], rel=0.02)
    assert (chosen["total_ms"], chosen["longest_ms"]) == pytest.approx((own["ms"], own["longest_ms"]))
    assert sorted((option["step_ms"] for option in others), key=float) == [option["step_ms"] for option in others]
    lines = done.err.splitlines()
    assert lines[0].split() == ["sharding_type", "compute_kernel", "total_ms", "longest_ms", "step_ms", "why"]
    assert [tuple(line.split()[:2]) for line in lines[1:]] == ways
    assert lines[1].endswith("chosen")
    assert sum("longer; most of the table's time is " in line for line in lines) >= 5


def test_a_plan_that_is_not_the_best_is_told_what_is(tables: Path, tmp_path: Path) -> None:
    """Of TorchRec's search over memory, which leaves the table that takes most of the time on one rank."""
    options: list[str | Path] = ["--planner", "dynamic", "--types", "table_wise,row_wise", "--kernels", "fused", "--out", tmp_path / "plan"]
    assert plan("--tables", tables, "--cluster", GPUS, *options).result["tables"]["history"]["sharding_type"] == "table_wise"
    first, second = plan("explain", "history", "--plan", tmp_path / "plan").result["options"]
    assert (first["sharding_type"], first["why"]) == ("table_wise", "chosen")
    assert second["step_ms"] < first["step_ms"]
    assert re.match(r"the step would be \d+\.\d% shorter; ", second["why"])


def test_an_option_that_does_not_fit_is_said_to(tables: Path, tmp_path: Path) -> None:
    cluster = f"{CORES},host_memory_gib=1.6"
    assert plan("--tables", tables, "--cluster", cluster, "--types", "row_wise", "--out", tmp_path / "plan").code == 0
    record = json.loads((tmp_path / "plan" / "plan.json").read_text())
    record["allowed"] = {"*": ["row_wise"], "user": ["row_wise", "table_wise"]}
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(record))
    options = plan("explain", "user", "--plan", tmp_path / "plan").result["options"]
    assert [(option["sharding_type"], option["why"]) for option in options] == [
        ("row_wise", "chosen"),
        ("table_wise", "does not fit beside the other tables"),
    ]
    assert options[1]["step_ms"] is None


def test_a_table_that_the_plan_has_not(gpus: tuple[Path, Done]) -> None:
    refused("the plan has no table 'histroy'; did you mean 'history'?", "give one of its tables", "explain", "histroy", "--plan", gpus[0])


def test_hardware_is_listed_with_its_sources(tmp_path: Path) -> None:
    built_in = plan("hardware").result
    assert {"h100-80gb", "cpu-epyc-7763"} <= built_in.keys()
    assert built_in["h100-80gb"]["memory_gib"] == 80
    assert all(entry["sources"] for entry in built_in.values())
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"laptop": {**built_in["cpu-epyc-7763"], "host_memory_gib": 16}}))
    listed = plan("hardware", "--hardware", own).result
    assert listed == {**built_in, "laptop": {**built_in["cpu-epyc-7763"], "host_memory_gib": 16}}
    lines = [line.split() for line in plan("hardware").err.splitlines()]
    assert ["t4-16gb", "cuda", "16", "320", "384", "281.6", "16", "16", "1.562", "–"] in lines
    assert [line[0] for line in lines[-len(built_in) :]] == sorted(built_in)


def test_of_a_table_with_popular_rows_it_is_said_what_a_cut_by_rows_means(tmp_path: Path) -> None:
    """Also that a number of fewer rows, which was tried, has no popularity."""
    entry = {"name": "item", "rows": 4_000_000, "dimension": 64, "popularity": [[1_000, 0.8], [4_000_000, 1.0]]}
    (tmp_path / "tables.yaml").write_text(yaml.safe_dump([entry]))
    told = plan("--tables", tmp_path / "tables.yaml", "--cluster", CORES, "--out", tmp_path / "plan")
    assert told.code == 0
    explained = plan("explain", "item", "--plan", tmp_path / "plan")
    assert "popularity" not in explained.result
    (by_rows,) = (each for each in explained.result["options"] if each["sharding_type"] == "row_wise")
    assert by_rows["most_lookups"] == pytest.approx(0.9, abs=0.01)
    assert "one of its 2 shards has 90% of its lookups" in by_rows["why"]
    _, enough, short = does_not_fit(tmp_path / "tables.yaml", f"{CORES},host_memory_gib=0.8")
    assert "hashing the largest table, item, to a quarter of its rows" in enough
    assert "half the batch" in {*enough, *short}


# --- what is refused ----------------------------------------------------------------------------

EITHER = "give either --config and --data, or --tables"
ON_GPUS = ["--tables", "TABLES", "--cluster", GPUS]
REFUSED: list[tuple[list[str], str, str]] = [
    (["--tables", "TABLES"], "escm2rec plan needs --cluster", "escm2rec plan hardware lists what there is"),
    (
        ["--tables", "TABLES", "--cluster", CORES, "--planner", "dynamic"],
        f"--planner dynamic cannot plan for {CORES}",
        "choose another planner for hosts without a GPU",
    ),
    (
        [*ON_GPUS, "--types", "scene=row_wise", "--types", "scene=table_wise"],
        "--types 'scene=table_wise': scene had types before",
        "give the types of a table once",
    ),
    (["--cluster", GPUS], EITHER, "from a data set, or from a list"),
    ([*ON_GPUS, "--config", "CONFIG", "--data", "DATA"], EITHER, "from a data set, or from a list"),
    ([*ON_GPUS, "--data", "DATA"], EITHER, "from a data set, or from a list"),
    (["--config", "CONFIG", "--cluster", GPUS], EITHER, "from a data set, or from a list"),
    ([*ON_GPUS, "--set", "model.embedding_dim=8"], "--set is of a config", "leave it out with --tables"),
    (
        ["--config", "CONFIG", "--data", "DATA", "--cluster", GPUS, "--optimizer", "sgd"],
        "--optimizer is of --tables",
        "--set training.sparse_optimizer=",
    ),
    ([*ON_GPUS, "--planner", "gredy"], "--planner", "escm2rec plan --help"),
    ([*ON_GPUS, "--batch-size", "0"], "--batch-size", "escm2rec plan --help"),
    ([*ON_GPUS, "--types", "usr=row_wise"], "--types 'usr=row_wise': there is no table 'usr'; did you mean 'user'?", "name one"),
    ([*ON_GPUS, "--kernels", "fussed"], "--kernels: 'fussed' is no kernel of device cuda", "they are fused, "),
    (
        [*ON_GPUS, "--kernels", "fused", "--types", "data_parallel"],
        "table 'tags': no sharding type that it may have goes with",
        "allow more",
    ),
    (
        ["--tables", "TABLES", "--cluster", f"{GPUS},memory_gib=0"],
        "memory_gib=0': a GPU needs memory_gib and memory_gb_per_s",
        "write it as",
    ),
    (["--tables", "TABLES", "--cluster", f"{GPUS},memory_gib=inf"], "memory_gib=inf: Input should be a finite number", "write it as"),
    (["sweep", *ON_GPUS, "--out", "OUT", "--planner", "gredy"], "--planner 'gredy' is no planner", "they are priced, torchrec, greedy, "),
    (["sweep", *ON_GPUS, "--out", "OUT", "--price", "h100-80gb"], "--price 'h100-80gb' is no price", "HARDWARE=NUMBER"),
    (["sweep", *ON_GPUS, "--out", "OUT", "--price", "h100-80gb=-1"], "--price 'h100-80gb=-1' is no price", "HARDWARE=NUMBER"),
    (["sweep", *ON_GPUS, "--out", "OUT", "--price", "h100-80gb=nan"], "--price 'h100-80gb=nan' is no price", "HARDWARE=NUMBER"),
    (["sweep", *ON_GPUS, "--out", "OUT", "--price", "=2"], "--price '=2' is no price", "HARDWARE=NUMBER"),
    (
        ["sweep", *ON_GPUS, "--out", "OUT", "--price", "h100-80g=2"],
        "--price 'h100-80g=2': no plan is for 'h100-80g'; did you mean 'h100-80gb'?",
        "they are for h100-80gb",
    ),
    (["sweep", *ON_GPUS, "--out", "OUT", "--dimension", "6"], "--dimension 6 is none that tables can have", "a multiple of 4"),
    (["sweep", *ON_GPUS, "--out", "OUT", "--dimension", "0"], "--dimension 0 is none that tables can have", "a multiple of 4"),
    (["sweep", *ON_GPUS, "--out", "OUT", "--batch-size", "0"], "--batch-size", "escm2rec plan sweep --help"),
    (["sweep", *ON_GPUS, "--out", "OUT", "--types", "user=row_wise"], "--types 'user=row_wise': a sweep's are of all tables", "TYPE,TYPE"),
    (
        ["sweep", *ON_GPUS, "--cluster", CORES, "--out", "OUT", "--kernels", "fused_uvm"],
        "--kernels: 'fused_uvm' is no kernel of device cpu",
        "they are fused, dense",
    ),
]


@pytest.mark.parametrize(("argv", "said", "hint"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_wrong_input_is_told(argv: list[str], said: str, hint: str, tables: Path, tmp_path: Path) -> None:
    places = {"TABLES": tables, "CONFIG": tmp_path / "config.yaml", "DATA": tmp_path / "data", "OUT": tmp_path / "out"}
    refused(said, hint, *(places.get(word, word) for word in argv))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        (None, "no plan at ", "escm2rec plan --out FOLDER writes one"),
        ("{", "is no readable JSON: ", "plan again"),
        ("[]", "holds no plan", "a run's says where its tables lie, not why"),
        ('{"world_size": 2, "tables": {}}', "holds no plan", "a run's says where its tables lie, not why"),
        ('{"kind": "plan"}', "holds no plan", "escm2rec plan wrote"),
        ('{"kind": "plan", "version": "1"}', "holds no plan", "escm2rec plan wrote"),
        (
            json.dumps({"kind": "plan", "version": PLAN_VERSION + 1}),
            f"has layout version {PLAN_VERSION + 1}, this escm2rec reads up to {PLAN_VERSION}",
            "use a newer escm2rec",
        ),
    ],
)
def test_what_is_no_plan_is_refused(text: str | None, said: str, hint: str, gpus: tuple[Path, Done], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    refused(said, hint, "compare", gpus[0], path)
    refused(str(path), hint, "explain", "user", "--plan", path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("sharding_type", None, "no sharding type None with kernel "),
        ("compute_kernel", {}, "with kernel {}"),
        ("ms", float("nan"), "nan where a number was"),
        ("popularity", [[5, 0.5]], "popularity: its last point is of all "),
        ("shards", [{"offset": [0, 0], "size": None, "rank": 0}], "TypeError: "),
        ("shards", [{"offset": [0, 0], "size": [1, 2], "rank": "r"}], "a shard on rank 'r' of 2"),
        ("shards", [{"offset": [0, 0], "size": [1, -2], "rank": 0}], "a shard with offset [0, 0] and size [1, -2]"),
    ],
)
def test_a_damaged_table_of_a_plan_is_told(field: str, value: Any, said: str, gpus: tuple[Path, Done], tmp_path: Path) -> None:
    record = read_plan(gpus[0])
    record["tables"]["scene"][field] = value
    if field == "shards":
        record["tables"]["scene"]["ranks"] = [shard["rank"] for shard in value]
    (tmp_path / "plan.json").write_text(json.dumps(record))
    refused(said, "it was changed after it was written: plan again", "compare", gpus[0], tmp_path, "--html", tmp_path / "page.html")
