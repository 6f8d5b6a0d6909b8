"""The wheel works outside the checkout, and the pinned lists are complete, pinned and free of hosts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import escm2rec
from escm2rec.doctor import FBGEMM_CPU, FBGEMM_CUDA, NEWEST

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements"
PIN = re.compile(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*")
# torchrec asks for fbgemm-gpu on every machine; the CPU list has fbgemm-gpu-cpu in its place.
KNOWN_UNMET = {"torchrec: fbgemm-gpu"}
# Wanted for themselves, not by another pin: what escm2rec uses and torchrec does not ask for.
WANTED = {"torchrec", "torchx", "tensorboard", "matplotlib", "setuptools", FBGEMM_CPU}


def lines(name: str) -> list[str]:
    """The lines of a list and of those it includes, without comments."""
    found: list[str] = []
    for line in (REQUIREMENTS / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found += lines(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            found.append(line)
    return found


def pins(name: str) -> dict[str, str]:
    pairs = [line.split("==") for line in lines(name)]
    assert len({package for package, _ in pairs}) == len(pairs), f"{name} pins a package twice"
    return {package: version for package, version in pairs}


def needs_of(package: str) -> list[Requirement]:
    """What an installed package asks for here, without extras."""
    found = [Requirement(text) for text in metadata.distribution(package).requires or []]
    return [need for need in found if need.marker is None or need.marker.evaluate({"extra": ""})]


# --- the pinned lists ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["common.txt", "cpu.txt", "cuda.txt", "dev.txt"])
def test_every_line_is_a_bare_pin(name: str) -> None:
    found = lines(name)
    assert len(found) > 20
    assert [line for line in found if not PIN.fullmatch(line)] == []


def test_no_file_names_a_host() -> None:
    files = [*REQUIREMENTS.iterdir(), ROOT / "pyproject.toml", ROOT / "Makefile", ROOT / ".ci" / "run"]
    texts = {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}
    assert len(texts) >= 8
    assert [name for name, text in texts.items() if re.search(r"://|--(extra-)?index-url|--find-links|--hash", text)] == []


def test_every_list_is_there() -> None:
    assert sorted(file.name for file in REQUIREMENTS.glob("*.txt")) == [
        "common.txt",
        "cpu.txt",
        "cuda.txt",
        "dev.txt",
        "torchx_nightly.txt",
    ]


@pytest.mark.parametrize(("name", "fbgemm"), [("cpu.txt", FBGEMM_CPU), ("cuda.txt", FBGEMM_CUDA)])
def test_the_pinned_trio_is_the_one_doctor_knows(name: str, fbgemm: str) -> None:
    pinned = pins(name)
    assert (pinned["torch"], pinned["torchrec"], pinned[fbgemm]) == (NEWEST.torch, NEWEST.torchrec, NEWEST.fbgemm)
    assert len({FBGEMM_CPU, FBGEMM_CUDA} & set(pinned)) == 1


@pytest.fixture(scope="module")
def cpu_pins() -> dict[str, str]:
    """cpu.txt, where it is what this environment holds."""
    pinned = pins("cpu.txt")
    if metadata.version("torch").partition("+")[0] != pinned["torch"] or any(
        canonicalize_name(distribution.name) == FBGEMM_CUDA for distribution in metadata.distributions()
    ):
        pytest.skip("this environment has another build than requirements/cpu.txt")
    return pinned


def test_cpu_list_satisfies_its_own_packages(cpu_pins: dict[str, str]) -> None:
    installed = {package: metadata.version(package).partition("+")[0] for package in cpu_pins}
    assert installed == cpu_pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    needs = [("escm2rec", Requirement(text)) for text in project]
    needs += [(package, need) for package in cpu_pins for need in needs_of(package)]
    assert len(needs) > 50
    unmet = {
        f"{package}: {need}"
        for package, need in needs
        if not need.specifier.contains(cpu_pins.get(canonicalize_name(need.name), "0.dev0"), prereleases=True)
        or canonicalize_name(need.name) not in cpu_pins
    }
    assert unmet == KNOWN_UNMET


def test_cpu_list_holds_nothing_that_nobody_needs(cpu_pins: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    needed = WANTED | {canonicalize_name(Requirement(text).name) for text in project}
    todo = sorted(needed)
    while todo:
        for need in needs_of(todo.pop()):
            name = canonicalize_name(need.name)
            if name not in needed and name in cpu_pins:
                needed.add(name)
                todo.append(name)
    assert set(cpu_pins) - needed == set()


# --- the wheel ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline from a copy, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "escm2rec", source / "escm2rec", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(source), "--no-build-isolation", "-w", str(out))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", str(wheel), "--target", str(target))
    return target


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "-q", *arguments, "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr


def outside(installed: Path, *arguments: str) -> str:
    """stdout of a Python program run outside the checkout, with the installed wheel."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"escm2rec", f"escm2rec-{escm2rec.__version__}.dist-info"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "escm2rec").rglob("*.py")}
    assert modules | {"escm2rec/py.typed"} <= set(names)


def test_command_runs_outside_the_checkout(installed: Path) -> None:
    assert outside(installed, "-m", "escm2rec", "--help").startswith("Usage: escm2rec ")
    assert (installed / "bin" / "escm2rec").is_file()


def test_import_is_light_and_knows_its_version(installed: Path) -> None:
    program = (
        "import json, sys, escm2rec; from importlib.metadata import version; "
        "heavy = [name for name in ('torch', 'numpy', 'polars', 'pydantic', 'typer') if name in sys.modules]; "
        "print(json.dumps([escm2rec.__file__, heavy, escm2rec.__version__, version('escm2rec')]))"
    )
    file, heavy, version, declared = json.loads(outside(installed, "-c", program))
    assert Path(file).is_relative_to(installed)
    assert heavy == []
    assert version == declared == escm2rec.__version__
