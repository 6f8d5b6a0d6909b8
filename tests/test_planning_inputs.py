"""What plans are made from: clusters, hardware, tables, types and kernels; and what is said of those that are wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from benchmarks.table_sets import criteo_multi_hot, power_law
from escm2rec.errors import ConfigError
from escm2rec.planning.cluster import Cluster, parse_cluster
from escm2rec.planning.hardware import Hardware, hardware_table
from escm2rec.planning.tables import read_tables
from escm2rec.planning.verbs import allowed_kernels, allowed_types

ASKED_FOR = ("a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb", "b200-180gb", "l4-24gb", "l40s-48gb", "t4-16gb")


def test_every_figure_of_the_table_has_a_source() -> None:
    table = hardware_table()
    assert set(ASKED_FOR) <= table.keys()
    assert sum(entry.device == "cpu" for entry in table.values()) >= 2
    for name, entry in table.items():
        assert any("https://" in source for source in entry.sources), name
        assert entry.memory_gib == (int(re.findall(r"-(\d+)gb", name)[0]) if entry.device == "cuda" else 0), name
        assert entry.intra_node_gb_per_s >= entry.inter_node_gb_per_s or entry.device == "cpu", name


def test_a_cluster_is_read_and_told() -> None:
    cluster = parse_cluster("2x8:h100-80gb,inter_node_gb_per_s=25,price_per_hour=2.5")
    assert (cluster.nodes, cluster.ranks_per_node, cluster.world_size, cluster.name) == (
        2,
        8,
        16,
        "2x8:h100-80gb,inter_node_gb_per_s=25,price_per_hour=2.5",
    )
    assert (cluster.hardware.inter_node_gb_per_s, cluster.hardware.price_per_hour) == (25, 2.5)
    assert cluster.device_bytes == 80 * 2**30
    topology = cluster.topology()
    assert (topology.world_size, topology.local_world_size, topology.compute_device) == (16, 8, "cuda")
    assert topology.inter_host_bw == 25e9 / 1e3  # bytes a millisecond
    assert topology.hbm_mem_bw == cluster.hardware.memory_gb_per_s * 1e6
    assert {device.storage.hbm for device in topology.devices} == {80 * 2**30}
    assert {device.storage.ddr for device in topology.devices} == {cluster.host_bytes}
    told = Cluster.from_json(cluster.as_json())
    assert told.as_json() == cluster.as_json()
    assert (told.device_bytes, told.host_bytes, told.world_size) == (cluster.device_bytes, cluster.host_bytes, 16)
    assert parse_cluster("4:t4-16gb").world_size == 4


def test_ranks_on_cores_share_their_host() -> None:
    one, four = (parse_cluster(f"1x{ranks}:cpu-epyc-7763") for ranks in (1, 4))
    assert four.device_bytes == one.device_bytes // 4
    assert four.topology().ddr_mem_bw == one.topology().ddr_mem_bw / 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("eight gpus", "--cluster 'eight gpus' is no cluster"),
        ("2x8", "--cluster '2x8' is no cluster"),
        ("0x8:h100-80gb", "has 0 ranks"),
        ("9999x99:h100-80gb", "has 989,901 ranks"),
        ("2x8:h100", "no hardware 'h100'; the nearest are h100-80gb"),
        ("2x8:zzz", "no hardware 'zzz'"),
        ("2x8:h100-80gb,memory=3", "'memory=3' overrides nothing; did you mean"),
        ("2x8:h100-80gb,device=cpu", "'device=cpu' overrides nothing"),
        ("2x8:h100-80gb,memory_gib=much", "memory_gib=much: Input should be a valid number"),
        ("2x8:h100-80gb,intra_node_gb_per_s=0", "intra_node_gb_per_s=0: Input should be greater than 0"),
        ("2x8:h100-80gb,memory_gib=nan", "memory_gib=nan"),
    ],
)
def test_no_cluster(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_cluster(text)


def test_hardware_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    fields = {"host_memory_gib": 100, "host_memory_gb_per_s": 50, "intra_node_gb_per_s": 2, "inter_node_gb_per_s": 1}
    path.write_text(
        yaml.safe_dump(
            {"laptop": {"device": "cpu", **fields}, "t4-16gb": {"device": "cuda", "memory_gib": 15, "memory_gb_per_s": 300, **fields}}
        )
    )
    assert parse_cluster("1x2:laptop", path).hardware.host_memory_gib == 100
    assert parse_cluster("1x2:t4-16gb", path).hardware.memory_gib == 15  # before the built-in one
    assert parse_cluster("1x2:h100-80gb", path).hardware.memory_gib == 80


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("- a\n- b\n", "holds no entries by name"),
        ("a: [", "cannot be read"),
        ("a: {device: tpu}", "entry 'a': device: Input should be 'cuda' or 'cpu'"),
        ("a: 3", "entry 'a': the entry: Input should be a valid dictionary"),
        (
            "a: {device: cuda, host_memory_gib: 1, host_memory_gb_per_s: 1, intra_node_gb_per_s: 1, inter_node_gb_per_s: 1}",
            "a GPU needs memory_gib and memory_gb_per_s",
        ),
    ],
)
def test_no_hardware(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        hardware_table(path)


def test_tables_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "tables.yaml"
    weighted = "{name: item, rows: 5, dimension: 8, pooling_factor: 2.5, weighted: true, dtype: bf16}"
    path.write_text(f"- {{name: user, rows: 1000, dimension: 64}}\n- {weighted}\n")
    user, item = read_tables(path)
    assert (user.pooling_factor, user.features, user.weighted, user.dtype, user.weight_bytes) == (1, 1, False, "fp32", 256_000)
    assert (item.pooling_factor, item.weighted, item.row_bytes) == (2.5, True, 16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("", "holds no list of tables"),
        ("user: {rows: 3}", "holds no list of tables"),
        ("- {name: a, rows: 0, dimension: 8}", "table 1 ('a'): rows: Input should be greater than 0, and is 0"),
        ("- {name: a, rows: 3, dimension: 6}", "table 1 ('a'): dimension: Input should be a multiple of 4, and is 6"),
        ("- {name: a, rows: 3, dimension: 8}\n- {name: b, dimension: 8}", "table 2 ('b'): rows: Field required"),
        ("- {name: a, rows: 3, dimension: 8, dtype: fp8}", "dtype: Input should be 'fp32', 'fp16' or 'bf16', and is 'fp8'"),
        ("- {name: a, rows: 3, dimension: 8, rank: 1}", "rank is no field of a table"),
        ("- {name: a, rows: 3, dimension: 8, pooling_factor: .nan}", "pooling_factor"),
        ("- {name: a, rows: 3, dimension: 8}\n- {name: a, rows: 3, dimension: 8}", "tables 1 and 2 are both named 'a'"),
        ("- 7", "table 1: it: Input should be a valid dictionary"),
    ],
)
def test_no_tables(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "tables.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_tables(path)


def test_types_and_kernels() -> None:
    assert allowed_types(["table_wise,row_wise", "user=column_wise"], {"user"}) == {
        "*": ["table_wise", "row_wise"],
        "user": ["column_wise"],
    }
    assert allowed_kernels([], "cuda") is None
    assert allowed_kernels(["fused,fused_uvm"], "cuda") == ["fused", "fused_uvm"]
    with pytest.raises(ConfigError, match=re.escape("--types 'usr=row_wise': there is no table 'usr'; did you mean 'user'?")):
        allowed_types(["usr=row_wise"], {"user"})
    with pytest.raises(ConfigError, match=re.escape("'rowwise' is no sharding type; did you mean 'row_wise'?")):
        allowed_types(["rowwise"])
    with pytest.raises(ConfigError, match=re.escape("'fused_uvm' is no kernel of device cpu")):
        allowed_kernels(["fused_uvm"], "cpu")


def test_table_sets_are_of_their_kind() -> None:
    criteo = criteo_multi_hot()
    assert (len(criteo), sum(table.pooling_factor for table in criteo)) == (26, 214)
    assert 90 < sum(table.weight_bytes for table in criteo) / 2**30 < 110
    assert power_law(200, 7) == power_law(200, 7) != power_law(200, 8)
    rows = sorted(table.rows for table in power_law(1_000, 0))
    assert rows[0] >= 30_000
    assert rows[-1] <= 500_000_000
    assert sum(rows[-100:]) > 0.7 * sum(rows)  # a tenth of the tables has most rows


def test_fields_that_may_be_overridden_are_numbers() -> None:
    assert "device" not in Hardware.numbers()
    assert "memory_gib" in Hardware.numbers()
