"""Write common.txt, dev.txt and, where pip gives torch's CUDA build, the tail of cuda.txt: `python requirements/regenerate.py`.

pip resolves what `WANTED` and pyproject.toml ask for, without installing it. torch, torchrec and fbgemm are pinned by hand in
cpu.txt and cuda.txt, because their wheels do not say what fits (escm2rec/doctor.py does).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
CUDA_HEADER = "# What torch's CUDA build asks for.\n"
CUDA_PACKAGES = ("cuda-", "nvidia-", "triton")
# torchrec is left out for its fbgemm-gpu; what else it asks for stands here. torchx is frozen at 0.7.0.
WANTED = ["torchx==0.7.0", "tensordict", "torchmetrics==1.0.3", "tqdm", "pyre-extensions", "tensorboard", "matplotlib", "setuptools"]
WANTED += ["python-dateutil<3"]  # what s3fs asks for, by botocore
WANTED += ["importlib-metadata<10"]  # what mlflow-skinny asks for
WANTED_DEV = [
    "pytest",
    "pytest-timeout",
    "hypothesis",
    "ruff",
    "mypy",
    "types-PyYAML",
    "kubernetes",
    "mlflow-skinny",
    "ray",
    "pandas",  # a benchmark's comparison, and Ray Data
    "s3fs",
    "moto",
    "flask",
    "flask-cors",
]


def main() -> None:
    """Resolve once, and sort the answer into the files."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    torch = next(line for line in (HERE / "cpu.txt").read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    common = resolve([torch, *project, *WANTED])
    dev = resolve([torch, *(f"{name}=={version}" for name, version in common.items() if name != "torch"), *WANTED_DEV])
    cuda = {name: version for name, version in common.items() if name.startswith(CUDA_PACKAGES)}
    shared = {name: version for name, version in common.items() if name not in cuda and name != "torch"}
    extra = {name: version for name, version in dev.items() if name not in common}
    write("common.txt", "# What both builds share. Written by requirements/regenerate.py; installed through cpu.txt or cuda.txt.\n", shared)
    write("dev.txt", "# What the tests need, beside cpu.txt or cuda.txt. Written by requirements/regenerate.py.\n", extra)
    if cuda:
        head, _, _ = (HERE / "cuda.txt").read_text(encoding="utf-8").partition(CUDA_HEADER)
        write("cuda.txt", head + CUDA_HEADER, cuda)


def resolve(wanted: list[str]) -> dict[str, str]:
    """Name and version of all that pip would install."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-", *wanted]
    report = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    found = [(item["metadata"]["name"], item["metadata"]["version"]) for item in report["install"]]
    return {name.lower().replace("_", "-").replace(".", "-"): version.partition("+")[0] for name, version in sorted(found)}


def write(name: str, header: str, pins: dict[str, str]) -> None:
    lines = "".join(f"{package}=={version}\n" for package, version in sorted(pins.items()))
    (HERE / name).write_text(header + lines, encoding="utf-8")


if __name__ == "__main__":
    main()
