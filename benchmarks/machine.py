"""Where and when a figure was measured, and the memory of a command."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import subprocess
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchrec", "polars", "pyarrow", "numpy")


def facts() -> dict[str, object]:
    """Date, commit, processor and versions, for a benchmark's JSON."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def run_and_watch(command: list[str]) -> tuple[bytes, dict[str, float]]:
    """What a command prints, and the most memory that it and all that it started had at once: `own_mb`, and pages of files, `mapped_mb`.

    Pages that processes share count in each. The command must end well; what it says on stderr is not shown.
    """
    peaks = {"RssAnon": 0, "RssFile": 0}
    with (
        tempfile.TemporaryFile() as printed,
        subprocess.Popen(command, stdout=printed, stderr=subprocess.DEVNULL, cwd=ROOT) as process,
    ):
        while process.poll() is None:
            for name, held in memory_of(process.pid).items():
                peaks[name] = max(peaks[name], held)
            time.sleep(0.02)
        assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}"
        printed.seek(0)
        return printed.read(), {"own_mb": peaks["RssAnon"] / 1e3, "mapped_mb": peaks["RssFile"] / 1e3}


def memory_of(pid: int) -> dict[str, int]:
    """kB of a process and all that it started: their own, and pages of files, which they may share, counted in each."""
    held = {"RssAnon": 0, "RssFile": 0}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        for name, found in re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE):
            held[name] += int(found)
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            for name, more in memory_of(int(child)).items():
                held[name] += more
    return held
