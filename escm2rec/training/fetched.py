"""A finished run that lies on a store, for ranks that read a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist

from escm2rec.disk import telling_of_disk
from escm2rec.folder import MANIFEST, RUN_CONFIG, read_manifest
from escm2rec.paths import DataPath, RemotePath, fetch_files
from escm2rec.sharding.runtime import Runtime, on_each
from escm2rec.training.choice import CHOICE


@contextmanager
def run_here(run: DataPath, runtime: Runtime) -> Iterator[Path]:
    """The folder of a run; of one on a store what its model needs, among the temporary files of each machine until this ends.

    Called by all ranks alike; the first of each machine fetches. DataError where there is no finished run, or where it does not arrive.
    """
    if isinstance(run, Path):
        yield run
        return
    first = runtime.rank - runtime.rank % runtime.local_world_size
    with TemporaryDirectory(prefix="escm2rec-run-") if runtime.rank == first else nullcontext("") as mine:
        on_each(runtime, lambda: _fetch(run, Path(mine)) if mine else None)
        folders = [""] * runtime.world_size
        dist.all_gather_object(folders, mine, group=runtime.group)
        yield Path(folders[first])


def _fetch(run: RemotePath, to: Path) -> None:
    checkpoint = read_manifest(run, "run", frozenset({"checkpoint"}))["checkpoint"]
    sizes = run.sizes()
    needed = {MANIFEST, RUN_CONFIG, "schema.json", CHOICE}
    names = [name for name in sizes if name in needed or name.startswith(("vocabulary/", f"{checkpoint}/"))]
    with telling_of_disk(to, "set TMPDIR to a folder of another disk, then run the same command again"):
        fetch_files(run, {name: sizes[name] for name in names}, to)
