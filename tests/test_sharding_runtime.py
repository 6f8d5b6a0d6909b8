"""How a rank ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit
import os
import sys

def tell():  # registered first, so called last
    names = [open(f"/proc/self/task/{number}/comm").read().strip() for number in os.listdir("/proc/self/task")]
    print("at exit", sorted(name for name in names if "gloo" in name))

atexit.register(tell)

import torch
import torch.distributed as dist
from escm2rec.sharding.runtime import distributed_runtime

def main():
    with distributed_runtime() as runtime:
        model = torch.nn.Module()
        model.itself, model.runtime = [model], runtime  # as a sharded model has it, whose parts know the whole
        dist.all_reduce(torch.ones(1), group=runtime.group)
        if sys.argv[1] == "error":
            sys.exit(3)

main()
"""


@pytest.mark.parametrize(("how", "code"), [("done", 0), ("error", 3)])
def test_no_thread_of_gloo_is_left_when_python_ends(how: str, code: int) -> None:
    """One that is would abort the process now and then: it takes Python's lock to let go of a tensor."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (code, "at exit []\n"), done.stderr
