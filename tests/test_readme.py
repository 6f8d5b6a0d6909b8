"""The README: its file map holds every file, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from escm2rec.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def mapped() -> list[str]:
    """The Python files of the file map, with their folders."""
    (tree,) = (block for block in re.findall(r"^```\w*\n(.*?)^```$", README, re.S | re.M) if block.startswith("escm2rec/\n"))
    folders: list[str] = []
    files = []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name]
        if name.endswith(".py"):
            files.append("".join(folders[:depth]) + name)
    return files


def test_the_file_map_holds_every_file_once() -> None:
    known = [path for room in ("escm2rec", "torchx_components", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    expected = sorted(str(path.relative_to(ROOT)) for path in known if not path.name.startswith("__"))
    assert len(expected) > 60
    assert sorted(mapped()) == expected


def test_every_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_verb_is_told_with_its_options() -> None:
    commands = get_command(app)
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?)\| ", README, re.M))
    assert {"simulate", "preprocess", "train", "evaluate", "score", "doctor"} == set(told)
    for verb, options in told.items():
        known = {option for parameter in commands.commands[verb].params for option in parameter.opts}  # type: ignore[attr-defined]
        assert set(re.findall(r"--[a-z]+", options)) <= known
