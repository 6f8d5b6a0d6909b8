"""Measured while it trains: nothing moves by it, the best state is kept and is the run's, and training ends when it gets no better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from escm2rec.errors import DataError, RunError
from escm2rec.training.start import start
from escm2rec.training.validation import Best, _quality
from tests.encoded import config, write_dataset
from tests.ranks import run_ranks

STEPS = 48  # 6 epochs of 8: at this rate ids are learned by heart, and the validation loss turns
HASTY = ["objective.kind=escm2-ips", "training.epochs=6", "training.learning_rate_decay=none", "training.sparse_learning_rate=0.6"]
MEASURED = [*HASTY, "training.evaluate_every_steps=4", "training.keep_best=ctr_log_loss", "training.keep_checkpoints=1"]
STOPPED = [*MEASURED, "training.early_stopping=2", "training.ema_decay=0.8", "training.gradient_accumulation_steps=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", {"train": 8 * 256 - 37, "validation": 700, "test": 300})


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the calls below gave, with their run folders, on 2 ranks: one after the other in one start of them."""
    folder = tmp_path_factory.mktemp("runs")
    calls: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, overrides in (("plain", HASTY), ("measured", MEASURED), ("stopped", STOPPED)):
        calls[name] = "tests.training_calls:train_run", {"data": str(data), "out": str(folder / name), "overrides": overrides}
    told = {"data": str(data), "out": str(folder / "told"), "overrides": STOPPED}
    calls["told"] = "tests.training_calls:train_until_told", {**told, "at_step": 13, "of_rank": 1}
    calls["resumed"] = "tests.training_calls:train_run", {**told, "resume": True}
    calls["again"] = "tests.training_calls:train_run", {**told, "resume": True}
    for name in ("measured", "stopped"):
        calls[f"evaluated {name}"] = (
            "tests.training_calls:evaluate_run",
            {"run": str(folder / name), "data": str(data), "split": "validation"},
        )
    return {"folder": folder, **dict(zip(calls, run_ranks(2, list(calls.values()), folder / "ranks"), strict=True))}


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_measuring_moves_nothing(runs: dict[str, Any]) -> None:
    """A model that is measured every fourth step has the losses of one that never is, bit for bit; batches under way are kept."""
    plain, measured = (records(runs["folder"] / name) for name in ("plain", "measured"))
    assert len(plain) == len(measured) == STEPS
    for expected, seen in zip(plain, measured, strict=True):
        assert {name: seen[name] for name in expected if name.startswith("loss_")} == {
            name: value for name, value in expected.items() if name.startswith("loss_")
        }
    assert [record["step"] for record in measured if "validation_ctr_auc" in record] == list(range(4, STEPS + 1, 4))
    assert measured[3]["validation_rows"] == 700
    assert {(record["sparse_learning_rate"], record["dense_learning_rate"]) for record in measured} == {(0.6, 0.01)}


@pytest.mark.parametrize("name", ["measured", "stopped"])
def test_the_best_state_is_kept_and_is_the_model_of_the_run(runs: dict[str, Any], name: str) -> None:
    """It is no longer among the newest, and what `evaluate` finds on the split is what was measured, moving average and all."""
    found = {record["step"]: record["validation_ctr_log_loss"] for record in records(runs["folder"] / name) if "validation_rows" in record}
    best = min(found, key=lambda step: found[step])
    run, last = runs[name], max(found)
    assert best < last
    assert run["checkpoint"] == f"checkpoints/step-{best}"
    assert run["best"] == {"metric": "ctr_log_loss", "step": best, "value": found[best], "since": (last - best) // 4}
    assert {path.name for path in (runs["folder"] / name / "checkpoints").iterdir()} == {f"step-{best}", f"step-{last}"}
    assert runs[f"evaluated {name}"]["metrics"]["ctr_log_loss"] == pytest.approx(found[best], abs=1e-7)
    assert runs[f"evaluated {name}"]["checkpoint"] == run["checkpoint"]


def test_training_stops_when_so_many_measurements_were_no_better(runs: dict[str, Any]) -> None:
    assert runs["stopped"]["steps"] < STEPS
    assert runs["stopped"]["best"]["since"] == 2
    assert runs["stopped"]["steps"] == runs["stopped"]["best"]["step"] + 8


def test_a_resumed_run_knows_its_best_and_holds_no_half_step(runs: dict[str, Any]) -> None:
    """Told to end at step 13, amid two steps whose gradients are one, it saves at an even one; then all is as if nobody had told it."""
    step = int(runs["told"]["message"].split("after step ")[1].split(" of ")[0])
    assert step % 2 == 0
    assert step > 13
    for key in ("steps", "best", "checkpoint"):
        assert runs["resumed"][key] == runs["stopped"][key]
    seen, expected = (records(runs["folder"] / name)[-1] for name in ("told", "stopped"))
    for name in (name for name in expected if name.startswith(("loss_", "validation_"))):
        assert seen[name] == expected[name], f"{name}, bit for bit"
    assert runs["again"] == runs["resumed"], "it is over: nothing is trained, nothing changed"
    assert (runs["again"]["stopped_early"], runs["again"]["planned_steps"]) == (True, STEPS)
    said = (runs["folder"] / "ranks" / "stderr").read_text()
    how = f"stopped early after step {runs['stopped']['steps']} of {STEPS}: nothing was done; a higher training.early_stopping would train"
    assert said.count(how) == 1


def test_best_of_losses_is_the_least_and_of_aucs_the_greatest() -> None:
    best = None
    for step, value in enumerate([0.5, 0.4, 0.6, 0.6]):
        best = Best.after(best, "ctcvr_auc", step, {"ctcvr_auc": value})
    assert best == Best("ctcvr_auc", 2, 0.6, since=1), "a tie is no better"
    best = None
    for step, value in enumerate([0.5, 0.4, 0.6]):
        best = Best.after(best, "ctr_log_loss", step, {"ctr_log_loss": value})
    assert best == Best("ctr_log_loss", 1, 0.4, since=1)


def test_a_metric_that_the_split_has_not_is_told() -> None:
    with pytest.raises(
        RunError, match=r"keep_best: the validation split has no cvr_clicked_auc after step 4: it wants clicks, conv"
    ) as told:
        Best.after(None, "cvr_clicked_auc", 4, {"cvr_clicked_auc": float("nan")})
    assert "choose another metric" in str(told.value.hint)


def test_predictions_that_are_not_finite_end_the_training() -> None:
    """Their AUC would be a number, and could be the best."""
    rows = np.ones((5, 8), dtype=np.float32)
    rows[1, 3] = np.nan
    with pytest.raises(RunError, match="after step 7 predictions of the validation split are not finite: training has diverged"):
        _quality(rows, 7)


@pytest.mark.parametrize(
    ("metric", "clicks", "conversions", "said"),
    [
        ("ctr_auc", 0, 0, "0 positives among 600"),
        ("cvr_clicked_auc", 50, 50, "50 positives among 50"),
        ("ctcvr_auc", 50, 0, "0 positives among 600"),
        ("cvr_clicked_log_loss", 0, 0, "0 positives among 0"),
    ],
)
def test_a_metric_that_the_split_has_not_is_refused_before_the_training(
    tmp_path: Path, metric: str, clicks: int, conversions: int, said: str
) -> None:
    made = write_dataset(tmp_path / "set", {"train": 600, "validation": 600})
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["splits"]["validation"] |= {"clicks": clicks, "conversions": conversions}
    (made / "manifest.json").write_text(json.dumps(manifest))
    asked = config("training.evaluate_every_steps=1", f"training.keep_best={metric}")
    with pytest.raises(DataError, match=f"training.keep_best: {metric} cannot be had of the validation split, which has {said}"):
        start(asked, made, tmp_path / "run", resume=False, overwrite=False, warm_start=None)
    assert not (tmp_path / "run").exists()


def test_a_best_that_is_damaged_or_by_another_metric_is_looked_for_anew(runs: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """A finished run whose best is damaged becomes its newest; what to keep the best by may change on resumption."""
    folder: Path = runs["folder"]
    best = runs["measured"]["checkpoint"]
    damaged, other = tmp_path / "damaged", tmp_path / "other"
    (file,) = (path.name for path in (folder / "measured" / best).iterdir() if path.name.startswith("__0_"))
    call: dict[str, Any] = {"data": str(data), "out": str(damaged), "overrides": MEASURED, "resume": True}
    by_auc = [*MEASURED[:-2], "training.keep_best=ctcvr_auc", "training.keep_checkpoints=1"]
    calls = [
        ("tests.training_calls:keep", {"source": str(folder / "measured"), "to": str(damaged)}),
        ("tests.training_calls:keep", {"source": str(folder / "measured"), "to": str(other)}),
        ("tests.training_calls:flip", {"file": str(damaged / best / file)}),
        ("tests.training_calls:train_run", call),
        ("tests.training_calls:evaluate_run", {"run": str(damaged), "data": str(data), "split": "validation"}),
        ("tests.training_calls:cut_off", {"run": str(other), "step": STEPS}),
        ("tests.training_calls:train_run", {**call, "out": str(other), "overrides": by_auc}),
    ]
    *_, again, evaluated, _, changed = run_ranks(1, calls, tmp_path / "ranks")
    assert again["checkpoint"] == evaluated["checkpoint"] == f"checkpoints/step-{STEPS}"
    assert "best" not in again
    said = (tmp_path / "ranks" / "stderr").read_text()
    assert f"the best by ctr_log_loss is looked for anew, the checkpoint of step {runs['measured']['best']['step']} is not whole" in said
    assert changed["best"]["metric"] == "ctcvr_auc"
    assert json.loads((other / "config.json").read_text())["training"]["keep_best"] == "ctcvr_auc"


def test_measuring_without_a_validation_split_is_refused(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "set", {"train": 600})
    call = {"data": str(made), "out": str(tmp_path / "run"), "overrides": MEASURED}
    (result,) = run_ranks(1, [("tests.training_calls:train_run", call)], tmp_path / "ranks")
    assert "training.evaluate_every_steps measures on the validation split" in result["message"]
    assert not (tmp_path / "run").exists()
