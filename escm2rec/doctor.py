"""Do the installed torch, torchrec and fbgemm fit each other?

Their wheels do not say so: fbgemm declares only numpy, and torchrec asks for `fbgemm-gpu` on every machine. A wrong pair
installs in silence and dies at import with an undefined symbol, so the metadata are compared before anything is imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from escm2rec.errors import InstallationError

IMPORT_TIMEOUT_S = 300
LEAST_PYTHON = (3, 11)
FBGEMM_CUDA = "fbgemm-gpu"
FBGEMM_CPU = "fbgemm-gpu-cpu"
PACKAGES = ("torch", "torchrec", FBGEMM_CUDA, FBGEMM_CPU)

# One process that loads every native library and calls one operator of each build.
_PROBE = """
import json, logging
logging.disable(logging.CRITICAL)
import torch, fbgemm_gpu, torchrec, torchrec.distributed
torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
if gpus:
    torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2], device="cuda"))
print(json.dumps({"gpus": gpus, "cuda": torch.version.cuda}))
"""


@dataclass(frozen=True)
class Trio:
    """Releases that fit each other: a torch minor, and the newest torchrec and fbgemm of the minors that go with it."""

    torch_minor: str
    torch: str
    torchrec: str
    fbgemm: str

    def mend(self, fbgemm: str) -> str:
        """The command that installs this trio's torchrec and fbgemm."""
        return f"pip install --no-deps torchrec=={self.torchrec} {fbgemm}=={self.fbgemm}"


# The pairs of FBGEMM's release table; the last was run on CPU, the first is the pair of CUDA 13 machines with torch 2.11.
TRIOS = (
    Trio("2.11", "2.11.0", "1.6.1", "1.6.0"),
    Trio("2.12", "2.12.0", "1.7.0", "1.7.0"),
    Trio("2.13", "2.13.0", "1.8.0", "1.8.0"),
)
NEWEST = TRIOS[-1]


@dataclass(frozen=True)
class Installed:
    """What the metadata say, without an import."""

    python: tuple[int, int]
    versions: dict[str, str]  # of PACKAGES, those that are installed
    torch_cuda: str | None  # CUDA release torch was built for; None is a CPU build


def require_matching_packages() -> Installed:
    """Raise InstallationError unless the installed packages fit each other. Reads metadata only: a few milliseconds."""
    installed = _read_installed()
    check_packages(installed)
    return installed


def check_installation() -> dict[str, Any]:
    """Check the metadata, then load the native libraries in a process of their own, and report what was found.

    Raises InstallationError with what was seen, what was expected, and the command that mends it.
    """
    installed = require_matching_packages()
    found = _probe_imports(installed)
    return {
        "ok": True,
        "python": ".".join(map(str, sys.version_info[:3])),
        "build": "cpu" if installed.torch_cuda is None else "cuda",
        "cuda": found["cuda"],
        "gpus": found["gpus"],
        "packages": installed.versions,
    }


def check_packages(installed: Installed) -> None:
    """The rules, as a function of what is installed. Raises InstallationError."""
    _check_python(installed.python)
    trio = _check_torch(installed.versions)
    fbgemm = _check_present(installed, trio)
    _check_builds(installed, trio, fbgemm)
    wrong = [
        f"{name} {installed.versions[name]}"
        for name, expected in (("torchrec", trio.torchrec), (fbgemm, trio.fbgemm))
        if _minor(installed.versions[name]) != _minor(expected)
    ]
    if wrong:
        raise InstallationError(
            f"torch {installed.versions['torch']} goes with torchrec {_minor(trio.torchrec)} and {fbgemm} {_minor(trio.fbgemm)}, "
            f"found {' and '.join(wrong)}",
            trio.mend(fbgemm),
        )


def _check_python(python: tuple[int, int]) -> None:
    if python < LEAST_PYTHON:
        raise InstallationError(
            f"Python {python[0]}.{python[1]} is too old, expected {LEAST_PYTHON[0]}.{LEAST_PYTHON[1]} or newer",
            "make install PYTHON=python3.11",
        )


def _check_torch(versions: dict[str, str]) -> Trio:
    if "torch" not in versions:
        raise InstallationError(
            "torch is not installed", "make install, or pip install --no-deps -r requirements/cpu.txt (cuda.txt with a GPU)"
        )
    for trio in TRIOS:
        if _minor(versions["torch"]) == trio.torch_minor:
            return trio
    known = ", ".join(trio.torch_minor for trio in TRIOS)
    raise InstallationError(
        f"torch {versions['torch']} has no torchrec that is known to fit, expected one of {known}",
        f"pip install torch=={NEWEST.torch}, then {NEWEST.mend(_fbgemm_of(versions))}",
    )


def _check_present(installed: Installed, trio: Trio) -> str:
    """The one fbgemm package that is installed, torchrec being there too."""
    versions = installed.versions
    wanted = FBGEMM_CPU if installed.torch_cuda is None else FBGEMM_CUDA
    found = [name for name in (FBGEMM_CUDA, FBGEMM_CPU) if name in versions]
    if len(found) == 2:
        raise InstallationError(
            f"{FBGEMM_CUDA} {versions[FBGEMM_CUDA]} and {FBGEMM_CPU} {versions[FBGEMM_CPU]} are both installed, "
            "and share the module fbgemm_gpu; expected one of them",
            f"pip uninstall -y {FBGEMM_CUDA} {FBGEMM_CPU}, then {trio.mend(wanted)}",
        )
    if "torchrec" not in versions:
        raise InstallationError(
            f"torchrec is not installed, expected {_minor(trio.torchrec)} beside torch {versions['torch']}", trio.mend(wanted)
        )
    if not found:
        raise InstallationError(
            f"neither {FBGEMM_CPU} nor {FBGEMM_CUDA} is installed, "
            f"expected {wanted} {_minor(trio.fbgemm)} beside torch {versions['torch']}",
            trio.mend(wanted),
        )
    return found[0]


def _check_builds(installed: Installed, trio: Trio, fbgemm: str) -> None:
    torch, found = installed.versions["torch"], installed.versions[fbgemm]
    if installed.torch_cuda is None and fbgemm == FBGEMM_CUDA:
        raise InstallationError(
            f"{FBGEMM_CUDA} {found} is a CUDA build, but torch {torch} is a CPU build",
            f"on a CPU machine: pip uninstall -y {FBGEMM_CUDA}, then {trio.mend(FBGEMM_CPU)}; with a GPU: make install BUILD=cuda",
        )
    if installed.torch_cuda is not None and fbgemm == FBGEMM_CPU:
        raise InstallationError(
            f"{FBGEMM_CPU} {found} is a CPU build, but torch {torch} is built for CUDA {installed.torch_cuda}",
            f"with a GPU: pip uninstall -y {FBGEMM_CPU}, then {trio.mend(FBGEMM_CUDA)}; "
            "on a CPU machine: point pip at torch's CPU build (requirements/README.md), then make install BUILD=cpu",
        )


def _probe_imports(installed: Installed) -> dict[str, Any]:
    fbgemm = _fbgemm_of(installed.versions)
    trio = _check_torch(installed.versions)
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InstallationError(
            f"importing torchrec took more than {IMPORT_TIMEOUT_S} s", "look for a slow or hung disk or GPU driver, then run again"
        ) from error
    if probe.returncode == 0:
        found: dict[str, Any] = json.loads(probe.stdout.strip().splitlines()[-1])
        return found
    reason = _reason(probe.stderr) or f"exit code {probe.returncode}"
    missing = re.fullmatch(r"ModuleNotFoundError: No module named '([^'.]+).*'", reason)
    requirements = "requirements/cpu.txt" if fbgemm == FBGEMM_CPU else "requirements/cuda.txt"
    if missing:
        raise InstallationError(
            f"torchrec needs the module {missing[1]}, which is not installed", f"pip install --no-deps -r {requirements}"
        )
    raise InstallationError(
        f"the versions fit, but importing them fails: {reason}",
        f"pip install --no-deps --force-reinstall torch=={trio.torch} torchrec=={trio.torchrec} {fbgemm}=={trio.fbgemm}",
    )


def _reason(stderr: str) -> str:
    """The line that says why: torch wraps the loader's own words in a line that leaves them out."""
    lines = stderr.strip().splitlines()
    loader = [line for line in lines if re.search(r"undefined symbol|cannot open shared object", line)]
    return (loader or lines or [""])[-1]


def _read_installed() -> Installed:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cuda = _torch_cuda(Path(str(metadata.distribution("torch").locate_file("torch/version.py")))) if "torch" in versions else None
    return Installed((sys.version_info[0], sys.version_info[1]), versions, cuda)


def _torch_cuda(version_file: Path) -> str | None:
    """`torch.version.cuda`, read as text: the version number tells it on some platforms only."""
    try:
        text = version_file.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _fbgemm_of(versions: dict[str, str]) -> str:
    return FBGEMM_CUDA if FBGEMM_CUDA in versions else FBGEMM_CPU


def _minor(version: str) -> str:
    """`2.13` of `2.13.0+cpu`."""
    return ".".join(version.partition("+")[0].split(".")[:2])
