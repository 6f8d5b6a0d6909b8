"""What only a GPU can show. The tests of training and scoring run on one where there is one, beside more ranks on cores (`ranks.py`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from escm2rec.reader.dataset import Dataset
from escm2rec.reader.reader import Reader
from tests.encoded import config, write_dataset
from tests.ranks import run_ranks, train_on_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
# Of the 5 rows of the smallest table each takes the gradients of some 1,300 impressions: FBGEMM splits such sums over blocks.
SETTINGS = ["objective.kind=escm2-dr", "training.global_batch_size=8192", "training.epochs=4", "training.log_every_steps=1"]
STEPS = 12


def _losses(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [{name: value for name, value in record.items() if name.startswith("loss_")} for record in records]


def _train(data: Path, out: Path, *settings: str, **arguments: Any) -> list[dict[str, float]]:
    result = train_on_ranks(data, out, out.parent / f"ranks-{out.name}", overrides=[*SETTINGS, *settings], **arguments)
    assert result.get("steps") == STEPS, result
    return _losses(out)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": 3 * 8192, "validation": 600, "test": 700}, 8192, 2048)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 8 and 12."""
    out = tmp_path_factory.mktemp("gpu") / "run"
    _train(data, out, "training.checkpoint_every_steps=8")
    return out


def test_two_trainings_are_alike_bit_for_bit(data: Path, run: Path, tmp_path: Path) -> None:
    assert _train(data, tmp_path / "again") == _losses(run)


def test_a_resumed_training_is_the_undisturbed_one_bit_for_bit(data: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "step-12")
    (out / "manifest.json").unlink()
    assert _train(data, out, "training.checkpoint_every_steps=8", resume=True) == _losses(run)


# Of each: what it sets, and whether cores have it too.
WAYS: dict[str, tuple[list[str], bool]] = {
    "adam": (["training.sparse_optimizer=adam", "training.sparse_learning_rate=0.01"], False),
    "rowwise_adam": (["training.sparse_optimizer=rowwise_adam", "training.sparse_learning_rate=0.01"], False),
    "adagrad": (["training.sparse_optimizer=adagrad"], True),
    "sgd": (["training.sparse_optimizer=sgd", "training.sparse_learning_rate=1.0"], True),
    "measured": (
        [
            *("training.ema_decay=0.9", "training.clip_gradient_norm=0.1", "training.gradient_accumulation_steps=2"),
            *("training.warmup_steps=3", "training.evaluate_every_steps=4", "training.keep_best=ctcvr_auc", "training.max_skipped_steps=1"),
        ],
        True,
    ),
}


def test_every_way_to_step_goes_on_as_if_undisturbed(data: Path, tmp_path: Path) -> None:
    """Each is trained, cut off after step 8 and resumed, bit for bit; cores take its steps where they have it."""
    calls: list[tuple[str, dict[str, Any]]] = []
    for name, (settings, _) in WAYS.items():
        call = {"data": str(data), "out": str(tmp_path / name), "overrides": [*SETTINGS, *settings, "training.checkpoint_every_steps=8"]}
        calls.append(("tests.training_calls:train_run", call))
        calls.append(("tests.training_calls:keep", {"source": str(tmp_path / name), "to": str(tmp_path / f"{name}-undisturbed")}))
        calls.append(("tests.training_calls:cut_off", {"run": str(tmp_path / name), "step": 12}))
        calls.append(("tests.training_calls:train_run", {**call, "resume": True}))
    run_ranks(1, calls, tmp_path / "ranks")
    assert len({json.dumps(_losses(tmp_path / name)) for name in WAYS}) == len(WAYS), "each takes steps of its own"
    for name in WAYS:
        assert _losses(tmp_path / name) == _losses(tmp_path / f"{name}-undisturbed"), name
    cores = [name for name, (_, everywhere) in WAYS.items() if everywhere]
    calls = [
        (
            "tests.training_calls:train_run",
            {"data": str(data), "out": str(tmp_path / f"{name}-cores"), "overrides": [*SETTINGS, *WAYS[name][0]]},
        )
        for name in cores
    ]
    run_ranks(torch.cuda.device_count() + 1, calls, tmp_path / "cores")
    assert len(cores) == 3
    for name in cores:
        for seen, want in zip(_losses(tmp_path / f"{name}-cores"), _losses(tmp_path / name), strict=True):
            assert seen == pytest.approx(want, abs=2e-5), name


def test_cores_take_the_steps_of_the_gpu(data: Path, run: Path, tmp_path: Path) -> None:
    on_cores = _train(data, tmp_path / "cores", world_size=torch.cuda.device_count() + 1)
    for seen, want in zip(on_cores, _losses(run), strict=True):
        assert seen == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("objective", ["escm2-ips", "escm2-dr"])
def test_bfloat16_learns_what_float32_learns(data: Path, tmp_path: Path, objective: str) -> None:
    kind = f"objective.kind={objective}"
    exact = _train(data, tmp_path / "float32", kind)
    rounded = _train(data, tmp_path / "bfloat16", kind, "training.precision=bfloat16")
    assert rounded != exact
    for seen, want in zip(rounded, exact, strict=True):
        assert seen == pytest.approx(want, rel=0.02)


def test_batches_are_assembled_in_page_locked_memory(data: Path) -> None:
    """A GPU copies from it beside its computation; from other memory it waits."""
    for pinned in (True, False):
        batch = next(Reader(Dataset.open(data), "train", 512, pin_memory=pinned).epoch(0))
        keyed = [each for each in (batch.features, batch.weighted_features) if each is not None]
        assert len(keyed) == 2
        tensors = [batch.numeric, batch.click, batch.conversion, batch.weight, keyed[1].weights()]
        tensors += [tensor for each in keyed for tensor in (each.values(), each.lengths())]
        assert {tensor.is_pinned() for tensor in tensors} == {pinned}


def test_more_ranks_than_gpus_are_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config(*SETTINGS).model_dump_json())
    ranks = torch.cuda.device_count() + 1
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "escm2rec", "train"]
    arguments = ["--config", str(tmp_path / "config.json"), "--data", str(data), "--out", str(tmp_path / "run")]
    done = subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=120, check=False, env={**os.environ})
    assert done.returncode != 0
    said = f"{ranks} ranks start on a machine of {ranks - 1} GPU(s), and each needs one of its own"
    assert done.stderr.count(said) >= 1
    assert "hide the GPUs to use its cores: CUDA_VISIBLE_DEVICES=''" in done.stderr
