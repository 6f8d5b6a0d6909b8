"""Which of two starts of a training may write: `test_training.py` has two real ones."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from escm2rec.errors import RunError
from escm2rec.sharding.runtime import Runtime
from escm2rec.training import owner
from escm2rec.training.owner import Owner
from tests.small_disks import small_disk

TAKEN = (
    r"was taken over by a later start of this training, or replaced: this one ends, and writes nothing more\nhint: is the job running twice"
)


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield Runtime(0, 1, 1, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


def test_the_later_launch_writes_and_the_earlier_one_does_not_take_it_back(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(launch: str, began: float) -> Owner:
        monkeypatch.setattr(owner, "_launch", lambda: (launch, began))
        return Owner.take(tmp_path, runtime)

    first = take("job:0", 100.0)
    first.check()
    later = take("job:1", 130.0)
    later.check()
    with pytest.raises(RunError, match=TAKEN):
        first.check()
    with pytest.raises(RunError, match=TAKEN):  # its torchrun starts its ranks again
        take("job:0", 100.0)
    later.check()
    again = take("job:1", 129.0)  # of the same launch, with another machine's torchrun as the parent of rank 0
    again.check()
    with pytest.raises(RunError, match=TAKEN):
        later.check()
    (tmp_path / owner.FILE).unlink()
    with pytest.raises(RunError, match=TAKEN):
        again.check()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_owner_as_it_was(runtime: Runtime, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        held = Owner.take(disk, runtime)
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        with pytest.raises(OSError, match="No space left on device"):
            Owner.take(disk, runtime)
        held.check()
        assert sorted(path.name for path in disk.iterdir()) == [owner.FILE, "filler"]


def test_a_launch_is_that_of_torchrun_and_of_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    alone, began = owner._launch()
    assert alone.startswith(f"{os.uname().nodename}:{os.getpid()}:")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 0.4)  # the clock is set right: it is the same launch still
    name, moved = owner._launch()
    assert name == alone
    assert moved == pytest.approx(began - 0.4, abs=0.11)
    monkeypatch.setattr(time, "time", now)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "train-1")
    launch, before = owner._launch()
    assert launch == "train-1:0"
    assert before <= began
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert owner._launch()[0] == "train-1:2"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun without --standalone or --rdzv-id
    assert f":{os.getppid()}:" in owner._launch()[0]
