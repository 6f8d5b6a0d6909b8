"""Runs a list of calls on several real ranks: `run_ranks` starts torchrun on this file, which is the worker too."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

CALL_TIMEOUT_S = 180


def run_ranks(world_size: int, calls: list[tuple[str, dict[str, Any]]], folder: Path, timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
    """Each call ('module:function', keyword arguments as JSON) on `world_size` ranks, in one process group; rank 0's results.

    A call that raises an Escm2Error gives {"error": type, "message": ...} and the others still run. What the
    ranks said is in the file `stderr` of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo, done = folder / "calls.json", folder / "results.json"
    todo.write_text(json.dumps(calls))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", "-m", "tests.ranks"]
    python_path = os.pathsep.join([str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    if world_size > torch.cuda.device_count():  # more ranks than GPUs train on cores
        environment["CUDA_VISIBLE_DEVICES"] = ""
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, str(todo), str(done)], env=environment, stdout=pipe, stderr=pipe, text=True) as torchrun:
        try:
            _, said = torchrun.communicate(timeout=timeout_s)
        except BaseException:
            torchrun.terminate()  # not killed: the ranks are sessions of their own, which only torchrun ends
            raise
    (folder / "stderr").write_text(said)
    assert torchrun.returncode == 0, f"{world_size} ranks failed:\n{said[-6000:]}"
    return list(json.loads(done.read_text()))


def train_on_ranks(data: Path, out: Path, folder: Path, world_size: int = 1, *, overrides: list[str], **arguments: Any) -> dict[str, Any]:
    """What `train` returns, or the error it raises as `run_ranks` tells it, of the tests' config with `overrides`."""
    call = ("tests.training_calls:train_run", {"data": str(data), "out": str(out), "overrides": overrides, **arguments})
    result: dict[str, Any] = run_ranks(world_size, [call], folder)[0]
    return result


def main() -> None:
    """The worker: one rank of `run_ranks`."""
    from escm2rec.errors import Escm2Error
    from escm2rec.sharding.runtime import distributed_runtime

    results: list[Any] = []
    with distributed_runtime() as runtime:
        for name, arguments in json.loads(Path(sys.argv[1]).read_text()):
            module, _, function = name.partition(":")
            try:
                results.append(getattr(importlib.import_module(module), function)(**arguments))
            except Escm2Error as error:
                results.append({"error": type(error).__name__, "message": str(error), "hint": error.hint})
        if runtime.is_main:
            Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
