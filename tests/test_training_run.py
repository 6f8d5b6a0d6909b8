"""What a run folder keeps when its training goes on; `test_training.py` and `test_soak.py` have real ones."""

from __future__ import annotations

import json
from pathlib import Path

from escm2rec.folder import write_manifest
from escm2rec.reader.dataset import Dataset
from escm2rec.training.run import DIVERGED, go_on, start_run
from tests.encoded import config, write_dataset


def test_what_came_after_the_step_that_training_goes_on_from_is_removed(tmp_path: Path) -> None:
    """Records, one among them that a full disk cut short, and checkpoints, which were passed over as damaged."""
    records = "".join(f'{{"step": {step}, "loss_ctr": 0.5}}\n' for step in (4, 8, 12))
    (tmp_path / "metrics.jsonl").write_text(records + '{"step": 16, "los')
    for step in (4, 8, 12):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
        write_manifest(tmp_path / "checkpoints" / f"step-{step}", "checkpoint", {})
    go_on(tmp_path, 8)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(records.splitlines(keepends=True)[:2])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-4", "step-8"]


def test_bad_batches_outlive_a_start_without_a_checkpoint(tmp_path: Path) -> None:
    """They are what there is to look at, and such a run is begun anew by --resume with other settings."""
    dataset = Dataset.open(write_dataset(tmp_path / "set", {"train": 600}))
    for rate in (0.1, 0.2):
        start_run(tmp_path / "run", config(f"training.dense_learning_rate={rate}"), dataset, resume=True, overwrite=False)
        (tmp_path / "run" / DIVERGED).mkdir(exist_ok=True)
        (tmp_path / "run" / DIVERGED / f"step-{rate}.npz").write_text("rows")
    assert sorted(path.name for path in (tmp_path / "run" / DIVERGED).iterdir()) == ["step-0.1.npz", "step-0.2.npz"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["dense_learning_rate"] == 0.2
