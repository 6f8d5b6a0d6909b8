"""Training on real ranks: the same steps on one and on two, resumption, and what a run leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from escm2rec.config import ObjectiveKind
from tests.encoded import config, write_dataset
from tests.ranks import run_ranks
from tests.small_disks import small_disk

NUM_STEPS = 20
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the components set it
OBJECTIVES: dict[str, list[str]] = {
    "esmm": ["objective.kind=esmm", "training.learning_rate_decay=none"],
    "esmm-calibrated": [
        "objective.kind=esmm",
        "training.learning_rate_decay=none",
        "objective.propensity={calibration: platt, calibration_every_steps: 4}",
    ],
    "naive": ["objective.kind=naive"],
    "naive+ctcvr": ["objective.kind=naive+ctcvr"],
    "escm2-ips": ["objective.kind=escm2-ips"],
    "escm2-dr-alternating": ["objective.kind=escm2-dr", "objective.imputation.alternate=true"],
    "escm2-dr": ["objective.kind=escm2-dr"],
    "escm2-dr-error": ["objective.kind=escm2-dr", "objective.imputation.predicts=error"],
    "escm2-dr-mmoe": ["objective.kind=escm2-dr", "model.backbone={kind: mmoe, experts: 2, hidden: [8]}"],
    "escm2-snips-learned": ["objective.kind=escm2-snips", "objective.lambda_c=learned", "objective.lambda_g=learned"],
    "multi-ipw-balanced": ["objective.kind=multi-ipw", "objective.propensity.balance=0.1"],
    "escm2-dr-calibrated": [
        "objective.kind=escm2-dr",
        "objective.propensity.calibration=platt",
        "objective.propensity.calibration_every_steps=4",
        "objective.lambda_c={start: 0, end: 1, until: 0.5}",
    ],
    "direct": ["objective.kind=direct"],
    "multi-dr-2:1": ["objective.kind=multi-dr", "objective.imputation={alternate: true, cvr_steps: 2}"],
    "stable-dr": ["objective.kind=stable-dr"],
    "stable-dr-alternating": ["objective.kind=stable-dr", "objective.imputation.alternate=true"],
    "dcmt": ["objective.kind=dcmt"],
    "two-space": ["objective.kind=two-space"],
    "escm2-dr-ple": ["objective.kind=escm2-dr", "model.backbone={kind: ple, hidden: [8]}"],
    "escm2-ips-dcn_v2": ["objective.kind=escm2-ips", "model.backbone={kind: dcn_v2, hidden: [8]}"],
}
CALIBRATIONS = dict.fromkeys(["esmm-calibrated", "escm2-dr-calibrated"], (NUM_STEPS - 1) // 4)
PLANS: dict[str, list[str]] = {"planner": [], "row_wise": ["training.sharding={'*': row_wise}"]}
Runs = dict[tuple[str, str, int], list[dict[str, Any]]]


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _train_all(data: Path, folder: Path, world_size: int) -> Runs:
    calls, places = [], {}
    for objective, settings in OBJECTIVES.items():
        for plan, sharding in PLANS.items():
            out = folder / f"{objective}-{plan}-{world_size}"
            places[(objective, plan, world_size)] = out
            calls.append(("tests.training_calls:train_run", {"data": str(data), "out": str(out), "overrides": settings + sharding}))
    results = run_ranks(world_size, calls, folder / f"ranks-{world_size}")
    assert [result.get("steps") for result in results] == [NUM_STEPS + CALIBRATIONS.get(key[0], 0) for key in places], results
    return {key: _records(out) for key, out in places.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 20 steps of 256: the last rows make the steps uneven, so that padding is at work too. No training may need the test split.
    made = write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": NUM_STEPS * 256 - 37, "validation": 600, "test": 700})
    shutil.rmtree(made / "test")
    return made


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    return _train_all(data, folder, 1) | _train_all(data, folder, 2)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_and_two_ranks_take_the_same_steps_under_every_plan(runs: Runs, objective: str) -> None:
    reference = runs[(objective, "planner", 1)]
    compared = 0
    for plan, world_size in [("planner", 2), ("row_wise", 1), ("row_wise", 2)]:
        records = runs[(objective, plan, world_size)]
        assert len(records) == len(reference) == NUM_STEPS
        for expected, seen in zip(reference, records, strict=True):
            losses = [name for name in expected if name.startswith("loss_")]
            assert [name for name in seen if name.startswith("loss_")] == losses
            assert losses
            counts = ("lifetime_rows", "lifetime_clicks", "lifetime_conversions")
            assert [seen[name] for name in counts] == [expected[name] for name in counts]
            for name in losses:
                assert seen[name] == pytest.approx(expected[name], abs=1e-5), (plan, world_size, seen["step"], name)
                compared += 1
    assert compared >= 3 * NUM_STEPS


def test_mistake_11_every_objective_trains_on_the_training_split_alone(runs: Runs, data: Path) -> None:
    splits = json.loads((data / "manifest.json").read_text())["splits"]
    assert splits["test"]["rows"] == 700
    assert not (data / "test").exists(), "no run found anything to read there"
    assert {objective for objective, _, _ in runs} == OBJECTIVES.keys()
    kinds = {setting.removeprefix("objective.kind=") for settings in OBJECTIVES.values() for setting in settings[:1]}
    assert kinds == set(get_args(ObjectiveKind))
    # All of that split and nothing else, to the last step: nothing stops early, on whatever it would look at.
    for key, records in runs.items():
        assert sum(record["rows"] for record in records) == splits["train"]["rows"] != splits["validation"]["rows"], key


def test_alternation_trains_imputation_every_second_step(runs: Runs) -> None:
    terms = [sorted(name for name in record if name.startswith("loss_")) for record in runs[("escm2-dr-alternating", "planner", 1)]]
    assert terms == [["loss_ctcvr", "loss_ctr", "loss_cvr"], ["loss_imputation"]] * (NUM_STEPS // 2)


def test_calibration_fits_q_and_trains_nothing(runs: Runs) -> None:
    """Slope and shift move from (1, 0) at every fifth step, alike under every plan; the rows that train are the same without it."""
    records = runs[("escm2-dr-calibrated", "planner", 1)]
    slopes = [(record["propensity_slope"], record["propensity_shift"]) for record in records]
    assert slopes[3] == (1.0, 0.0)
    assert len(set(slopes)) == 5
    for plan, world_size in [("planner", 2), ("row_wise", 1), ("row_wise", 2)]:
        last = runs[("escm2-dr-calibrated", plan, world_size)][-1]
        assert (last["propensity_slope"], last["propensity_shift"]) == pytest.approx(slopes[-1], abs=1e-5)
    losses = [[record["loss_ctcvr"] for record in runs[(kind, "planner", 1)]] for kind in ("esmm", "esmm-calibrated")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-7), "where q weighs nothing, it changes nothing"


def test_calibration_without_a_validation_split_is_refused(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "set", {"train": 1_000})
    call = {"data": str(made), "out": str(tmp_path / "run"), "overrides": OBJECTIVES["escm2-dr-calibrated"]}
    (result,) = run_ranks(1, [("tests.training_calls:train_run", call)], tmp_path / "ranks")
    assert "objective.propensity.calibration fits to the validation split" in result["message"]
    assert not (tmp_path / "run").exists()


def test_learned_weights_of_terms_move_and_are_told(runs: Runs) -> None:
    records = runs[("escm2-snips-learned", "planner", 1)]
    for name in ("lambda_cvr", "lambda_ctcvr"):
        assert records[0][name] == pytest.approx(1.0, abs=0.01)
        assert records[-1][name] != records[0][name]
        assert records[-1][name] == pytest.approx(runs[("escm2-snips-learned", "row_wise", 2)][-1][name], abs=1e-5)


def test_every_row_is_trained_once_an_epoch(runs: Runs) -> None:
    for key, records in runs.items():
        assert sum(record["rows"] for record in records) == records[-1]["lifetime_rows"] == NUM_STEPS * 256 - 37, key


def test_records_hold_what_the_method_asks_for(runs: Runs) -> None:
    record = runs[("escm2-dr", "planner", 2)][-1]
    expected = {"ctr_auc", "ctr_calibration", "cvr_clicked_auc", "cvr_clicked_calibration", "ctcvr_auc", "ctcvr_calibration"}
    expected |= {"propensity_floor_share", "propensity_effective_sample_size", "propensity_mean_weight", "propensity_largest_share"}
    expected |= {"rows_per_s", "pseudo_labels_outside", "pseudo_labels_excess", "least_loss_cvr"}
    assert expected <= record.keys()


def test_a_resumed_run_goes_on_as_if_undisturbed(data: Path, runs: Runs, tmp_path: Path) -> None:
    """Trained on two ranks, cut off after step 16, and resumed on one and on two: the steps after it are those of the undisturbed run.

    With alternation and calibration, so that what a step does depends on where in both it stands.
    """
    settings = [*OBJECTIVES["escm2-dr-calibrated"], "training.checkpoint_every_steps=8"]
    call = {"data": str(data), "out": str(tmp_path / "run"), "overrides": settings}
    run_ranks(2, [("tests.training_calls:train_run", call)], tmp_path / "first")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-16", "step-24"], "the last two checkpoints are kept"
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-24")
    (tmp_path / "run" / "manifest.json").unlink()
    (tmp_path / "run" / "report.html").write_text("of the finished run")
    undisturbed = runs[("escm2-dr-calibrated", "planner", 2)]
    expected = {record["step"]: record for record in undisturbed if record["step"] > 16}
    for world_size in (1, 2):
        out = tmp_path / f"resumed-{world_size}"
        shutil.copytree(tmp_path / "run", out)
        again = ("tests.training_calls:train_run", {**call, "out": str(out), "resume": True})
        resumed, finished = run_ranks(world_size, [again, again], tmp_path / f"again-{world_size}")
        assert resumed["steps"] == NUM_STEPS + 4
        assert finished == resumed, "there is nothing to resume, and nothing is changed"
        assert not (out / "report.html").exists()
        records = _records(out)
        assert [record["step"] for record in records] == [step for step in range(1, NUM_STEPS + 5) if step % 5], "each step once"
        assert len(expected) == 7
        for seen in (record for record in records if record["step"] > 16):
            want = expected[seen["step"]]
            for name in (name for name in want if name.startswith("loss_") or name in ("propensity_slope", "propensity_shift")):
                assert seen[name] == pytest.approx(want[name], abs=1e-5)


def test_three_ranks_go_on_as_if_undisturbed_too(data: Path, tmp_path: Path) -> None:
    """Bit for bit: two ranks add alike in any order, three do not, and the order goes by the place of a gradient in its buffer.

    Tables that every rank holds are summed so too.
    """
    settings = [*OBJECTIVES["escm2-ips-dcn_v2"], "model.tower_hidden=[64]", "training.sharding={user: data_parallel, tags: data_parallel}"]
    told: dict[str, Any] = {"data": str(data), "out": str(tmp_path / "told"), "overrides": settings}
    alone = ("tests.training_calls:train_run", {**told, "out": str(tmp_path / "alone")})
    run_ranks(3, [alone, ("tests.training_calls:train_until_told", {**told, "at_step": 6, "of_rank": 1})], tmp_path / "first")
    run_ranks(3, [("tests.training_calls:train_run", {**told, "resume": True})], tmp_path / "again")
    undisturbed, resumed = _records(tmp_path / "alone"), _records(tmp_path / "told")
    assert len(undisturbed) == NUM_STEPS
    for expected, seen in zip(undisturbed, resumed, strict=True):
        kept = {name: value for name, value in expected.items() if name.startswith(("loss_", "lifetime_"))}
        assert {name: seen[name] for name in kept} == kept, expected["step"]


def test_a_run_that_is_told_to_end_goes_on_as_if_undisturbed(data: Path, runs: Runs, tmp_path: Path) -> None:
    """SIGTERM of rank 1 after step 6: both save step 8, when both know of it, say so, and end; resumed, the run is that of nobody told."""
    settings = OBJECTIVES["escm2-ips"]
    call: dict[str, Any] = {"data": str(data), "out": str(tmp_path / "run"), "overrides": settings}
    told = ("tests.training_calls:train_until_told", {**call, "at_step": 6, "of_rank": 1})
    stopped, resumed = run_ranks(2, [told, ("tests.training_calls:train_run", {**call, "resume": True})], tmp_path / "ranks")
    assert stopped["error"] == "StopError"
    assert stopped["message"] == "stopped by SIGTERM after step 8 of 20; its checkpoint is whole\nhint: --resume goes on from it"
    assert resumed["steps"] == NUM_STEPS
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-8", "step-20"}
    undisturbed = runs[("escm2-ips", "planner", 2)][-1]
    again = _records(tmp_path / "run")[-1]
    assert again["step"] == undisturbed["step"] == NUM_STEPS
    for name in (name for name in undisturbed if name.startswith(("loss_", "lifetime_"))):
        assert again[name] == undisturbed[name], "bit for bit"


def test_of_two_starts_of_a_training_the_later_one_alone_writes(data: Path, runs: Runs, tmp_path: Path) -> None:
    """One that a scheduler lost sight of and started again lives on; it ends at what it would write next, and the run is the other's."""
    out = tmp_path / "run"
    settings = [*OBJECTIVES["escm2-ips"], "training.checkpoint_every_steps=4"]
    call = ("tests.training_calls:train_beside_another", {"data": str(data), "out": str(out), "overrides": settings, "at_step": 10})
    (earlier,) = run_ranks(1, [call], tmp_path / "ranks")
    assert earlier["error"] == "RunError"
    assert earlier["message"].startswith(f"{out} was taken over by a later start of this training, or replaced: this one ends")
    assert json.loads((out / "manifest.json").read_text())["steps"] == NUM_STEPS
    undisturbed, records = runs[("escm2-ips", "planner", 1)], _records(out)
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    for seen, want in zip(records, undisturbed, strict=True):
        assert {name: seen[name] for name in want if name.startswith("loss_")} == {n: v for n, v in want.items() if n.startswith("loss_")}
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-16", "step-20"]


def test_a_start_that_wakes_late_removes_nothing(data: Path, tmp_path: Path) -> None:
    """It has loaded a checkpoint when a later one comes and trains to the end: of what that one left nothing is touched."""
    out = tmp_path / "run"
    settings = [*OBJECTIVES["esmm"], "training.checkpoint_every_steps=8"]
    call: dict[str, Any] = {"data": str(data), "out": str(out), "overrides": settings}
    cut: tuple[str, dict[str, Any]] = ("tests.training_calls:cut_off", {"run": str(out), "step": 20})
    calls = [("tests.training_calls:train_run", call), cut, ("tests.training_calls:resume_after_another", call)]
    *_, late = run_ranks(1, calls, tmp_path / "ranks")
    assert late["message"].startswith(f"{out} was taken over by a later start of this training")
    assert json.loads((out / "manifest.json").read_text())["steps"] == NUM_STEPS
    assert [record["step"] for record in _records(out)] == list(range(1, NUM_STEPS + 1))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-16", "step-20"]


def test_a_damaged_checkpoint_is_passed_over(data: Path, tmp_path: Path) -> None:
    """Of two, whichever file of the newer one is cut, changed or gone: training goes on from the older one, and says so."""
    out = tmp_path / "run"
    settings = [*OBJECTIVES["esmm"], "training.checkpoint_every_steps=12", "training.keep_checkpoints=3"]
    call: dict[str, Any] = {"data": str(data), "out": str(out), "overrides": settings, "resume": True}
    run_ranks(2, [("tests.training_calls:train_run", call)], tmp_path / "first")
    last = _records(out)[-1]
    newest = out / "checkpoints" / "step-20"
    written = json.loads((newest / "manifest.json").read_text())["files"]
    assert {path.name for path in newest.iterdir()} == {*written, "manifest.json"}
    assert len(written) >= 3, "of each rank, and the index"
    for number, name in enumerate(sorted(written)):
        path = newest / name
        whole = path.read_bytes()
        damaged, said = [
            (whole[:-1], f"{name} has {len(whole) - 1:,} bytes, {len(whole):,} were written"),
            (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], f"{name} does not hold what was written (SHA-256)"),
            (None, f"{name} cannot be read: No such file or directory"),
        ][number % 3]
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        folder = tmp_path / f"ranks-{number}"
        evaluates = ("tests.training_calls:evaluate_run", {"run": str(out), "data": str(data), "split": "train"})
        evaluated, resumed = run_ranks(2, [evaluates, ("tests.training_calls:train_run", call)], folder)
        assert evaluated["error"] == "DataError"
        assert evaluated["message"].startswith(f"checkpoint {newest} is damaged: {said}\nhint: train with --resume")
        assert f"checkpoint {newest} is damaged and passed over: {said}" in (folder / "stderr").read_text()
        assert resumed["steps"] == NUM_STEPS
        assert _records(out)[-1]["loss_ctr"] == last["loss_ctr"]


def _train_and_fail(data: Path, folder: Path, how: str, rank: int, step: int, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """The command on two ranks, one of which fails once, with a checkpoint every 4 steps."""
    (folder / "config.json").write_text(config(*OBJECTIVES["escm2-ips"], "training.checkpoint_every_steps=4").model_dump_json())
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}", "--monitor-interval=1"]
    arguments = ["--config", str(folder / "config.json"), "--data", str(data), "--out", str(folder / "run"), "--resume"]
    command = [sys.executable, *start, "-m", "tests.failing_train", how, str(rank), str(step), *arguments]
    environment = {**os.environ, **FRESH_STORE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120 * (1 + restarts), check=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_ends_all_and_is_named(data: Path, tmp_path: Path, rank: int) -> None:
    """While a checkpoint is being written too, which is whole all the same: the job goes on from it."""
    done = _train_and_fail(data, tmp_path, "raise", rank, 6)
    assert (done.returncode, done.stdout) == (1, "")
    who = "error (rank 1)" if rank else "error"
    assert f"{who}: MemoryError: no room for the batch\nhint: run the same command with --debug" in done.stderr
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "step-4"
    assert time.time() - checkpoint.stat().st_mtime < 60, "from two steps before the error to the end of all ranks"


def test_a_killed_rank_is_started_again_and_the_run_is_the_undisturbed_one(data: Path, runs: Runs, tmp_path: Path) -> None:
    """kill -9 of rank 1 in step 10: torchrun starts both again, which go on from step 8, without a person."""
    done = _train_and_fail(data, tmp_path, "kill", 1, 10, restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == NUM_STEPS
    undisturbed, again = runs[("escm2-ips", "planner", 2)][-1], _records(tmp_path / "run")[-1]
    assert again["step"] == undisturbed["step"] == NUM_STEPS
    for name in (name for name in undisturbed if name.startswith(("loss_", "lifetime_"))):
        assert again[name] == undisturbed[name], "bit for bit"


def test_a_full_disk_ends_the_run_with_its_last_checkpoint_whole(data: Path, tmp_path: Path) -> None:
    settings = [*OBJECTIVES["esmm"], "training.checkpoint_every_steps=8", "training.log_every_steps=1000"]
    with small_disk(tmp_path / "disk", "8m") as disk:
        call: dict[str, Any] = {"data": str(data), "out": str(disk / "run"), "overrides": settings}
        (full,) = run_ranks(2, [("tests.training_calls:train_on_full_disk", {**call, "at_step": 12})], tmp_path / "full")
        assert full["error"] == "RunError"
        assert re.match(r"cannot write (checkpoint )?\S+: .*No space left on device.*; 0\.0 MB of 8\.4 MB are free there", full["message"])
        assert "start again with --resume" in full["message"]
        (disk / "filler").unlink()
        (resumed,) = run_ranks(2, [("tests.training_calls:train_run", {**call, "resume": True})], tmp_path / "resumed")
        assert resumed["steps"] == NUM_STEPS
        assert {path.name for path in (disk / "run" / "checkpoints").iterdir()} == {"step-16", "step-20"}


def test_a_damaged_checkpoint_and_another_config_are_refused(data: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "run", write_dataset(tmp_path / "other", {"train": 1_000})
    call: dict[str, Any] = {"data": str(data), "out": str(out), "overrides": OBJECTIVES["esmm"]}
    train = "tests.training_calls:train_run"
    first = [(train, call), (train, {**call, "resume": True, "data": str(other)})]
    _, elsewhere = run_ranks(1, first, tmp_path / "first")
    assert "was trained on other rows than the training split holds now" in elsewhere["message"]
    assert (out / "manifest.json").is_file(), "what is refused changes nothing"
    shards = sorted((out / "checkpoints").glob("step-*/*.distcp"))
    assert shards
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:100])
    changed = "data.features=[{name: user, kind: list}, {name: tags, kind: list}]"
    results = run_ranks(
        1,
        [
            (train, {**call, "out": str(tmp_path / "new"), "overrides": [changed]}),
            (train, call),
            (train, {**call, "resume": True, "overrides": ["objective.kind=naive", "model.embedding_dim=16"]}),
            (train, {**call, "resume": True, "overrides": [*OBJECTIVES["esmm"], "training.epochs=2"]}),
        ],
        tmp_path / "again",
    )
    assert [result["error"] for result in results] == ["ConfigError", "ConfigError", "ConfigError", "DataError"]
    assert "feature 'age': the config says no such feature, the data set has one (" in results[0]["message"]
    assert f"the output folder {out} exists" in results[1]["message"]
    assert (
        "was trained with another config: model.embedding_dim, objective.kind, training.learning_rate_decay differ(s)"
        in results[2]["message"]
    )
    assert results[3]["message"] == f"every checkpoint of {out} is damaged (step-20)\nhint: train again, with --overwrite"


def test_a_training_that_diverges_ends_and_looks_unfinished(data: Path, tmp_path: Path) -> None:
    """And as it has no checkpoint, the same command without its mistake starts it anew."""
    settings = [*OBJECTIVES["escm2-ips"], "training.log_every_steps=7", "training.checkpoint_every_steps=5"]
    call = {"data": str(data), "out": str(tmp_path / "run"), "overrides": [*settings, "training.dense_learning_rate=1e20"]}
    train = "tests.training_calls:train_run"
    keeps = ("tests.training_calls:keep", {"source": str(tmp_path / "run" / "diverged"), "to": str(tmp_path / "diverged")})
    diverged, _, mended = run_ranks(2, [(train, call), keeps, (train, {**call, "overrides": settings})], tmp_path / "ranks")
    assert diverged["error"] == "RunError"
    told = (
        r"loss_\w+ is (?:nan|inf) in step (\d), by predictions of rank 0, 1 that are not finite: training has diverged; \S+/diverged holds"
    )
    found = re.match(told, diverged["message"])
    assert found is not None, diverged["message"]
    step = int(found[1])
    kept = {path.name: np.load(path) for path in (tmp_path / "diverged").iterdir()}
    assert sorted(kept) == [f"step-{each}-rank-{rank}.npz" for each in (step - 1, step) for rank in (0, 1)]
    for batch in kept.values():
        assert int(batch["num_rows"]) in (127, 128), "the last is padding"
        assert batch["features.lengths"].shape == (len(batch["features.keys"]), 128)
        assert batch["features.lengths"].sum() == len(batch["features.values"])
    assert mended["steps"] == NUM_STEPS
    assert [record["step"] for record in _records(tmp_path / "run")] == [5, 7, 10, 14, 15, 20], "a record at each checkpoint too"


def test_a_run_is_not_made_of_its_own_data(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    call = {"data": str(tmp_path / "data"), "out": str(tmp_path / "data"), "overrides": OBJECTIVES["esmm"]}
    (result,) = run_ranks(1, [("tests.training_calls:train_run", call)], tmp_path / "ranks")
    assert "is or holds the input" in result["message"]
    assert (tmp_path / "data" / "train").is_dir()
