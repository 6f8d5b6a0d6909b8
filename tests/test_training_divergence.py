"""Steps whose losses are not finite: what they leave, who is told, and when they end the run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.encoded import write_dataset
from tests.ranks import run_ranks

NUM_STEPS = 12
BAD_STEPS = "tests.training_calls:train_with_bad_steps"
# What a step does depends on nothing but the batches and weights before it, so that one may be left out of the count.
SETTINGS = [
    "objective={kind: escm2-dr, lambda_g: learned, propensity: {warmup_fraction: 0}}",
    "training.ema_decay=0.05",
    "training.learning_rate_decay=none",
    "training.checkpoint_every_steps=5",
    "training.sharding={tags: data_parallel}",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": NUM_STEPS * 256, "validation": 600})


def _call(data: Path, out: Path, bad: list[int], allowed: int, **arguments: Any) -> tuple[str, dict[str, Any]]:
    overrides = [*SETTINGS, f"training.max_skipped_steps={allowed}"]
    return BAD_STEPS, {"data": str(data), "out": str(out), "overrides": overrides, "bad": bad, **arguments}


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _last_state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a finished run's checkpoint: tables, towers, and what both optimizers hold."""
    manifest = json.loads((run / "manifest.json").read_text())
    dcp_to_torch_save(run / manifest["checkpoint"], run / "state.pt")
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}/{key}", inner)

    walk("", torch.load(run / "state.pt", weights_only=False))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_skipped_step_changes_nothing(data: Path, tmp_path: Path, world_size: int) -> None:
    """The first, and two in a row: losses, weights and optimizers are, bit for bit, those of a run that never had them."""
    bad = [1, 8, 9]
    calls = [_call(data, tmp_path / "skipped", bad, 3), _call(data, tmp_path / "gone", bad, 0, gone=True)]
    skipped, gone = run_ranks(world_size, calls, tmp_path / "ranks")
    assert (skipped["steps"], skipped["skipped_steps"]) == (NUM_STEPS, 3), skipped
    assert (gone["steps"], gone["skipped_steps"]) == (NUM_STEPS - 3, 0)
    records = _records(tmp_path / "skipped")
    counted = [(each["step"], each["skipped_steps"]) for each in records]
    assert counted == [*((step, 1) for step in range(2, 8)), (10, 3), (11, 3), (12, 3)], "a skipped step has no record"
    for seen, want in zip(records, _records(tmp_path / "gone"), strict=True):
        told = {name: value for name, value in want.items() if name not in ("step", "epoch", "rows_per_s", "skipped_steps")}
        assert {name: seen[name] for name in told} == told, "rows, propensity and AUCs too"
    state, want_state = _last_state(tmp_path / "skipped"), _last_state(tmp_path / "gone")
    assert state.keys() == want_state.keys()
    for held in ("embedding_bags.user.weight", "momentum", "exp_avg_sq", "ema", "log_variances", "/step"):
        assert any(held in name for name in state), held
    for name, value in want_state.items():
        assert torch.equal(state[name], value), name


def test_the_last_step_is_looked_at_too(data: Path, tmp_path: Path) -> None:
    call = _call(data, tmp_path / "run", [NUM_STEPS], 0)
    (result,) = run_ranks(1, [call], tmp_path / "ranks")
    assert result.get("error") == "RunError", result
    assert result["message"].startswith(
        f"loss_ctr is nan in step {NUM_STEPS}, by predictions of rank 0 that are not finite: training has div"
    )


def test_one_more_than_allowed_ends_the_run_and_a_resumed_one_counts_on(data: Path, tmp_path: Path) -> None:
    bad, out = [3, 8], tmp_path / "run"
    calls = [_call(data, out, bad, 1), _call(data, out, bad, 1, resume=True), _call(data, out, bad, 2, resume=True)]
    first, second, finished, _ = run_ranks(2, [*calls, _call(data, tmp_path / "undisturbed", bad, 2)], tmp_path / "ranks")
    told = (
        r"loss_ctr is nan in step 8, by predictions of rank 1 that are not finite: training has diverged after 1 skipped step\(s\), all "
        rf"that training.max_skipped_steps allows; {re.escape(str(out))}/diverged holds its batches and those of the step before"
    )
    for error in (first, second):
        assert error["error"] == "RunError", error
        assert re.match(told, error["message"]), error["message"]
        assert "training.max_skipped_steps, which may change with --resume, says how many such steps are skipped" in error["hint"]
    assert (finished["steps"], finished["skipped_steps"]) == (NUM_STEPS, 2)
    names = ("loss_ctr", "loss_cvr", "loss_ctcvr", "loss_imputation", "step", "skipped_steps", "rows")
    seen, want = ([[each[name] for name in names] for each in _records(tmp_path / run)] for run in ("run", "undisturbed"))
    assert seen == want
    assert len(seen) == NUM_STEPS - 2
    assert {path.name for path in (out / "diverged").iterdir()} == {f"step-{step}-rank-1.npz" for step in (2, 3, 7, 8)}
    said = (tmp_path / "ranks" / "stderr").read_text()
    warning = (
        "loss_ctr is nan in step 8, by predictions of rank 1 that are not finite: the step trained nothing (skipped, 2 of 2 that "
        f"training.max_skipped_steps allows); {out}/diverged holds its batches and those of the step before"
    )
    assert said.count(warning) == 1, "by rank 0 alone"
