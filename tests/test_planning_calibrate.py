"""The hardware entry of the ranks that there are, and what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from torchrec.distributed.planner.types import Perf

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
    assert entry.inter_node_gb_per_s == entry.intra_node_gb_per_s
    assert [source.split(":")[0].rsplit(",", 1)[0] for source in entry.sources] == [
        "measured on 1 node(s) of 2 rank(s)",
        "host_link_gb_per_s is not measured",
        "inter_node_gb_per_s is not measured",
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
    assert entry.whole_tables_gb_per_s is None
    assert "whole_tables_gb_per_s" in told
    assert any(source.startswith("intra_node_gb_per_s is not measured") for source in entry.sources)


@pytest.mark.parametrize("rate", [None, 0.5])
def test_whole_tables_cost_what_was_measured(rate: float | None) -> None:
    """By their size over the rate, where there is one; all else is TorchRec's."""
    cluster = "1x2:cpu-epyc-7763" + ("" if rate is None else f",whole_tables_gb_per_s={rate}")
    table = Table(name="t", rows=20_000, dimension=128, pooling_factor=2)
    found = {
        known: {option.sharding_type: option.shards[0].perf for option in search_space(Request([table], parse_cluster(each), 512))}
        for known, each in {"torchrec": "1x2:cpu-epyc-7763", "ours": cluster}.items()
    }
    ours, torchrecs = found["ours"].pop("data_parallel"), found["torchrec"].pop("data_parallel")
    assert found["ours"] == found["torchrec"]
    assert isinstance(ours, Perf)
    assert isinstance(torchrecs, Perf)
    assert ours.bwd_comms == pytest.approx(torchrecs.bwd_comms if rate is None else 20_000 * 128 * 4 / (rate * 1e6))
    assert (ours.fwd_compute, ours.bwd_compute, ours.fwd_comms) == (torchrecs.fwd_compute, torchrecs.bwd_compute, torchrecs.fwd_comms)
