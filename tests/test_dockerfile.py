"""The steps of the Dockerfile, without Docker: in a clean folder, by the shell. Of the image itself nothing is built here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def steps() -> list[tuple[str, str]]:
    """Instructions and what follows them, but comments."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line and not line.startswith("#"))]


def test_the_image_is_made_by_what_a_clean_clone_is_made_by() -> None:
    """A copy, and the `make install` that every push runs on a clean clone; of the Python that is tested."""
    assert [(word, rest) for word, rest in steps() if word in ("COPY", "RUN") and "apt-get" not in rest] == [
        ("COPY", ". ."),
        ("RUN", "make install BUILD=$BUILD"),
    ]
    assert re.match(r"python:3\.11\b", dict(steps())["FROM"])
    installs = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "test: $(INSTALLED_DEV)" in installs
    assert "$(INSTALLED_DEV): requirements/dev.txt $(INSTALLED)" in installs


@pytest.mark.skipif("ESCM2REC_IMAGE_PROOF" not in os.environ, reason="installs everything again, for minutes: make prove")
@pytest.mark.timeout(1_200)
def test_the_steps_of_the_image_make_a_folder_that_works(tmp_path: Path) -> None:
    """All but apt-get's, which are of the image's system: what is copied is enough to install, and PATH finds the command."""
    folder, environment = tmp_path / "escm2rec", {**os.environ, "BUILD": "cpu"}
    environment.pop("PYTHONPATH", None)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    for word, rest in steps():
        if word == "ENV":
            name, value = rest.split("=")
            environment[name] = value.replace("/escm2rec", str(folder)).replace("$PATH", os.environ["PATH"])
        elif word == "COPY":
            shutil.copytree(ROOT, folder, ignore=lambda at, names: [name for name in names if Path(at) == ROOT and name in ignored])
        elif word == "RUN" and not rest.startswith("apt-get"):
            subprocess.run(["bash", "-ec", rest], cwd=folder, env=environment, timeout=1_000, check=True)
    command = ["escm2rec", "simulate", "--out", "logs", "--impressions", "50", "--seed", "1"]
    made = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(made.stdout)["impressions"] == 50
    where = subprocess.run(["bash", "-c", "command -v escm2rec"], env=environment, capture_output=True, text=True, timeout=10, check=True)
    assert where.stdout.strip() == str(folder / ".venv" / "bin" / "escm2rec")
