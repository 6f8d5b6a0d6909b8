"""What a run folder keeps when its training goes on; `test_training.py` and `test_soak.py` have real ones."""

from __future__ import annotations

from pathlib import Path

from escm2rec.folder import write_manifest
from escm2rec.training.run import go_on


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
