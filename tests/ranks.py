"""Runs a list of calls on several real ranks, which are forked from one process that has imported torch: starting each took seconds.

torchrun itself starts the ranks that `test_training.py` kills, those of the soak, of the components and of the commands.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import traceback
import uuid
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import torch

CALL_TIMEOUT_S = 180
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PRELOADED = ["tests.training_calls", "tests.ranks"]


def run_ranks(world_size: int, calls: list[tuple[str, dict[str, Any]]], folder: Path, timeout_s: float = CALL_TIMEOUT_S) -> list[Any]:
    """Each call ('module:function', keyword arguments as JSON) on `world_size` ranks, in one process group; rank 0's results.

    A call that raises an Escm2Error gives {"error": type, "message": ...} and the others still run. What the
    ranks said is in the file `stderr` of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo, done, said = folder / "calls.json", folder / "results.json", folder / "stderr"
    todo.write_text(json.dumps(calls))
    said.write_text("")
    launcher = _start(world_size, todo, done, said)
    try:
        launcher.join(timeout_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid or 0, signal.SIGKILL)
    launcher.join()
    if launcher.exitcode == -signal.SIGKILL:
        raise TimeoutError(f"{world_size} ranks still ran after {timeout_s:.0f} s:\n{said.read_text()[-6000:]}")
    assert launcher.exitcode == 0, f"{world_size} ranks failed:\n{said.read_text()[-6000:]}"
    return list(json.loads(done.read_text()))


def train_on_ranks(data: Path, out: Path, folder: Path, world_size: int = 1, *, overrides: list[str], **arguments: Any) -> dict[str, Any]:
    """What `train` returns, or the error it raises as `run_ranks` tells it, of the tests' config with `overrides`."""
    call = ("tests.training_calls:train_run", {"data": str(data), "out": str(out), "overrides": overrides, **arguments})
    result: dict[str, Any] = run_ranks(world_size, [call], folder)[0]
    return result


def _start(world_size: int, *files: Path) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.copy()
    os.environ |= ONE_THREAD  # read when libraries are loaded, by the process that all others are forked from
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    environment = {**before, **ONE_THREAD, "WORLD_SIZE": f"{world_size}", "LOCAL_WORLD_SIZE": f"{world_size}"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{_free_port()}", "TORCHELASTIC_RUN_ID": uuid.uuid4().hex}
    if world_size > torch.cuda.device_count():  # more ranks than GPUs train on cores
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launcher = context.Process(target=_launch, args=(world_size, environment, *files))
    launcher.start()
    return launcher


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _launch(world_size: int, environment: Mapping[str, str], todo: Path, done: Path, said: Path) -> None:
    """What torchrun does: start the ranks, and end all as soon as one ends badly. It is their parent, by which a run knows its launch."""
    os.setsid()  # ended together, by their group
    os.environ.clear()
    os.environ |= environment
    with said.open("a") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    ranks = {}
    for rank in range(world_size):
        if (pid := os.fork()) == 0:
            _rank(rank, todo, done)
        ranks[pid] = rank
    while ranks:
        pid, status = os.wait()
        if status:
            print(f"rank {ranks[pid]} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
            for other in ranks.keys() - {pid}:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
        del ranks[pid]


def _rank(rank: int, todo: Path, done: Path) -> NoReturn:
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    status = 1
    try:
        _work(todo, done)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _work(todo: Path, done: Path) -> None:
    from escm2rec.errors import Escm2Error
    from escm2rec.sharding.runtime import distributed_runtime

    results: list[Any] = []
    with distributed_runtime() as runtime:
        for name, arguments in json.loads(todo.read_text()):
            module, _, function = name.partition(":")
            try:
                results.append(getattr(importlib.import_module(module), function)(**arguments))
            except Escm2Error as error:
                results.append({"error": type(error).__name__, "message": str(error), "hint": error.hint})
        if runtime.is_main:
            done.write_text(json.dumps(results))
