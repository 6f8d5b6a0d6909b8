"""The rules are a pure function of what is installed; one real run in this environment."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from escm2rec import doctor
from escm2rec.doctor import Installed, check_installation, check_packages, require_matching_packages
from escm2rec.errors import InstallationError

CPU_TORCH = {"torch": "2.13.0+cpu"}
FITTING_CPU = {**CPU_TORCH, "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}
FITTING_CUDA = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}
MEND_CPU = "pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0"
MEND_CUDA = "pip install --no-deps torchrec==1.8.0 fbgemm-gpu==1.8.0"


@pytest.mark.parametrize(
    ("versions", "cuda"),
    [
        (FITTING_CPU, None),
        ({**FITTING_CPU, "torch": "2.13.1"}, None),
        (FITTING_CUDA, "13.0"),
        ({"torch": "2.11.0+cu130", "torchrec": "1.6.1", "fbgemm-gpu": "1.6.0+cu130"}, "13.0"),
        ({"torch": "2.12.1", "torchrec": "1.7.0", "fbgemm-gpu-cpu": "1.7.0"}, None),
    ],
)
def test_fitting_packages_pass(versions: dict[str, str], cuda: str | None) -> None:
    check_packages(Installed((3, 11), versions, cuda))


WRONG: list[tuple[str, Installed, str, str]] = [
    (
        "old python",
        Installed((3, 10), FITTING_CPU, None),
        "Python 3.10 is too old, expected 3.11 or newer",
        "make install PYTHON=python3.11",
    ),
    (
        "no torch",
        Installed((3, 11), {"torchrec": "1.8.0"}, None),
        "torch is not installed",
        "make install, or pip install --no-deps -r requirements/cpu.txt (cuda.txt with a GPU)",
    ),
    (
        "unknown torch",
        Installed((3, 11), {**FITTING_CPU, "torch": "2.10.0"}, None),
        "torch 2.10.0 has no torchrec that is known to fit, expected one of 2.11, 2.12, 2.13",
        f"pip install torch==2.13.0, then {MEND_CPU}",
    ),
    (
        "no torchrec",
        Installed((3, 11), {**CPU_TORCH, "fbgemm-gpu-cpu": "1.8.0"}, None),
        "torchrec is not installed, expected 1.8 beside torch 2.13.0+cpu",
        MEND_CPU,
    ),
    (
        "no fbgemm on a CPU",
        Installed((3, 11), {**CPU_TORCH, "torchrec": "1.8.0"}, None),
        "neither fbgemm-gpu-cpu nor fbgemm-gpu is installed, expected fbgemm-gpu-cpu 1.8 beside torch 2.13.0+cpu",
        MEND_CPU,
    ),
    (
        "no fbgemm with a GPU",
        Installed((3, 11), {"torch": "2.11.0", "torchrec": "1.6.1"}, "13.0"),
        "neither fbgemm-gpu-cpu nor fbgemm-gpu is installed, expected fbgemm-gpu 1.6 beside torch 2.11.0",
        "pip install --no-deps torchrec==1.6.1 fbgemm-gpu==1.6.0",
    ),
    (
        "both builds of fbgemm",
        Installed((3, 11), {**FITTING_CPU, "fbgemm-gpu": "1.8.0"}, None),
        "fbgemm-gpu 1.8.0 and fbgemm-gpu-cpu 1.8.0 are both installed, and share the module fbgemm_gpu; expected one of them",
        f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu, then {MEND_CPU}",
    ),
    (
        "wrong torchrec",
        Installed((3, 11), {**FITTING_CPU, "torchrec": "1.9.2"}, None),
        "torch 2.13.0+cpu goes with torchrec 1.8 and fbgemm-gpu-cpu 1.8, found torchrec 1.9.2",
        MEND_CPU,
    ),
    (
        "wrong torchrec and fbgemm",
        Installed((3, 11), {**FITTING_CUDA, "torchrec": "1.7.0", "fbgemm-gpu": "1.9.0"}, "13.0"),
        "torch 2.13.0 goes with torchrec 1.8 and fbgemm-gpu 1.8, found torchrec 1.7.0 and fbgemm-gpu 1.9.0",
        MEND_CUDA,
    ),
    (
        "CPU torch, CUDA fbgemm",
        Installed((3, 11), {**CPU_TORCH, "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}, None),
        "fbgemm-gpu 1.8.0 is a CUDA build, but torch 2.13.0+cpu is a CPU build",
        f"on a CPU machine: pip uninstall -y fbgemm-gpu, then {MEND_CPU}; with a GPU: make install BUILD=cuda",
    ),
    (
        "CUDA torch, CPU fbgemm",
        Installed((3, 11), {**FITTING_CPU, "torch": "2.13.0"}, "13.0"),
        "fbgemm-gpu-cpu 1.8.0 is a CPU build, but torch 2.13.0 is built for CUDA 13.0",
        f"with a GPU: pip uninstall -y fbgemm-gpu-cpu, then {MEND_CUDA}; "
        "on a CPU machine: point pip at torch's CPU build (requirements/README.md), then make install BUILD=cpu",
    ),
]


@pytest.mark.parametrize(("installed", "message", "hint"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_packages_are_told(installed: Installed, message: str, hint: str) -> None:
    with pytest.raises(InstallationError) as caught:
        check_packages(installed)
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = None", None),
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ('cuda = "12.6"', "12.6"),
        ("debug = False", None),
    ],
)
def test_cuda_is_read_from_torch_version_file(tmp_path: Path, line: str, cuda: str | None) -> None:
    file = tmp_path / "version.py"
    file.write_text(f"__version__ = '2.13.0'\ndebug = False\n{line}\nhip: Optional[str] = None\n", encoding="utf-8")
    assert doctor._torch_cuda(file) == cuda


def test_no_version_file_is_a_cpu_build(tmp_path: Path) -> None:
    assert doctor._torch_cuda(tmp_path / "absent.py") is None


@pytest.mark.parametrize(
    ("probe", "message", "hint"),
    [
        (
            "try:\n    raise OSError('fbgemm_gpu_py.so: undefined symbol: _ZN3c10')\n"
            "except OSError as error:\n    raise OSError('Could not load this library: fbgemm_gpu_py.so') from error",
            "the versions fit, but importing them fails: OSError: fbgemm_gpu_py.so: undefined symbol: _ZN3c10",
            "pip install --no-deps --force-reinstall torch==2.13.0 torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0",
        ),
        (
            "import no_such_module.part",
            "torchrec needs the module no_such_module, which is not installed",
            "pip install --no-deps -r requirements/cpu.txt",
        ),
        (
            "import os; os._exit(7)",
            "the versions fit, but importing them fails: exit code 7",
            "pip install --no-deps --force-reinstall torch==2.13.0 torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0",
        ),
    ],
    ids=["undefined symbol", "missing module", "dies in silence"],
)
def test_failed_imports_are_told(monkeypatch: pytest.MonkeyPatch, probe: str, message: str, hint: str) -> None:
    monkeypatch.setattr(doctor, "_PROBE", probe)
    with pytest.raises(InstallationError) as caught:
        doctor._probe_imports(Installed((3, 11), FITTING_CPU, None))
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_hung_import_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "IMPORT_TIMEOUT_S", 0.2)
    with pytest.raises(InstallationError, match=re.escape("importing torchrec took more than 0.2 s")):
        doctor._probe_imports(Installed((3, 11), FITTING_CPU, None))


def test_this_environment_passes() -> None:
    report = check_installation()
    assert report["ok"] is True
    assert {"torch", "torchrec"} < set(report["packages"])
    assert report["build"] in ("cpu", "cuda")


def test_the_metadata_check_is_fast_and_imports_nothing() -> None:
    require_matching_packages()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        require_matching_packages()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
    program = "import sys; from escm2rec.doctor import require_matching_packages as check; check(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
