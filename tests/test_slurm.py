"""A real Slurm cluster of two nodes on this machine (`tests/slurm/cluster.sh`): what torchx submits runs there, and comes to the same."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.ranks import run_ranks
from tests.raw_tables import raw_table, write_config

CLUSTER = Path(__file__).parent / "slurm" / "cluster.sh"
NEEDED = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")
MISSING = [name for name in NEEDED if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: tests/slurm/cluster.sh install, as root"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons are started as root"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a command that uses the cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "SLURM_CONF": str(folder / "slurm.conf")}
    try:
        subprocess.run(["bash", str(CLUSTER), "start", str(folder)], env=environment, timeout=240, check=True, stdout=subprocess.DEVNULL)
        yield environment
    finally:
        subprocess.run(["bash", str(CLUSTER), "stop", str(folder)], env=environment, timeout=60, check=True)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, raw logs and candidates."""
    root = tmp_path_factory.mktemp("logs")
    (root / "raw").mkdir()
    pq.write_table(raw_table(3_000, 0, labels=True), root / "raw" / "a.parquet")
    pq.write_table(raw_table(400, 1), root / "candidates.parquet")
    write_config(root / "config.yaml")
    return root


def _command(logs: Path, out: Path, *more: str) -> list[str]:
    arguments = ["--config", str(logs / "config.yaml"), "--input", str(logs / "raw"), "--out", str(out)]
    arguments += ["--scheduler", "slurm", "--scheduler-args", "partition=cpu", "--job", "j=2x1", *more]
    return [sys.executable, "-m", "escm2rec", "pipeline", *arguments]


def _train_here(logs: Path, out: Path, folder: Path, *overrides: str) -> list[dict[str, float]]:
    """Losses of the same training on two ranks of this machine, without a cluster."""
    call = {"config_file": str(logs / "config.yaml"), "data": str(out / "data"), "out": str(folder / "here"), "overrides": [*overrides]}
    run_ranks(2, [("tests.training_calls:train_file", call)], folder / "ranks")
    return _losses(folder / "here")


def _losses(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name.startswith("loss_")} for record in records]


@pytest.mark.timeout(600)
def test_a_pipeline_runs_on_two_nodes_and_its_training_is_that_of_two_ranks_here(
    cluster: dict[str, str], logs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = _command(logs, out, "--candidates", str(logs / "candidates.parquet"), "--set", "training.log_every_steps=10")
    done = subprocess.run(command, env=cluster, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    assert {told["state"] for told in json.loads(done.stdout)["stages"].values()} == {"done"}
    assert json.loads((out / "run" / "manifest.json").read_text())["world_size"] == 2
    jobs = subprocess.run(
        ["sacct", "-nXP", "-o", "JobName,NNodes,State"], env=cluster, capture_output=True, text=True, timeout=60, check=True
    )
    ran = [line.split("|") for line in jobs.stdout.splitlines()]
    assert [state for *_, state in ran] == ["COMPLETED"] * len(ran)
    assert {name.partition("-")[0] for name, *_ in ran} == {"preprocess", "train", "evaluate", "score"}
    assert sum(len(pq.read_table(part)) for part in (out / "predictions").glob("part-*.parquet")) == 400
    assert {path.name.split("-")[2] for path in (out / "jobs").glob("slurm-*-0.err")} == {"preprocess", "train", "evaluate", "score"}
    for verb in ("preprocess", "train", "evaluate", "score"):
        assert re.search(rf"^{verb}/[01] .*{{", done.stderr, re.MULTILINE), f"what {verb} prints is handed on"
    expected = _train_here(logs, out, tmp_path, "training.log_every_steps=10")
    assert len(expected) >= 4
    assert _losses(out / "run") == expected, "bit for bit"


def _tasks(node: str) -> list[int]:
    """The processes of jobs on a node, by what Slurm tells them of it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                if f"SLURMD_NODENAME={node}\0".encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
    return found


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


def _lose(node: str, whole: bool, environment: dict[str, str]) -> list[int]:
    """Kill a node's slurmd; and, if `whole`, what it started: the processes of jobs and their slurmstepd. The processes of jobs there."""
    tasks = _tasks(node)
    steps = {_parent(pid) for pid in tasks} - set(tasks)
    assert tasks
    os.kill(int((Path(environment["SLURM_CONF"]).parent / f"{node}.pid").read_text()), signal.SIGKILL)
    for pid in [*steps, *tasks] if whole else []:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return tasks


def _until(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not so in {seconds:g} s"
        time.sleep(0.5)


@pytest.mark.skipif("ESCM2REC_SLURM_PROOF" not in os.environ, reason="7 minutes each: make prove")
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("whole", [True, False], ids=["node", "slurmd"])
def test_a_job_whose_node_is_lost_goes_on_by_itself_to_the_same_end(
    cluster: dict[str, str], logs: Path, tmp_path: Path, whole: bool
) -> None:
    """Of two nodes the second, while a training runs: with all that runs there, or its slurmd alone, whose rank lives on as an orphan."""
    out = tmp_path / "out"
    more = ["--job", "max_retries=3", "--set", "training.epochs=40", "--set", "training.checkpoint_every_steps=50"]
    more += ["--set", "training.log_every_steps=1"]  # a checkpoint has a record too, of the steps since the one before
    with (tmp_path / "log").open("w") as log:
        began = time.monotonic()
        pipeline = subprocess.Popen(_command(logs, out, *more), env=cluster, stdout=log, stderr=log)
        try:
            _until(lambda: (out / "run" / "checkpoints" / "step-50").is_dir(), 240)
            owner = (out / "run" / ".owner").read_text()
            orphans = _lose("node2", whole, cluster)
            lost = time.monotonic()
            sinfo = ["sinfo", "-hN", "-n", "node2", "-o", "%t"]
            _until(lambda: "down" in subprocess.run(sinfo, env=cluster, capture_output=True, text=True, check=True).stdout, 90)
            subprocess.run(["slurmd", "-N", "node2"], env=cluster, check=True, timeout=30)
            _until(lambda: (out / "run" / ".owner").read_text() != owner, 400)
            again = time.monotonic()
            assert pipeline.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-4000:]
        finally:
            pipeline.kill()
    steps = [record["step"] for record in map(json.loads, (out / "run" / "metrics.jsonl").read_text().splitlines())]
    assert steps == sorted(set(steps)), "each once: nothing of the lost job was written after its successor began"
    expected = _train_here(logs, out, tmp_path, "training.epochs=40", "training.log_every_steps=1")
    assert _losses(out / "run") == expected, "bit for bit"
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), 60)
    proof = Path(os.environ["ESCM2REC_SLURM_PROOF"])
    held = json.loads(proof.read_text()) if proof.exists() else {}
    held["date"] = datetime.date.today().isoformat()
    held["node" if whole else "slurmd"] = {
        "trained_again_after_s": round(again - lost, 1),
        "whole_s": round(time.monotonic() - began, 1),
        "records": len(expected),
        "losses_equal_bit_for_bit": True,
    }
    proof.write_text(json.dumps(held, indent=1) + "\n")
