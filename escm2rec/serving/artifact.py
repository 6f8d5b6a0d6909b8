"""The artifact folder: what `export` makes and `score --model` reads."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from escm2rec.errors import DataError
from escm2rec.folder import read_manifest, sha256_of
from escm2rec.paths import DataPath, RemotePath, fetch_files
from escm2rec.schema import Schema
from escm2rec.serving.formats import Served, load_model
from escm2rec.sharding.runtime import Runtime
from escm2rec.training.fetched import folder_here

AGAIN = "export it again, here"
CPU_FEATURES = ("avx", "amx", "fma", "bmi", "f16c", "vaes", "vpclmulqdq", "gfni", "asimd", "sve", "neon")  # what names of them begin with


@dataclass(frozen=True)
class Artifact:
    """A model that serves elsewhere.

    One model file, `schema.json` and `vocabulary/` to read raw rows, `coverage.json` where the run has it, and the `manifest.json` that
    makes it complete and says what the model takes, what it gives, and how good it is.
    """

    path: Path
    schema: Schema
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Open an artifact; DataError when it is absent, incomplete, or its parts are not of each other."""
        manifest = read_manifest(path, "artifact", frozenset({"format", "model", "schema_hash", "torch", "cpu"}))
        schema = Schema.load(path / "schema.json")
        if manifest["schema_hash"] != schema.hash():
            raise DataError(f"the artifact at {path} mixes two: manifest and schema.json differ in their schema hash", "export it again")
        return cls(path, schema, manifest)

    @property
    def file(self) -> Path:
        """Its model."""
        return self.path / str(self.manifest["model"]["file"])

    def check(self) -> None:
        """DataError where the model's file is not the one that was written, or does not run with this torch on this machine."""
        if not self.file.is_file():
            raise DataError(f"{self.file} is missing, the manifest names it", "export it again")
        if self.file.stat().st_size != self.manifest["model"]["bytes"] or sha256_of(self.file) != self.manifest["model"]["sha256"]:
            raise DataError(f"{self.file} is damaged: it is not the file that was written", "copy it again, or export it again")
        self._check_compiled()

    def _check_compiled(self) -> None:
        if self.manifest["format"] != "aoti":
            return
        for what, made, here in (("torch", self.manifest["torch"], release()), ("processor", self.manifest["cpu"]["machine"], machine())):
            if made != here:
                raise DataError(f"the artifact at {self.path} was compiled for {what} {made}, this is {here}", AGAIN)
        if lacking := set(self.manifest["cpu"]["features"]) - set(cpu_features()):
            raise DataError(f"the artifact at {self.path} was compiled for a processor with {', '.join(sorted(lacking))}", AGAIN)

    def load(self) -> Served:
        """Its model; DataError where torch cannot read it, or it was compiled for another machine than this one."""
        self._check_compiled()
        try:
            return load_model(self.file, self.manifest["format"])
        except Exception as error:  # each format has its own
            made = self.manifest["torch"]
            raise DataError(f"torch {release()} cannot read {self.file}, which torch {made} wrote: {error}", "export it again") from error


def artifact_here(artifact: DataPath, runtime: Runtime) -> AbstractContextManager[Path]:
    """The folder of an artifact; of one on a store all of it, as of `folder_here`. DataError where there is no complete one."""
    return folder_here(artifact, runtime, _fetch)


def _fetch(artifact: RemotePath, to: Path) -> None:
    read_manifest(artifact, "artifact")
    fetch_files(artifact, artifact.sizes(), to)


def release() -> str:
    """The release of torch, without what it is built for."""
    return str(torch.__version__).partition("+")[0]


def machine() -> str:
    """The kind of this machine's processor."""
    return platform.machine()


def cpu_features() -> list[str]:
    """What compiled code may use of this machine's processor, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    words = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return sorted({word for word in words if word.startswith(CPU_FEATURES)})
