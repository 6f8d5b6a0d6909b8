"""A run that is kept on a store too: copied there with each checkpoint, and fetched from there where its folder is gone or older.

The copy has the files of the run under the same names. A checkpoint of it is complete when its manifest is there, which goes up after all
else that the run then holds; the manifest of the run goes last of all.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from escm2rec.config import Config
from escm2rec.disk import telling_of_disk
from escm2rec.errors import ConfigError, DataError, RunError
from escm2rec.folder import MANIFEST, RUN_CONFIG, new_folder
from escm2rec.paths import DataPath, RemotePath, fetch_files, store_path
from escm2rec.reader.dataset import Dataset
from escm2rec.sharding.runtime import Runtime, on_each, on_main
from escm2rec.training.checkpoint import (
    WRITE_TIMEOUT,
    checkpoint_of,
    damage,
    last_good_checkpoint,
    latest_checkpoint,
    step_of,
    whole_checkpoints,
)
from escm2rec.training.owner import FILE as OWNER
from escm2rec.training.owner import Owner
from escm2rec.training.run import PROPENSITY, REPORTS, check_resumable, refuse_other_source, source_of

CHECKPOINTS = "checkpoints"

logger = logging.getLogger(__name__)


@contextmanager
def copies_at(url: str | None, run: Path, keep: int, runtime: Runtime) -> Iterator[Copies | None]:
    """What keeps a copy of the run at `url`, an fsspec URL or a path; None without one. ConfigError where none can be kept there."""
    if url is None:
        yield None
        return
    on_main(runtime, lambda: _refuse_overlap(store_path(url), run))
    # A group of its own: others have no hour for the slowest rank, and those of training and checkpoints are used on threads of their own.
    group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
    try:
        yield Copies(store_path(url), run, keep, replace(runtime, group=group))
    finally:
        dist.destroy_process_group(group)


def _refuse_overlap(place: RemotePath, run: Path) -> None:
    copy, run = _local(place), run.resolve()
    if copy is not None and (copy in (run, *run.parents) or run in copy.parents):
        raise ConfigError(f"--copy-to {copy} is, holds or lies in the run folder {run}", "copy to another disk, or to a store")


def _local(place: RemotePath) -> Path | None:
    """A place on a disk of this machine; None on a store."""
    return Path(place.path).resolve() if "file" in place.fs.protocol else None


class Copies:
    """The copy of a run; all ranks call it alike, one call at a time."""

    def __init__(self, place: RemotePath, run: Path, keep: int, runtime: Runtime) -> None:
        """The newest `keep` checkpoints stay, and those that the run holds."""
        self._place, self._run, self._keep, self._runtime = place, run, keep, runtime

    def begin(self, config: Config, data: DataPath, resume: bool, overwrite: bool, warm_start: Path | None) -> None:
        """Refuse what the training must not replace, and fetch the run where `resume` finds the copy newer than the run folder.

        To be called before the run folder is looked at. ConfigError or DataError where the copy is of another run, of one that neither is
        asked for, or cannot be read.
        """
        held, whole = on_main(self._runtime, lambda: self._to_resume(config, data, resume, overwrite, warm_start))
        usable = self._usable_step() if whole else 0
        for step in sorted((step for step in whole if step > usable), reverse=True):
            try:
                self._fetch(step, held, whole)
            except DataError as error:
                self._tell(logging.WARNING, f"step {step} of {self._place} cannot be fetched, and is passed over: {error.message}")
                continue
            self._tell(logging.INFO, f"fetched step {step} of {self._place} to {self._run}")
            return
        if whole and not usable:
            raise DataError(f"no checkpoint of {self._place} can be fetched", "mend the store, or train again, with --overwrite")

    def take(self, owner: Owner) -> None:
        """Be the owner of the copy; where the run begins anew, what the copy holds is dropped. DataError where it cannot be written."""

        def take() -> None:
            owner.claim(self._place)
            if latest_checkpoint(self._run) is None:
                self._drop()

        on_main(self._runtime, take)

    def bring(self, owner: Owner) -> None:
        """Copy what the run holds and the copy lacks. RunError as of `Owner.check`; what else fails is told, and tried by the next call."""
        try:
            self._bring(owner)
        except DataError as error:
            self._tell(logging.WARNING, f"{error.message}; it is tried again after the next checkpoint, or at the next start with --resume")

    def finish(self, owner: Owner) -> dict[str, str]:
        """The same of a finished run: where its copy is. RunError when that is not whole."""
        try:
            self._bring(owner)
        except DataError as error:
            hint = "mend the store; the same command with --resume then copies what is missing"
            failure = RunError(f"the run is whole, its copy is not: {error.message}", hint)
            failure.told_by_rank_0 = not self._runtime.is_main
            raise failure from error
        return {"copy": str(self._place)}

    def _to_resume(
        self, config: Config, data: DataPath, resume: bool, overwrite: bool, warm_start: Path | None
    ) -> tuple[dict[str, int], dict[int, dict[str, Any]]]:
        """What the copy holds, and the manifests of its complete checkpoints by step: none where the training is not to go on with it."""
        self._refuse_inputs(data, warm_start)
        held = self._place.sizes()
        if held and not held.keys() & {OWNER, RUN_CONFIG}:
            message = f"will not write to {self._place}: it holds something, and no run that escm2rec copied"
            raise ConfigError(message, "choose another --copy-to, or empty it by hand")
        whole = self._whole(held)
        if not resume:
            if not overwrite and (whole or MANIFEST in held):
                finished = "choose another --copy-to, or pass --overwrite to replace it"
                hint = finished if MANIFEST in held else "--resume goes on with the run, --overwrite drops it"
                raise ConfigError(f"{self._place} holds a run", hint)
            return held, {}
        if whole:
            self._refuse_another(config, Dataset.open(data), whole[max(whole)], warm_start)
        return held, whole

    def _refuse_inputs(self, *inputs: DataPath | None) -> None:
        copy = _local(self._place)
        for path in inputs:
            if copy is not None and isinstance(path, Path) and copy in (path.resolve(), *path.resolve().parents):
                raise ConfigError(f"--copy-to {copy} is or holds {path}, which the training reads", "copy to another folder, or to a store")

    def _refuse_another(self, config: Config, dataset: Dataset, newest: dict[str, Any], warm_start: Path | None) -> None:
        """ConfigError or DataError where the copy, or the run folder, is of another training: one of the two is to replace the other."""
        check_resumable(self._place, config, dataset)
        refuse_other_source(self._place, source_of(self._place), warm_start)
        if newest["progress"]["data"] != dataset.identity("train"):
            message = f"{self._place} was trained on other rows than the training split holds now"
            raise DataError(message, "resume with the data set of the run")
        if latest_checkpoint(self._run) is None and not (self._run / PROPENSITY).is_dir():
            return
        check_resumable(self._run, config, dataset)
        if source_of(self._run) != source_of(self._place):
            message = f"{self._place} is the copy of another run than {self._run}: they did not begin with the same one (--warm-start)"
            raise ConfigError(message, "choose another --copy-to")

    def _whole(self, held: dict[str, int]) -> dict[int, dict[str, Any]]:
        found = {}
        for folder in _folders(held):
            try:
                found[step_of(Path(folder))] = json.loads((self._place / folder / MANIFEST).read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):  # no JSON: cut off, on a local disk
                continue
        return found

    def _usable_step(self) -> int:
        """Of the newest checkpoint of the run folder that is not damaged; 0 where there is none."""
        try:
            folder = last_good_checkpoint(self._run, self._runtime)
        except DataError as error:
            self._tell(logging.WARNING, error.message)
            return 0
        return 0 if folder is None else step_of(folder)

    def _fetch(self, step: int, held: dict[str, int], whole: dict[int, dict[str, Any]]) -> None:
        """Put the run with this checkpoint and the best into the place of the run folder. DataError where it does not arrive whole."""
        runtime = self._runtime
        best = whole[step]["progress"].get("best") or {}
        wanted = {f"{CHECKPOINTS}/step-{each}" for each in (step, best.get("step"))}
        names = [name for name in held if name.rpartition("/")[0] in wanted or not name.startswith(f"{CHECKPOINTS}/")]
        left_out = {OWNER} if step == max(whole) else {OWNER, MANIFEST}  # the manifest is not of an older checkpoint
        mine = [name for name in names if name not in left_out][runtime.rank :: runtime.world_size]
        with ExitStack() as stack:
            folder = on_main(runtime, lambda: stack.enter_context(new_folder(self._run, "run", overwrite=True)))
            on_each(runtime, lambda: self._get({name: held[name] for name in mine}, folder))
            if (said := damage(checkpoint_of(folder, step), runtime)) is not None:
                raise DataError(said)
            on_main(runtime, stack.pop_all().close)

    def _get(self, sizes: dict[str, int], folder: Path) -> None:
        with telling_of_disk(folder, "start again with --resume"):
            fetch_files(self._place, sizes, folder)

    def _bring(self, owner: Owner) -> None:
        """DataError that names the checkpoints which are not copied."""
        runtime = self._runtime
        lacks = [checkpoint.name for checkpoint in whole_checkpoints(self._run)[-1:]]
        try:
            plain, checkpoints = on_main(runtime, lambda: self._lacking(owner))
            lacks = list(checkpoints)
            self._send(plain)
            for name, files in checkpoints.items():
                self._send(files)
                on_main(runtime, partial(self._complete, owner, name))
                lacks.remove(name)
            on_main(runtime, lambda: self._end(owner))
        except DataError as error:
            raise DataError(f"{self._place} lacks {', '.join(lacks) or 'the latest'} of {self._run}: {error.message}") from error

    def _lacking(self, owner: Owner) -> tuple[list[str], dict[str, list[str]]]:
        """The files to copy, and those of each checkpoint, the newest first; what must not stay beside them is removed from the copy."""
        self._check(owner)
        held = self._place.sizes()
        stale = set() if self._is_copied(MANIFEST, held) else {MANIFEST, *REPORTS}  # a report may have been written there alone
        for name in stale & held.keys():
            if not (self._run / name).exists():
                self._remove(name, held)
        # What lies right in the run may be written anew in the same size.
        plain = [name for name in _plain_files(self._run) if "/" not in name or held.get(name) != (self._run / name).stat().st_size]
        checkpoints = {}
        for checkpoint in reversed(whole_checkpoints(self._run)):
            folder = f"{CHECKPOINTS}/{checkpoint.name}"
            if not self._is_copied(f"{folder}/{MANIFEST}", held):
                self._remove(folder, held)
                checkpoints[checkpoint.name] = [f"{folder}/{path.name}" for path in sorted(checkpoint.iterdir()) if path.name != MANIFEST]
        return plain, checkpoints

    def _send(self, names: list[str]) -> None:
        runtime = self._runtime

        def send() -> None:
            for name in names:
                if _writer(name) % runtime.world_size == runtime.rank:
                    self._put(name)

        on_each(runtime, send)

    def _complete(self, owner: Owner, checkpoint: str) -> None:
        self._check(owner)
        self._put(f"{CHECKPOINTS}/{checkpoint}/{MANIFEST}")

    def _end(self, owner: Owner) -> None:
        """Remove the checkpoints that are not kept, those that a resumed run passed over among them; a finished run's manifest."""
        self._check(owner)  # a later start may have replaced the run
        held, here = self._place.sizes(), [step_of(checkpoint) for checkpoint in whole_checkpoints(self._run)]
        there = {step_of(Path(folder)): f"{folder}/{MANIFEST}" in held for folder in _folders(held)}
        kept = {*here, *sorted(step for step, whole in there.items() if whole and step <= max(here))[-self._keep :]}
        self._check(owner)
        for step in there.keys() - kept:
            self._remove(f"{CHECKPOINTS}/step-{step}", held)
        if (self._run / MANIFEST).exists():
            self._check(owner)
            self._put(MANIFEST)

    def _check(self, owner: Owner) -> None:
        owner.check()
        owner.check(self._place)

    def _is_copied(self, name: str, held: dict[str, int]) -> bool:
        """Whether the copy's file of this name says what the run's does."""
        try:
            return name in held and (self._place / name).read_text(encoding="utf-8") == (self._run / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return False

    def _put(self, name: str) -> None:
        (self._place / name).put(self._run / name)

    def _remove(self, name: str, held: dict[str, int]) -> None:
        """A file, or a folder: its manifest first, so that nothing looks whole that is not."""
        for each in (f"{name}/{MANIFEST}", name):
            if any(path == each or path.startswith(f"{each}/") for path in held):
                (self._place / each).remove()

    def _drop(self) -> None:
        held = self._place.sizes()
        plain = {name.partition("/")[0] for name in held} - {OWNER, MANIFEST, CHECKPOINTS}
        for name in (MANIFEST, *_folders(held), *sorted(plain)):
            self._remove(name, held)

    def _tell(self, level: int, said: str) -> None:
        if self._runtime.is_main:
            logger.log(level, said)


def _folders(held: Iterable[str]) -> list[str]:
    """The folders of checkpoints that a copy has files of."""
    return sorted({name.rpartition("/")[0] for name in held if name.startswith(f"{CHECKPOINTS}/step-")})


def _writer(name: str) -> int:
    """The rank that wrote a file: that of a checkpoint has it in its name."""
    part = re.search(r"/__(\d+)_[^/]*$", name)
    return int(part[1]) if part else 0


def _plain_files(run: Path) -> list[str]:
    """What a run holds beside its checkpoints and its manifest, but for owners and what is being written."""
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    passed_over = re.compile(rf"{MANIFEST}$|{CHECKPOINTS}/|(.*/)?(\.[^/]*\.partial(/|$)|{re.escape(OWNER)})")
    return [name for name in names if not passed_over.match(name)]
