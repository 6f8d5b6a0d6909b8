"""Folders that are complete or absent, and the manifests that say so.

A folder is complete when its `manifest.json` is there. It is written beside its place, as `.NAME.partial`, and renamed when
it is whole, so nothing that looks complete ever is not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from escm2rec.disk import FULL, STEPS, free_space, telling_of_disk
from escm2rec.errors import ConfigError, DataError
from escm2rec.paths import DataPath

MANIFEST = "manifest.json"
JOB = "job"  # in an unfinished folder that can be taken up: what it is made from
RUN_CONFIG = "config.json"  # what an unfinished run has
LAYOUT_VERSION = 1
LAYOUTS = {"data set": 2}  # of other kinds than LAYOUT_VERSION; 2: lists as cells of bytes
MAKERS = {"data set": "preprocess", "run": "train", "study": "study", "artifact": "export"}
MARKS = {"data set": ("schema.json", "train"), "run": (RUN_CONFIG, "checkpoints", "candidates")}
"""What an unfinished folder of a kind already has; of the other kinds nothing is known."""
ANEW = "run the same command again, or choose another --out"
TAKEN_UP = "run the same command again: it goes on where it stopped"
NEEDS = "in all a job takes some 1.3 to 3.5 times the bytes of text logs there, some 2 to 4 times those of Parquet, 6 where all ids differ"
"""Measured, until the work folder goes: 1.3 of Ali-CCP text, 2.4 of CSV, 3.6 and 4.1 of a Parquet table, 2.0 of an event log in Parquet.
With two merges at a time that hold all rows twice: 2.9 of CSV, 3.8 of Parquet; where all ids differ 3.3 of CSV, 6.2 of Parquet."""

logger = logging.getLogger(__name__)


@contextmanager
def new_folder(path: Path, kind: str, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place when the block ends well, and is removed when it fails.

    Raises ConfigError when `path` exists and may not be overwritten, cannot be written, or another job is writing it; RunError when the
    disk is full before it is whole.
    """
    path = path.absolute()
    with _locked_partial(path, kind, overwrite) as partial:
        try:
            with telling_of_disk(partial, ANEW):
                _empty(partial)
                yield partial
                _take_place(partial, path, overwrite)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def resumable_folder(path: Path, kind: str, overwrite: bool, identity: str, keeps: bool = False) -> Iterator[Path]:
    """The same, but a folder that a killed job of the same `identity` left is yielded as it is.

    A ConfigError or DataError removes it, unless it `keeps` what was done before one; any other exception leaves it to be taken up. `JOB`
    in it holds the identity, and goes before it takes its place; a complete folder has the identity as `made_from` in its manifest.
    """
    path = path.absolute()
    with _locked_partial(path, kind, overwrite) as partial:
        try:
            with telling_of_job(partial):
                if _identity_of(partial) != identity:
                    _empty(partial)
                    (partial / JOB).write_text(identity, encoding="utf-8")
                elif any(partial.iterdir()):
                    logger.info("going on with what %s holds", partial)
                yield partial
                (partial / JOB).unlink(missing_ok=True)
                _take_place(partial, path, overwrite)
        except (ConfigError, DataError):
            if not keeps:
                shutil.rmtree(partial, ignore_errors=True)
            raise


def telling_of_job(folder: Path) -> AbstractContextManager[None]:
    """`telling_of_disk` of a job that can be taken up."""
    return telling_of_disk(folder, TAKEN_UP, NEEDS)


def _identity_of(partial: Path) -> str | None:
    """Of the job that left a folder; None when there was none, or it cannot be told."""
    try:
        return (partial / JOB).read_text(encoding="utf-8")
    except OSError:
        pass
    try:
        manifest = json.loads((partial / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(manifest.get("made_from"))


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    said = f"cannot write to {path.parent}: {error.strerror or error}"
    if error.errno in FULL:
        return ConfigError(f"{said}; {free_space(path.parent)}", f"{STEPS[error.errno]}, or choose another --out")
    return ConfigError(said, "choose another --out or mend its permissions")


@contextmanager
def _locked_partial(path: Path, kind: str, overwrite: bool) -> Iterator[Path]:
    """The folder beside `path` that is to take its place, held by this process alone until it ends, however it ends."""
    partial = path.with_name(f".{path.name}.partial")
    while True:
        refuse_existing(path, kind, overwrite)
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # another job finished in between
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            _lock(lock, path)
            if not _is(partial, lock):
                continue  # it took its place before it was locked here
            try:
                refuse_existing(path, kind, overwrite)  # another job may have finished in between
            except ConfigError:
                with suppress(OSError):
                    partial.rmdir()
                raise
            yield partial
            return
        finally:
            os.close(lock)


def _lock(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another job is writing {path}", "wait for it, or choose another --out") from error
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked (%s): see that no other job writes it", path, error.strerror)


def _is(partial: Path, lock: int) -> bool:
    try:
        return os.path.samestat(partial.stat(), os.fstat(lock))
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    """Remove all that is in a folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _take_place(partial: Path, path: Path, overwrite: bool) -> None:
    """Whoever is killed in between leaves the old folder whole, beside the new one."""
    old = path.with_name(f".{path.name}.old")
    if overwrite and path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def refuse_existing(path: Path, kind: str, overwrite: bool) -> None:
    """ConfigError when `path` exists and holds anything, unless `overwrite`; and then when it is no folder of this kind."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"the output folder {path} is a file", "choose another --out, or remove the file by hand")
    if not any(path.iterdir()):
        _remove_empty(path, kind)
        return
    if not overwrite:
        unfinished = kind == "run" and (path / RUN_CONFIG).is_file() and not (path / MANIFEST).is_file()
        hint = (
            "--resume goes on with the run, --overwrite drops it"
            if unfinished
            else "choose another --out, or pass --overwrite to replace it"
        )
        raise ConfigError(f"the output folder {path} exists", hint)
    if not is_of_kind(path, kind):
        raise ConfigError(f"will not overwrite {path}: it holds no {kind} that escm2rec made", "choose another --out, or remove it by hand")


def _remove_empty(path: Path, kind: str) -> None:
    try:
        path.rmdir()
    except OSError as error:  # of a mount, for one
        message = f"the empty folder {path} cannot be replaced by a {kind}: {error.strerror}"
        raise ConfigError(message, f"pass a folder that is not there yet, such as --out {path / kind.replace(' ', '-')}") from error


def refuse_overlap(out: Path, inputs: Iterable[DataPath]) -> None:
    """ConfigError when `out` is an input, or holds one: writing it would destroy what is read."""
    for path in inputs:
        if isinstance(path, Path) and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise ConfigError(f"the output folder {out} is or holds the input {path}", "choose another --out")


def is_of_kind(path: DataPath, kind: str) -> bool:
    """Whether a folder is one of this kind, complete, or a run that was begun."""
    if kind == "run" and (path / RUN_CONFIG).is_file():
        return True
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == kind


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file that is whole or absent."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_manifest(folder: DataPath, kind: str, required: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The manifest of a complete folder.

    `kind` is what a person calls the folder ("data set", "run", "predictions"), stored as `kind` in the manifest; `required` are the keys
    that it must have. Raises DataError when the folder is absent, incomplete, of another kind, or of another layout.
    """
    if not folder.is_dir():
        raise DataError(f"no {kind} at {folder}", _where(folder.parent, kind))
    path = folder / MANIFEST
    if not path.is_file():
        marks = MARKS.get(kind, ())
        if marks and not any((folder / mark).exists() for mark in marks):
            raise DataError(f"{folder} is no {kind}: it has neither {MANIFEST} nor {marks[0]}", _where(folder, kind))
        hint = "train with --resume goes on with it" if kind == "run" else f"run the command that makes the {kind} again"
        raise DataError(f"the {kind} at {folder} is incomplete: it has no {MANIFEST}", hint)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(f"{folder} is no {kind}: its {MANIFEST} says {found!r}", _where(folder, kind))
    if not isinstance(manifest.get("version"), int) or not required <= manifest.keys():
        lacks = ", ".join(sorted(required - manifest.keys())) or "a version"
        raise DataError(f"{path} lacks {lacks}: it was changed after it was written", f"run the command that makes the {kind} again")
    layout = layout_of(kind)
    if manifest["version"] > layout:
        raise DataError(f"{folder} has layout version {manifest['version']}, this escm2rec reads up to {layout}", "use a newer escm2rec")
    if manifest["version"] < layout:
        raise DataError(f"{folder} has layout version {manifest['version']}, this escm2rec reads {layout}", f"{MAKERS[kind]} again")
    return manifest


def _where(folder: DataPath, kind: str) -> str:
    """The hint where a folder is not of the kind: those in it that are, or which command makes one."""
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST}") if is_of_kind(path.parent, kind)) if kind in MAKERS else []
    if inside:
        return f"did you mean {' or '.join(inside[:3])}?"
    return f"give the folder that {MAKERS[kind]} made as its --out" if kind in MAKERS else "check the path"


def layout_of(kind: str) -> int:
    """The layout version that folders of a kind are written in."""
    return LAYOUTS.get(kind, LAYOUT_VERSION)


def write_manifest(folder: Path, kind: str, content: dict[str, Any]) -> None:
    """Write the manifest that makes a folder complete."""
    write_json(folder / MANIFEST, {"kind": kind, "version": layout_of(kind), **content})


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
