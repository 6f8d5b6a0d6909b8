"""Raw logs to predictions by jobs of a scheduler: the local one, which starts processes here; others as far as their requests."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from escm2rec.errors import ConfigError, RunError
from escm2rec.pipeline import CONFIG, STATE, Stage, _Run, _State, pipeline
from tests.raw_tables import raw_table, write_config

ROWS, CANDIDATES = 3_000, 400


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, raw logs and candidates."""
    root = tmp_path_factory.mktemp("logs")
    (root / "raw").mkdir()
    pq.write_table(raw_table(ROWS, 0, labels=True), root / "raw" / "a.parquet")
    pq.write_table(raw_table(CANDIDATES, 1), root / "candidates.parquet")
    write_config(root / "config.yaml")
    return root


def _command(logs: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--config", str(logs / "config.yaml"), "--input", str(logs / "raw"), "--out", str(out)]
    arguments += ["--candidates", str(logs / "candidates.parquet"), "--job", "j=1x2", *more]
    command = [sys.executable, "-m", "escm2rec", "pipeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def _call(logs: Path, out: Path, scheduler: str = "local_cwd", **more: Any) -> dict[str, Any]:
    return pipeline(logs / "config.yaml", logs / "raw", out, scheduler, **more)


def _states(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr[-4000:]
    return {verb: told["state"] for verb, told in json.loads(done.stdout)["stages"].items()}


@pytest.fixture(scope="module")
def made(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[subprocess.CompletedProcess[str]]]:
    """A pipeline whose first call fails, for a file that is no Parquet, and whose second is that call again."""
    out, broken = tmp_path_factory.mktemp("made") / "out", logs / "raw" / "b.parquet"
    broken.write_bytes((logs / "raw" / "a.parquet").read_bytes()[:-100])
    failed = _command(logs, out)
    broken.unlink()
    return out, [failed, _command(logs, out)]


def test_a_stage_that_fails_ends_the_pipeline_with_its_own_error(made: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    _, (failed, _) = made
    assert failed.returncode == 1
    error, hint = (line for line in failed.stderr.splitlines() if line.startswith(("error: ", "hint: ")))
    assert error.startswith("error: preprocess: local_cwd://")
    assert "ended as FAILED: " in error
    assert "b.parquet" in error
    assert hint.endswith("then the same command goes on at preprocess")
    assert "preprocess │ failed" in failed.stderr
    assert "train      │ waits" in failed.stderr
    assert failed.stdout == ""


def test_the_same_command_goes_on_to_the_end(made: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    out, (_, whole) = made
    assert _states(whole) == dict.fromkeys(["preprocess", "train", "evaluate", "score"], "done")
    assert json.loads((out / "data" / "manifest.json").read_text())["splits"]["train"]["rows"] > ROWS // 2
    assert json.loads((out / "run" / "manifest.json").read_text())["world_size"] == 2
    assert (out / "run" / "report.html").is_file()
    assert sum(len(pq.read_table(part)) for part in (out / "predictions").glob("part-*.parquet")) == CANDIDATES
    assert "train/0 " in whole.stderr, "what a job logs is handed on"
    assert "score      │ done" in whole.stderr
    assert {path.name for path in out.iterdir()} == {"data", "run", "predictions", "jobs", STATE, CONFIG}


def test_only_what_is_missing_is_done(logs: Path, made: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    out, _ = made
    before = (out / "run" / "manifest.json").stat().st_mtime_ns
    shutil.rmtree(out / "predictions")
    assert _states(_command(logs, out)) == {"preprocess": "was done", "train": "was done", "evaluate": "was done", "score": "done"}
    assert (out / "run" / "manifest.json").stat().st_mtime_ns == before


def test_what_was_made_of_older_input_is_made_again_or_refused(
    logs: Path, made: tuple[Path, list[subprocess.CompletedProcess[str]]]
) -> None:
    out, _ = made
    data, run, report = out / "data" / "manifest.json", out / "run" / "manifest.json", out / "run" / "report.html"
    when = run.stat().st_mtime
    os.utime(report, (when - 10, when - 10))
    assert _states(_command(logs, out)) == {"preprocess": "was done", "train": "was done", "evaluate": "done", "score": "was done"}
    os.utime(run, (data.stat().st_mtime - 10,) * 2)
    refused = _command(logs, out)
    assert refused.returncode == 2
    assert f"{data.parent} was made again after {run.parent} was trained\nhint: remove {run.parent}, and train anew" in refused.stderr
    os.utime(run, (when, when))


def test_two_pipelines_do_not_work_on_one_folder(logs: Path, made: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    out, _ = made
    with (out / STATE).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another pipeline works on .*\nhint: wait for it"):
            _call(logs, out)


def test_other_settings_are_refused(logs: Path, made: tuple[Path, list[subprocess.CompletedProcess[str]]]) -> None:
    out, _ = made
    cases: list[tuple[dict[str, Any], str]] = [
        ({"overrides": ["training.epochs=3"]}, "was begun with another config"),
        ({"split": "validation"}, "was begun with --split test, not validation"),
        ({"candidates": logs / "raw"}, f"was begun with --candidates {logs / 'candidates.parquet'}, not {logs / 'raw'}"),
    ]
    for more, said in cases:
        with pytest.raises(ConfigError, match=r"hint: give another --out, or remove it to begin anew") as caught:
            _call(logs, out, **more)
        assert caught.value.message == f"{out} {said}"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"scheduler": "slrum"}, "TorchX has no scheduler 'slrum'; did you mean 'slurm'?"),
        ({"job": ["jj=1x2"]}, "--job jj: no component has such an argument; did you mean 'j'?"),
        ({"job": ["out=there"]}, "--job out: no component has such an argument"),
        ({"job": ["cpu=two"]}, "local_cwd takes no request for preprocess: "),
        (
            {"scheduler": "slurm", "scheduler_args": "partiton=gpu"},
            "--scheduler-args partiton: slurm takes no such argument; did you mean 'partition'?",
        ),
        ({"candidates": Path("/a,b")}, "/a,b does not exist"),
        ({"job": ["1x2"]}, "--job '1x2' is no NAME=VALUE"),
        ({"candidates": Path("/nowhere/at/all")}, "/nowhere/at/all does not exist"),
        ({"job": ["j=two"]}, "local_cwd takes no request for train: "),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_submitted(logs: Path, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _call(logs, tmp_path / "out", **more)
    assert caught.value.message.startswith(said)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(logs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=rf"holds files, and no {STATE}: it is of no pipeline"):
        _call(logs, tmp_path)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "words"),
    [("slurm", "partition=cpu", "#SBATCH --job-name=train-0 --requeue --partition=cpu"), ("kubernetes", "queue=q", "apps/score.py")],
)
def test_a_dry_run_prints_every_request(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scheduler: str, arguments: str, words: str
) -> None:
    more = {"candidates": logs / "candidates.parquet", "scheduler_args": arguments, "job": ["j=2x1", "image=there"], "dryrun": True}
    assert _call(logs, tmp_path / "out", scheduler, **more) == {"dryrun": ["preprocess", "train", "evaluate", "score"]}
    printed = capsys.readouterr().err
    for verb in ("preprocess", "train", "evaluate", "score"):
        assert f"=== {verb}\n" in printed
        assert f"apps/{verb}.py" in printed
    assert words in printed
    assert not (tmp_path / "out").exists()


class _Cluster:
    """A scheduler that outlives the command, as far as a pipeline sees it: one job, which runs from the start."""

    def __init__(self, done: Path, state: str = "SUCCEEDED", forgets: bool = False, silent: bool = False, makes: bool = True) -> None:
        self.done, self.state, self.forgets, self.silent, self.makes = done, state, forgets, silent, makes
        self.submitted = 0

    def status(self, handle: str) -> Any:
        if self.silent:
            raise ConnectionError("no answer")
        return None if self.forgets else SimpleNamespace(is_terminal=lambda: False)

    def schedule(self, request: object) -> str:
        self.submitted += 1
        return f"cluster://job/{self.submitted}"

    def log_lines(self, handle: str, role: str, replica: int, should_tail: bool, streams: object) -> Iterator[str]:
        yield f"{handle}: a line of {role} {replica}\n"

    def wait(self, handle: str, wait_s: float) -> Any:
        if self.state == "SUCCEEDED" and self.makes:
            self.done.touch()
        return SimpleNamespace(state=SimpleNamespace(name=self.state)) if self.state != "LOST" else None


def _run(cluster: _Cluster, folder: Path, grace_s: float = 0.0) -> dict[str, Any]:
    stage = Stage("train", {}, cluster.done)
    request: Any = SimpleNamespace(_app=SimpleNamespace(roles=[SimpleNamespace(name="train", num_replicas=2)]))
    (folder / STATE).write_text(json.dumps({"begun": {}, "job": {"stage": "train", "handle": "cluster://job/of_before"}}))
    state = _State(folder / STATE, json.loads((folder / STATE).read_text()))
    told: dict[str, Any] = _Run(cluster, [stage], [request], state, 0.1, grace_s).run()["stages"]["train"]
    return told


def test_a_job_of_which_nobody_knows_is_not_submitted_again(tmp_path: Path) -> None:
    cluster = _Cluster(tmp_path / "done", silent=True)
    with pytest.raises(
        RunError, match=r"nobody says whether cluster://job/of_before still runs: ConnectionError: no answer\nhint: ask the scheduler"
    ):
        _run(cluster, tmp_path)
    assert cluster.submitted == 0


def test_a_job_that_still_runs_is_waited_for_and_one_that_is_gone_is_submitted_again(tmp_path: Path) -> None:
    for forgets, job, submitted in ((False, "cluster://job/of_before", 0), (True, "cluster://job/1", 1)):
        folder = tmp_path / str(forgets)
        folder.mkdir()
        cluster = _Cluster(folder / "done", forgets=forgets)
        told = _run(cluster, folder)
        assert (told["job"], told["state"], cluster.submitted) == (job, "done", submitted)
        assert json.loads((folder / STATE).read_text())["job"] is None


def test_a_job_that_is_put_back_into_the_queue_is_waited_for(tmp_path: Path) -> None:
    """As Slurm does with one whose node is lost: it has failed for some seconds, then it waits and runs again."""
    cluster = _Cluster(tmp_path / "done", "FAILED")
    ends = iter(["FAILED", "FAILED", "SUCCEEDED"])
    wait = cluster.wait

    def wait_again(handle: str, wait_s: float) -> Any:
        cluster.state = next(ends)
        return wait(handle, wait_s)

    cluster.wait = wait_again  # type: ignore[method-assign]
    assert _run(cluster, tmp_path, grace_s=5)["state"] == "done"
    assert next(ends, None) is None, "each end was seen"


def test_how_a_job_ended_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for state, said in (
        ("FAILED", "ended as FAILED: cluster://job/of_before: a line of train "),
        ("LOST", "is not known to the scheduler any more: cluster://job/of_before: a line of train "),
    ):
        with pytest.raises(RunError) as caught:
            _run(_Cluster(tmp_path / "done", state), tmp_path)
        assert caught.value.message.startswith(f"train: cluster://job/of_before {said}")
    monkeypatch.setattr("escm2rec.pipeline.APPEARS_S", 0.1)
    with pytest.raises(RunError, match=r"of_before succeeded, and .*done is not there\nhint: do the jobs see --out under the same path"):
        _run(_Cluster(tmp_path / "done", makes=False), tmp_path)
