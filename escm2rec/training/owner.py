"""Whose run a folder is. Of two starts of one training the later one writes; the earlier one, of which a scheduler lost sight, no more."""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from escm2rec.errors import RunError
from escm2rec.paths import DataPath, RemotePath
from escm2rec.sharding.runtime import Runtime, on_main

FILE = ".owner"


@dataclass(frozen=True)
class Owner:
    """One start of a training, as it is told in the run's folder while it is the latest.

    `launch` is the same for ranks that torchrun starts again, another for a job that the scheduler starts again; `began` is when it did,
    in seconds since 1970.
    """

    run: str
    token: str
    launch: str
    began: float

    @classmethod
    def take(cls, run: Path, runtime: Runtime) -> Owner:
        """Make this start the owner; called by all ranks alike. RunError when a later launch is it: this one's ranks were started again."""

        def write() -> Owner:
            mine = cls(str(run), uuid.uuid4().hex, *_launch())
            mine._give_way(run)
            partial = run / f"{FILE}.{mine.token}"
            try:
                partial.write_text(json.dumps(asdict(mine)), encoding="utf-8")
                partial.replace(run / FILE)
            finally:
                partial.unlink(missing_ok=True)  # where the disk is full
            return mine

        return on_main(runtime, write)

    def claim(self, copy: RemotePath) -> None:
        """Be the owner of a copy of the run too; called by rank 0 alone, RunError as in `take`."""
        self._give_way(copy)
        (copy / FILE).put(Path(self.run) / FILE)

    def check(self, copy: RemotePath | None = None) -> None:
        """RunError when another start took the run (or the copy) since, or it was replaced.

        To be called before anything is written there.
        """
        place = Path(self.run) if copy is None else copy
        held = _held(place)
        if held is None or held.token != self.token:
            raise self._taken(place)

    def _give_way(self, place: DataPath) -> None:
        held = _held(place)
        if held is not None and held.launch != self.launch and held.began > self.began:
            raise self._taken(place)

    def _taken(self, place: DataPath) -> RunError:
        return RunError(
            f"{place} was taken over by a later start of this training, or replaced: this one ends, and writes nothing more",
            "is the job running twice? the later one goes on",
        )


def _held(place: DataPath) -> Owner | None:
    try:
        return Owner(**json.loads((place / FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):  # no JSON: half of what a copy on a local disk was to be
        return None


def _launch() -> tuple[str, float]:
    """Of this process: which launch it is part of, and when that began.

    A launch is torchrun's, with Slurm's count of how often the job was started again. torchrun is the parent of the ranks that it starts;
    without an id of its own, and without torchrun, a process stands for it.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    pid = os.getpid() if run_id is None else os.getppid()
    ticks, began = _began(pid)
    if run_id in (None, "none"):
        return f"{os.uname().nodename}:{pid}:{ticks}", began
    return f"{run_id}:{os.environ.get('SLURM_RESTART_COUNT', '0')}", began


def _began(pid: int) -> tuple[float, float]:
    """When a process of this machine was started: in ticks since the machine was, which stay, and in seconds since 1970, which move a
    little as the clock is set right."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except OSError:  # no Linux
        return time.time(), time.time()
    return ticks, round(time.time() - up + ticks / os.sysconf("SC_CLK_TCK"), 1)
