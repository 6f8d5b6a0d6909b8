"""The hardware entry of the ranks that there are, and what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from torchrec.distributed.planner.constants import DP_ELEMENTWISE_KERNELS_PERF_FACTOR
from torchrec.distributed.planner.types import Perf, ShardingOption

from escm2rec.planning.cluster import parse_cluster
from escm2rec.planning.hardware import Hardware, hardware_table
from escm2rec.planning.planner import Request, find_plan, search_space
from escm2rec.planning.tables import Table
from tests.ranks import run_ranks

CALL = "tests.training_calls:calibrate_small"


def test_two_ranks_are_measured_and_planned_for(tmp_path: Path) -> None:
    """What two ranks take is between a memory's and a modem's; the file is an entry, and is not replaced unasked."""
    out = tmp_path / "here.yaml"
    calls: list[tuple[str, dict[str, Any]]] = [
        (CALL, {"out": str(out)}),
        (CALL, {"out": str(out)}),
        (CALL, {"out": str(tmp_path / "no" / "x")}),
    ]
    told, again, nowhere = run_ranks(2, calls, tmp_path / "ranks")
    entry = hardware_table(out)["here"]
    assert told == {"hardware": str(out), "name": "here", **entry.model_dump(mode="json")}
    assert (entry.device, entry.memory_gib, entry.price_per_hour) == ("cpu", 0, None)
    for rate in (entry.host_memory_gb_per_s, entry.intra_node_gb_per_s, entry.whole_tables_gb_per_s):
        assert rate is not None
        assert 1e-3 < rate < 1e3
    assert 0.1 < entry.backward_multiplier < 100
    assert [source.split(":")[0].rsplit(",", 1)[0] for source in entry.sources] == [
        "measured on 1 node(s) of 2 rank(s)",
        "host_link_gb_per_s is not measured",
        "inter_node_gb_per_s is of one node",
    ]
    assert (again["error"], again["message"]) == (
        "ConfigError",
        f"--out {out} exists\nhint: add --overwrite to replace a file, or choose another",
    )
    assert nowhere["message"].startswith(f"no folder {tmp_path / 'no'} for the entry\nhint: make it first")
    assert find_plan(Request([Table(name="t", rows=1_000, dimension=64)], parse_cluster("1x2:here", out), 64)).chosen is not None


def test_of_one_rank_what_is_between_ranks_is_said_to_be_unknown(tmp_path: Path) -> None:
    (told,) = run_ranks(1, [(CALL, {"out": str(tmp_path / "here.yaml")})], tmp_path / "ranks")
    entry = Hardware.model_validate(yaml.safe_load((tmp_path / "here.yaml").read_text())["here"])
    assert entry.whole_tables_gb_per_s == told["whole_tables_gb_per_s"]
    assert entry.inter_node_gb_per_s == entry.intra_node_gb_per_s
    assert any(source.startswith("intra_node_gb_per_s and inter_node_gb_per_s are not measured") for source in entry.sources)


@pytest.mark.parametrize("cluster", ["1x1", "1x2", "2x2", "4x2"])
def test_whole_tables_are_stepped_at_the_measured_rate_and_summed_as_ever(cluster: str) -> None:
    """TorchRec's own sum is that and nine passes at half the rate of lookups; all else stays, and the network counts."""
    table, size = Table(name="t", rows=20_000, dimension=128, pooling_factor=2), 20_000 * 128 * 4
    theirs, ours, slow = (
        {option.sharding_type: perf_of(option) for option in search_space(Request([table], parse_cluster(each), 512))}
        for each in (
            f"{cluster}:cpu-epyc-7763",
            f"{cluster}:cpu-epyc-7763,whole_tables_gb_per_s=0.5",
            f"{cluster}:cpu-epyc-7763,whole_tables_gb_per_s=0.5,inter_node_gb_per_s=0.01",
        )
    )
    passes = size * DP_ELEMENTWISE_KERNELS_PERF_FACTOR / (0.5 * 409.6e6 / int(cluster[-1]))
    reduced = theirs["data_parallel"].bwd_comms - passes if cluster != "1x1" else 0.0
    assert ours["data_parallel"].bwd_comms == pytest.approx(reduced + size / 0.5e6)
    assert ours.pop("data_parallel").fwd_compute == theirs.pop("data_parallel").fwd_compute
    assert ours == theirs
    if cluster != "1x1":
        assert slow["data_parallel"].bwd_comms > 50 * reduced


def perf_of(option: ShardingOption) -> Perf:
    perf = option.shards[0].perf
    assert isinstance(perf, Perf)
    return perf
