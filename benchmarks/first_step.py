"""Seconds from the start of a training to its first step done, fresh and resumed, on the demo's data. Prints one JSON object.

    python -m benchmarks.first_step --ranks 1 2 --rounds 3

From the start of `apps/train.py` (of torchrun, on several ranks) until its first record is there, with a record a step. Each round trains
afresh, is told to end by SIGTERM, which saves, and is started again. cpu_s: processor time of all its processes until then, which other
work on the machine changes less. imports_cpu_s: what of it a rank takes to import torch, torchrec and escm2rec.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, facts
from escm2rec.training.run import last_record

CONFIG = ROOT / "data" / "demo.yaml"
IMPORTS = "import escm2rec.training.train, time; print(time.process_time())"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def first_step(command: list[str], run: Path) -> dict[str, float]:
    """Start a training, and end it when the first step that it does has a record: `s` and `cpu_s` until then."""
    before = last_record(run).get("step", 0)
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        while last_record(run).get("step", 0) <= before:
            assert process.poll() is None, f"{' '.join(command)} ended with {process.returncode}"
            time.sleep(0.02)
        seconds, cpu = time.perf_counter() - began, cpu_seconds(process.pid)
        process.terminate()
    return {"s": seconds, "cpu_s": cpu}


def cpu_seconds(pid: int) -> float:
    """Of a process and all that it started, as far as they are there."""
    found = 0.0
    with suppress(FileNotFoundError, ProcessLookupError):
        found = sum(map(float, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")
        found += sum(map(cpu_seconds, map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())))
    return found


def measure(data: Path, ranks: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Medians of the rounds, fresh and resumed, and the wall clock of each."""
    run = folder / "run"
    start = [sys.executable, *((*TORCHRUN, "--nproc-per-node", str(ranks), "--") if ranks > 1 else ())]
    command = [*start, "apps/train.py", "--config", str(CONFIG), "--data", str(data), "--out", str(run), "--resume"]
    command += ["--set", "training.log_every_steps=1"]
    found: dict[str, list[dict[str, float]]] = {"fresh": [], "resumed": []}
    for _ in range(rounds):
        shutil.rmtree(run, ignore_errors=True)
        for each in found.values():
            each.append(first_step(command, run))
    medians = {
        f"{how}_{what}": round(statistics.median(one[what] for one in each), 2) for how, each in found.items() for what in ("s", "cpu_s")
    }
    return {"ranks": ranks, **medians, "seconds": {how: [round(one["s"], 2) for one in each] for how, each in found.items()}}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--impressions", type=int, default=300_000)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        logs, data = Path(place) / "logs", Path(place) / "data"
        simulate = ["simulate", "--config", str(CONFIG), "--out", str(logs), "--impressions", str(arguments.impressions)]
        for verb in (simulate, ["preprocess", "--config", str(CONFIG), "--input", str(logs), "--out", str(data)]):
            subprocess.run([sys.executable, "-m", "escm2rec", *verb], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        load = os.getloadavg()[0]
        imports = [float(subprocess.check_output([sys.executable, "-c", IMPORTS], cwd=ROOT)) for _ in range(arguments.rounds)]
        results = [measure(data, ranks, arguments.rounds, Path(place)) for ranks in arguments.ranks]
    print(
        json.dumps({"machine": facts(), "load": load, "imports_cpu_s": round(statistics.median(imports), 2), "results": results}, indent=1)
    )


if __name__ == "__main__":
    main()
