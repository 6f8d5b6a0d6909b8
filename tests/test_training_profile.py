"""Where the time of a step goes: parts that add up, of a trace made by hand and of trainings on real ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from escm2rec.errors import ConfigError
from escm2rec.training.profile import PARTS, RECORDED, WARM_UP, parts_of, summary_of, table_of
from escm2rec.training.train import train
from tests.encoded import config, write_dataset
from tests.ranks import run_ranks

SLOWER_MS = 60.0
PROFILED = "tests.training_calls:train_profiled"


def _event(name: str, start_ms: float, ms: float, thread: int = 1, cat: str = "user_annotation") -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": 1e3 * start_ms, "dur": 1e3 * ms, "tid": thread, "cat": cat}


def test_each_moment_belongs_to_the_innermost_range_that_has_a_part() -> None:
    events = [
        _event("ProfilerStep#10", 0, 100),
        _event("## copy_batch_to_gpu 12 ##", 5, 10),
        _event("## next_batch ##", 6, 7),
        _event("## forward 10 ##", 20, 30),
        _event("[lookup]_[model.embeddings.collection]_[table_wise]", 21, 4),
        _event("## compute:mcc ##", 26, 3),
        _event("## EmbeddingBagCollectionAwaitable wait() ##", 30, 10),  # 2 of them in an operator, 6 of the others beside a collective
        _event("aten::cat", 31, 2, cat="cpu_op"),
        _event("gloo:all_to_all", 29, 8, thread=2),
        _event("gloo:all_to_all", 36, 3, thread=3),
        _event("c10d::allreduce_", 45, 3, cat="cpu_op"),
        _event("## backward 10 ##", 50, 20),
        _event("autograd::engine::evaluate_function: MmBackward0", 50, 15, cat="cpu_op"),
        _event("gloo:all_reduce", 60, 8, thread=2),  # 3 of it when nothing else runs any more
        _event("## optimizer 10 ##", 70, 10),
        _event("ProfilerStep#11", 100, 20),
        _event("## next_batch ##", 100, 20),
        _event("aten::cat", 130, 50, cat="cpu_op"),  # after the steps
        {"ph": "M", "name": "process_name"},
    ]
    found = {
        "read": 7 + 20,
        "copy": 3,
        "sparse": 4 + 3 + 2 + 1,
        "dense": 30 - 4 - 3 - 10 - 3,
        "backward": 17,
        "optimizer": 10,
        "wait": 7 + 3 + 3,
    }
    found |= {"other": 20 + 5 + 5, "total": 120, "kernels": 0}
    assert parts_of(events) == pytest.approx({part: ms / 2 for part, ms in found.items()})


def test_the_table_tells_the_rank_that_takes_most() -> None:
    ranks = [
        {**dict.fromkeys(PARTS, 1.0), "total": 8.0, "kernels": 0.0},
        {**dict.fromkeys(PARTS, 1.0), "wait": 3.0, "total": 10.0, "kernels": 0.0},
    ]
    lines = table_of(summary_of(ranks) | {"steps": 20, "rows_per_s": 12_345.6, "unprofiled_ms": 7.5}).splitlines()
    assert lines[0] == "milliseconds a step, of 20 steps on 2 rank(s), 12,346 rows/s, 7.50 ms a step before it was profiled"
    told = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert list(told) == [*PARTS, "total"]
    assert told["wait"] == ["2.00", "22%", "1.00", "3.00", "1"]
    assert told["total"] == ["9.00", "100%", "8.00", "10.00", "1"]


def _profile(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "profile" / "profile.json").read_text())
    return found


def test_the_parts_of_a_training_add_up_and_a_slower_reader_is_seen(tmp_path: Path) -> None:
    steps = WARM_UP + RECORDED + 2
    data = write_dataset(tmp_path / "data", {"train": steps * 128})
    call = {"data": str(data), "overrides": ["objective.kind=escm2-ips", "training.global_batch_size=128"]}
    runs = [tmp_path / "run", tmp_path / "slow"]
    calls = [(PROFILED, {**call, "out": str(out), "slower_s": slower / 1e3}) for out, slower in zip(runs, (0.0, SLOWER_MS), strict=True)]
    results = run_ranks(2, calls, tmp_path / "ranks")
    assert [result.get("steps") for result in results] == [steps, steps], results
    for run, result in zip(runs, results, strict=True):
        found = _profile(run)
        assert (found["steps"], found["world_size"]) == (RECORDED, 2)
        ms = found["ms_a_step"]
        assert sum(ms[part]["median"] for part in PARTS) == pytest.approx(ms["total"]["median"], rel=0.02)
        for part in PARTS:
            assert 0 <= ms[part]["least"] <= ms[part]["median"] <= ms[part]["most"] <= ms["total"]["most"]
        assert all(ms[part]["least"] > 0 for part in ("sparse", "dense", "backward", "optimizer", "wait"))
        assert 0 < RECORDED * ms["total"]["most"] < 1e3 * result["seconds"]
        assert 0 < RECORDED * 128 / found["rows_per_s"] < result["seconds"]
        for rank in (0, 1):
            with gzip.open(run / "profile" / f"trace-rank-{rank}.json.gz", "rt") as file:
                names = [event["name"] for event in json.load(file)["traceEvents"]]
            assert sum(name.startswith("ProfilerStep#") for name in names) >= RECORDED
    fast, slow = (_profile(run)["ms_a_step"]["read"]["least"] for run in runs)
    assert slow > 0.9 * SLOWER_MS > fast


def test_a_training_of_few_steps_is_profiled_by_those_it_has(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": 5 * 128})
    call = {"data": str(data), "out": str(tmp_path / "run"), "overrides": ["training.global_batch_size=128"]}
    once = {**call, "out": str(tmp_path / "once"), "overrides": ["training.global_batch_size=640"]}
    results = run_ranks(1, [(PROFILED, call), (PROFILED, once)], tmp_path / "ranks")
    assert [result.get("steps") for result in results] == [5, 1], results
    assert [_profile(tmp_path / name)["steps"] for name in ("run", "once")] == [3, 1]
    assert _profile(tmp_path / "once")["unprofiled_ms"] is None


def test_a_profile_of_several_trainings_is_refused(tmp_path: Path) -> None:
    asked = config("choice.objectives=[{kind: naive}]")
    with pytest.raises(ConfigError, match=r"--profile is of one training, and choice\.objectives asks for several") as error:
        train(asked, tmp_path / "data", tmp_path / "run", profile=True)
    assert error.value.hint == "set choice.objectives to [] beside it"
