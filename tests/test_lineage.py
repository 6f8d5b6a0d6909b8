"""What TorchX's own tracker holds of jobs: where each output came from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from torchx.tracker.api import AppRun
from torchx.tracker.backend.fsspec import FsspecTracker

from escm2rec.lineage import tell_trackers


@pytest.fixture
def tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of TorchX's file tracker, and an environment as TorchX gives it to a job."""
    folder = tmp_path / "tracked"
    folder.mkdir()
    (tmp_path / "tracker.conf").write_text(f"protocol=file\nroot_path={folder}\n")
    monkeypatch.setenv("TORCHX_JOB_ID", "local_cwd://s/train-1")
    monkeypatch.setenv("TORCHX_TRACKERS", "fsspec")
    monkeypatch.setenv("TORCHX_TRACKER_FSSPEC_CONFIG", str(tmp_path / "tracker.conf"))
    AppRun.run_from_env.cache_clear()
    yield folder
    AppRun.run_from_env.cache_clear()


def test_a_job_tells_what_it_read_made_and_found(tracked: Path, tmp_path: Path) -> None:
    """By paths, so that the data set that one job made is the one that the next one read."""
    data, run = tmp_path / "data", tmp_path / "run"
    result = {"run": str(run), "steps": 20, "last_metrics": {"ctr_auc": 0.7}}
    tell_trackers("train", {"data": "s3://bucket/set", "out": run, "warm_start": data, "resume": True}, result)
    tracker = FsspecTracker(fsspec.filesystem("file"), str(tracked))
    (job,) = tracker.run_ids()
    assert job == "local_cwd://s/train-1"
    assert {(source.source_run_id, source.artifact_name) for source in tracker.sources(job)} == {
        ("s3://bucket/set", "data set"),
        (str(data), "run"),
    }
    assert tracker.artifacts(job)["run"].path == str(run)
    assert tracker.metadata(job) == {"verb": "train", "run": str(run), "steps": 20, "last_metrics.ctr_auc": 0.7}


def test_every_input_of_several_is_a_source(tracked: Path, tmp_path: Path) -> None:
    tell_trackers("score", {"run": tmp_path / "run", "input": [tmp_path / "a", tmp_path / "b"], "out": tmp_path / "out"}, {"rows": 7})
    tracker = FsspecTracker(fsspec.filesystem("file"), str(tracked))
    assert {Path(source.source_run_id).name for source in tracker.sources("local_cwd://s/train-1")} == {"run", "a", "b"}
    assert tracker.artifacts("local_cwd://s/train-1")["predictions"].path == str(tmp_path / "out")


def test_a_tracker_that_fails_costs_a_warning(tracked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracked.rmdir()
    with caplog.at_level(logging.WARNING):
        tell_trackers("train", {"data": tmp_path, "out": tmp_path / "run"}, {})
    assert "trackers (fsspec) were not told of this job: AssertionError" in caplog.text


def test_what_makes_nothing_tells_nothing(tracked: Path) -> None:
    tell_trackers("doctor", {}, {"ok": True})
    assert list(tracked.iterdir()) == []
