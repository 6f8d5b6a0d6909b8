"""docs/study.md: short, computed, with what made it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from escm2rec.errors import DataError
from escm2rec.folder import write_json, write_manifest
from escm2rec.study.document import document, main
from escm2rec.study.presets import QUICK
from tests.study_cells import full_tree, planted, tree_of


def folder_of(tree: dict[str, object], folder: Path, preset: str) -> Path:
    write_json(folder / "study.json", tree)
    write_manifest(folder, "study", {"preset": preset, "cells": 1234})
    return folder


def test_a_full_study_fits_a_document(tmp_path: Path) -> None:
    tree = full_tree()
    text = document(folder_of(tree, tmp_path, "full"), "2026-01-02", "abc1234")
    lines = text.splitlines()
    assert len(lines) <= 165
    assert lines[2].startswith("2026-01-02, commit abc1234, 1,234 trained models: `escm2rec study --preset full --seeds 20 --out STUDY`.")
    assert len([line for line in lines if line.startswith("## ")]) == 11
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    assert len(tables) == 8
    for table in tables:
        assert len({row.count("|") for row in table.splitlines()}) == 1
    best = tree["level"]["selection +0.8"]["best"]
    assert f"| {best} {tree['means']['selection +0.8'][best]['kl']['mean']:.3g}"[:12] in text
    assert "nan" not in text.lower().split()


def test_the_command_is_that_of_the_study(tmp_path: Path) -> None:
    tree = tree_of(planted(["selection +0.8", "capacity right"], QUICK, 5))
    assert "`escm2rec study --preset quick --out STUDY`" in document(folder_of(tree, tmp_path, "quick"), "d", "c")
    tree = tree_of(planted(["selection +0.8", "capacity right"], ["naive", "escm2-ips true q"], 3))
    said = "`escm2rec study --preset quick --objectives 'naive,escm2-ips true q' --seeds 3 --out STUDY`"
    assert said in document(folder_of(tree, tmp_path, "quick"), "d", "c")
    tree = tree_of(planted(["capacity right"], QUICK, 5))
    said = "`escm2rec study --preset quick --worlds 'capacity right' --out STUDY`"
    assert said in document(folder_of(tree, tmp_path, "quick"), "d", "c")


def test_the_program_prints_it_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "study"
    study.mkdir()
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: no study at ")
    with pytest.raises(DataError, match=r"it has no manifest\.json\nhint: run the command that makes the study again"):
        document(study, "d", "c")
    folder_of(json.loads(json.dumps(tree_of(planted(["selection 0"], QUICK, 2)))), study, "quick")
    assert main([str(study), "--date", "2026-01-02"]) == 0
    assert re.search(r"^2026-01-02, commit \w+", capsys.readouterr().out, re.M)
