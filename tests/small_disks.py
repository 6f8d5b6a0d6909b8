"""Disks that are soon full: memory that is mounted, by root, where mounting is allowed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def mount(*options: str) -> None:
    """Mount, or skip the test with what `mount` says."""
    done = subprocess.run(["mount", *options], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk: {done.stderr.strip()}")


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A new folder that holds so much, as tmpfs has it ("8m", "8m,nr_inodes=10"), until the block ends."""
    try:
        place.mkdir()
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    except FileNotFoundError:
        pytest.skip("no small disk: there is no `mount`")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def resize(disk: Path, size: str) -> None:
    """Let it hold so much from now on."""
    mount("-o", f"remount,size={size}", str(disk))
