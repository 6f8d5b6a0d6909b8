"""What each component submits, without a cluster; and two real launches on this machine."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import typer.main
from torchx.runner import Runner, get_runner
from torchx.schedulers import get_scheduler_factories
from torchx.specs.file_linter import get_fn_docstring, validate
from torchx.tracker.backend.fsspec import FsspecTracker

from escm2rec.cli import app
from tests.raw_tables import raw_table, write_config

ROOT = Path(__file__).parents[1]
FILE = ROOT / "torchx_components" / "escm2rec.py"
SINGLE = ("simulate", "preprocess", "study", "export")
DISTRIBUTED = ("train", "evaluate", "score")
VERBS = (*SINGLE, *DISTRIBUTED)
JOB_ARGUMENTS = {"image", "name", "h", "cpu", "memory_mb", "env", "max_retries", "mounts"}
RANK_ARGUMENTS = {"j", "gpu", "rdzv_port"}
SCHEDULERS: dict[str, dict[str, Any]] = {"local_cwd": {}, "slurm": {"partition": "cpu"}, "kubernetes": {"queue": "default"}}
if "validate_spec" in get_scheduler_factories()["kubernetes"]("dryrun").run_opts()._opts:
    SCHEDULERS["kubernetes"]["validate_spec"] = False  # TorchX after 0.7.0 would ask a cluster

# Of each verb: the component's arguments, and the command line they become.
EXAMPLES: dict[str, tuple[list[str], list[str]]] = {
    "simulate": (
        ["--out", "o", "--impressions", "7", "--format", "parquet", "--config", "c.yaml", "--set", "simulation.ctr=0.1"],
        ["--out", "o", "--impressions", "7", "--seed", "0", "--format", "parquet", "--config", "c.yaml", "--set", "simulation.ctr=0.1"],
    ),
    "preprocess": (
        ["--config", "c.yaml", "--input", "i", "--out", "o", "--memory_gib", "1.5", "--overwrite", "True"],
        ["--config", "c.yaml", "--input", "i", "--out", "o", "--memory-gib", "1.5", "--overwrite"],
    ),
    "study": (
        ["--out", "o", "--preset", "full", "--objectives", "esmm,escm2-ips", "--seeds", "3"],
        ["--out", "o", "--preset", "full", "--objectives", "esmm", "--objectives", "escm2-ips", "--seeds", "3"],
    ),
    "export": (
        ["--run", "r", "--out", "o", "--weights", "int8", "--data", "d", "--rows", "9"],
        [
            *("--run", "r", "--out", "o", "--format", "torch-export", "--weights", "int8", "--data", "d", "--split", "test"),
            *("--rows", "9"),
        ],
    ),
    "train": (
        [
            *("--config", "c.yaml", "--data", "d", "--out", "a b", "--set", "training.epochs=2,model.tower_hidden=[8,4]"),
            *("--resume", "true", "--profile", "True", "--warm_start", "r", "--copy_to", "s3://b/r"),
        ],
        [
            "--config",
            "c.yaml",
            "--data",
            "d",
            "--out",
            "a b",
            "--set",
            "training.epochs=2",
            "--set",
            "model.tower_hidden=[8,4]",
            "--resume",
            "--profile",
            "--warm-start",
            "r",
            "--copy-to",
            "s3://b/r",
        ],
    ),
    "evaluate": (
        ["--run", "r", "--data", "d", "--by", "hour,page", "--user", "u"],
        ["--run", "r", "--data", "d", "--split", "test", "--by", "hour", "--by", "page", "--user", "u"],
    ),
    "score": (
        ["--run", "r", "--input", "a,b", "--out", "o", "--keep", "x"],
        ["--run", "r", "--input", "a", "--input", "b", "--out", "o", "--keep", "x"],
    ),
}


@pytest.fixture(scope="module")
def components() -> ModuleType:
    spec = importlib.util.spec_from_file_location("components_under_test", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with get_runner() as runner:
        yield runner


def commands(request: Any, scheduler: str) -> list[list[str]]:
    """The command of every node in a scheduler's request."""
    if scheduler == "local_cwd":
        return [replica.args for replicas in request.role_params.values() for replica in replicas]
    if scheduler == "slurm":
        return [[replica.entrypoint, *replica.args] for replica in request.replicas.values()]
    tasks = request.resource["spec"]["tasks"]
    return [task["template"].spec.containers[0].command for task in tasks]


# --- what a component is ------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_torchx_lint_passes(verb: str) -> None:
    assert validate(str(FILE), verb) == []


@pytest.mark.parametrize("verb", VERBS)
def test_component_takes_the_options_of_its_verb(verb: str, components: ModuleType) -> None:
    commands: Any = typer.main.get_command(app)
    options = {option.removeprefix("--").replace("-", "_") for parameter in commands.commands[verb].params for option in parameter.opts} - {
        "help"
    }
    parameters = inspect.signature(getattr(components, verb)).parameters
    job = JOB_ARGUMENTS | (RANK_ARGUMENTS if verb in DISTRIBUTED else set())
    assert set(parameters) == options | job
    for parameter in commands.commands[verb].params:
        default = parameters[parameter.opts[0].removeprefix("--").replace("-", "_")].default
        assert (default is inspect.Parameter.empty) == parameter.required


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_is_explained(verb: str, components: ModuleType) -> None:
    component = getattr(components, verb)
    summary, explained = get_fn_docstring(component)
    assert len(summary) > 20
    assert [name for name in inspect.signature(component).parameters if not explained[name].strip()] == []


def test_components_import_torchx_only() -> None:
    program = f"import sys, runpy; runpy.run_path({str(FILE)!r}); print([m for m in ('torch', 'escm2rec', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# --- what a component submits -------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("verb", SINGLE)
def test_single_process_request(runner: Runner, verb: str, scheduler: str) -> None:
    arguments, expected = EXAMPLES[verb]
    info = runner.dryrun_component(f"{FILE}:{verb}", arguments, scheduler, SCHEDULERS[scheduler])
    assert commands(info.request, scheduler) == [["python", f"apps/{verb}.py", *expected]]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("verb", DISTRIBUTED)
def test_distributed_request(runner: Runner, verb: str, scheduler: str) -> None:
    arguments, expected = EXAMPLES[verb]
    job = ["-j", "2x3", "--rdzv_port", "29511"]
    info = runner.dryrun_component(f"{FILE}:{verb}", [*job, *arguments], scheduler, SCHEDULERS[scheduler])
    nodes = commands(info.request, scheduler)
    assert len(nodes) == 2
    for shell, flag, command in nodes:
        assert (shell, flag) == ("bash", "-c")
        torchrun, script, options = command.partition(f" -- apps/{verb}.py ")
        assert script
        assert "--nnodes 2 --nproc_per_node 3 " in torchrun
        assert torchrun.endswith(" --max-restarts 0")
        assert re.search(r"--rdzv_endpoint \S+:29511 ", torchrun)
        assert shlex.split(options) == expected


def test_resources_and_environment_are_asked_for(runner: Runner) -> None:
    arguments = [*EXAMPLES["train"][0], "-j", "1x8", "--cpu", "16", "--gpu", "8", "--memory_mb", "64000", "--env", "A=1,B=2"]
    arguments += ["--max_retries", "3", "--mounts", "type=bind,src=/logs,dst=/data,readonly", "--image", "escm2rec:1", "--name", "nightly"]
    info = runner.dryrun_component(f"{FILE}:train", arguments, "kubernetes", SCHEDULERS["kubernetes"])
    (task,) = info.request.resource["spec"]["tasks"]
    (container,) = task["template"].spec.containers
    assert container.image == "escm2rec:1"
    assert container.resources.limits == {"cpu": "16000m", "memory": "64000M", "nvidia.com/gpu": "8"}
    assert {"A": "1", "B": "2", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}.items() <= {
        variable.name: variable.value for variable in container.env
    }.items()
    assert ("/data", True) in {(mount.mount_path, mount.read_only) for mount in container.volume_mounts}
    assert task["maxRetry"] == 3
    assert "--max-restarts 3 -- apps/train.py" in " ".join([*container.command, *(container.args or [])])
    assert info.request.resource["metadata"]["name"].startswith("nightly-")


def test_named_resource_takes_precedence(runner: Runner) -> None:
    arguments = [*EXAMPLES["simulate"][0], "--h", "aws_m5.2xlarge"]
    info = runner.dryrun_component(f"{FILE}:simulate", arguments, "slurm", SCHEDULERS["slurm"])
    (replica,) = info.request.replicas.values()
    assert replica.sbatch_opts["cpus-per-task"] == "8"


@pytest.mark.parametrize(
    ("name", "cores", "gpus"), [("cpu_small", "4", None), ("cpu_large", "32", None), ("gpu_h100_1", "12", "1"), ("gpu_h100_8", "96", "8")]
)
def test_hosts_of_this_package_have_names(runner: Runner, name: str, cores: str, gpus: str | None) -> None:
    info = runner.dryrun_component(f"{FILE}:train", [*EXAMPLES["train"][0], "-j", "2x8", "--h", name], "slurm", SCHEDULERS["slurm"])
    assert len(info.request.replicas) == 2
    for replica in info.request.replicas.values():
        assert replica.sbatch_opts["cpus-per-task"] == cores
        assert replica.sbatch_opts.get("gpus-per-task") == gpus


def test_a_training_may_begin_with_fewer_nodes_than_it_may_have(runner: Runner) -> None:
    """TorchX 0.7 asks a scheduler for the most, and torchrun is told the least."""
    info = runner.dryrun_component(f"{FILE}:train", [*EXAMPLES["train"][0], "-j", "1:3x2"], "slurm", SCHEDULERS["slurm"])
    assert len(info.request.replicas) == 3
    assert all("--nnodes 1:3 --nproc_per_node 2 " in command for *_, command in commands(info.request, "slurm"))


# --- real launches ------------------------------------------------------------------------------


def launch(cwd: Path, *arguments: str, **environment: str) -> str:
    """`torchx run -s local_cwd`, with this environment's programs first on PATH; what it printed."""
    environment = {**os.environ, **environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd", *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_simulate_runs_under_torchx_and_its_tracker_knows(tmp_path: Path) -> None:
    (tmp_path / "tracked").mkdir()
    (tmp_path / "tracker.conf").write_text(f"protocol=file\nroot_path={tmp_path / 'tracked'}\n", encoding="utf-8")
    (tmp_path / "torchxconfig").write_text(
        f"[torchx:tracker]\nfsspec=\n[tracker:fsspec]\nconfig={tmp_path / 'tracker.conf'}\n", encoding="utf-8"
    )
    arguments = (f"{FILE}:simulate", "--out", str(tmp_path / "logs"), "--impressions", "50")
    printed = launch(ROOT, *arguments, TORCHXCONFIG=str(tmp_path / "torchxconfig"))
    assert "SUCCEEDED" in printed
    assert (tmp_path / "logs" / "manifest.json").is_file()
    tracker = FsspecTracker(fsspec.filesystem("file"), str(tmp_path / "tracked"))
    (job,) = tracker.run_ids()
    assert job.startswith("local_cwd://")
    assert tracker.artifacts(job)["logs"].path == str(tmp_path / "logs")
    assert tracker.metadata(job)["impressions"] == 50


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def test_two_nodes_are_two_agents(tmp_path: Path) -> None:
    apps = tmp_path / "apps"
    apps.mkdir()
    (apps / "train.py").write_text(
        "import json, os, sys\n"
        "told = {name: os.environ[name] for name in ('RANK', 'GROUP_RANK', 'LOCAL_RANK', 'WORLD_SIZE')}\n"
        "open(f'rank{told[\"RANK\"]}.json', 'w').write(json.dumps([told, sys.argv[1:]]))\n",
        encoding="utf-8",
    )
    arguments = ["--config", "c", "--data", "d", "--out", "o"]
    launch(tmp_path, f"{FILE}:train", "-j", "2x1", "--rdzv_port", free_port(), *arguments)
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert [argv for _, argv in told] == [arguments, arguments]
    assert {ranks["GROUP_RANK"] for ranks, _ in told} == {"0", "1"}
    assert [(ranks["LOCAL_RANK"], ranks["WORLD_SIZE"]) for ranks, _ in told] == [("0", "2"), ("0", "2")]


def test_every_verb_works_under_torchx(tmp_path: Path) -> None:
    """Raw table to predictions; training on two agents of one rank, the rest on one agent of two."""
    config, logs, data, run, out = (str(tmp_path / name) for name in ("config.yaml", "logs", "data", "run", "predictions"))
    write_config(Path(config))
    Path(logs).mkdir()
    pq.write_table(raw_table(2_000, seed=0, labels=True), Path(logs) / "a.parquet")
    launch(ROOT, f"{FILE}:preprocess", "--config", config, "--input", logs, "--out", data)
    launch(ROOT, f"{FILE}:train", "-j", "2x1", "--rdzv_port", free_port(), "--config", config, "--data", data, "--out", run)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["world_size"] == 2
    launch(ROOT, f"{FILE}:evaluate", "-j", "1x2", "--run", run, "--data", data)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["impressions"] > 100
    launch(ROOT, f"{FILE}:score", "-j", "1x2", "--run", run, "--input", logs, "--out", out, "--keep", "row,user")
    manifest = json.loads((tmp_path / "predictions" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["columns"]) == (2_000, ["row", "user", "p_ctr", "p_cvr", "p_ctcvr"])


def test_components_are_those_of_the_nightly_torchx_too(tmp_path: Path) -> None:
    """All that is above but what launches, with the nightly of requirements/torchx_nightly.txt in the place of the release."""
    pinned = ROOT / "requirements" / "torchx_nightly.txt"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "-q",
        "install",
        "--no-deps",
        "--target",
        str(tmp_path),
        "-r",
        str(pinned),
    ]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
    if installed.returncode != 0:
        pytest.skip(f"pip has no nightly torchx: {installed.stderr.strip().splitlines()[-1]}")
    version = next(tmp_path.glob("torchx_nightly-*.dist-info")).name
    launching = "runs_under_torchx or two_nodes or works_under_torchx or nightly"
    chosen = ["-k", f"not ({launching})", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider", "-o", "addopts="]
    again = [sys.executable, "-m", "pytest", __file__, *chosen]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    where = subprocess.run(
        [sys.executable, "-c", "import torchx; print(torchx.__file__)"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert where.stdout.startswith(str(tmp_path)), "the nightly is what is imported"
    done = subprocess.run(again, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{version}:\n{done.stdout[-4000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 40
