"""The verb `study`: from end to end on tiny worlds, gone on with, and refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from escm2rec.errors import ConfigError
from escm2rec.study import cell, run
from escm2rec.study import study as verb
from escm2rec.study.presets import PRESETS
from escm2rec.study.study import study
from tests.study_cells import TINY_PRESET, one_thread  # noqa: F401
from tests.test_evaluation_html import Page


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny worlds as the quick preset, in this process."""
    monkeypatch.setitem(PRESETS, "quick", TINY_PRESET)
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(1))
    monkeypatch.setattr(cell, "EPOCHS", 1)
    monkeypatch.setattr(cell, "FRESH_ROWS", 1_000)


def test_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "study"
    result = study(out)
    assert {"out": str(out), "worlds": 2, "candidates": 2, "preset": "quick", "cells": 8, "chosen": []}.items() <= result.items()
    assert sorted(path.name for path in out.iterdir()) == ["cells", "manifest.json", "settings.json", "study.html", "study.json"]
    held = json.loads((out / "study.json").read_text(encoding="utf-8"))
    assert held["seeds"] == {"selection +0.8": 2, "tiny right": 2}
    assert held["settings"]["constants"]["EPOCHS"] == 1
    assert list(held["means"]["tiny right"]) == ["naive", "escm2-ips"]
    cells = [json.loads((out / "cells" / "tiny_right" / "naive" / f"{seed}.json").read_text(encoding="utf-8")) for seed in (0, 1)]
    assert held["means"]["tiny right"]["naive"]["kl"]["mean"] == pytest.approx((cells[0]["kl"] + cells[1]["kl"]) / 2)
    assert Page((out / "study.html").read_text(encoding="utf-8")).outside == []
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert {"kind": "study", "preset": "quick", "cells": 8}.items() <= manifest.items()

    assert result["computed"] == 8
    study(out, seeds=3, objectives=["naive"], worlds=["tiny right"], overwrite=True)
    assert len(list((out / "cells").rglob("*.json"))) == 3
    for name, near in (("mars", ""), ("hidden", ""), ("tiny rihgt", r"; did you mean 'tiny right'\?")):
        hint = (
            "--preset full has it$"
            if name == "hidden"
            else r"the worlds of --preset quick: 'selection \+0\.8', 'tiny right'; of --preset full"
        )
        told = rf"the preset has no world named '{name}'{near}\nhint: {hint}"
        with pytest.raises(ConfigError, match=told):
            study(tmp_path / "other", worlds=[name])


def test_a_finished_study_is_extended(tmp_path: Path) -> None:
    out = tmp_path / "study"
    study(out)
    page, cells = (out / "study.html").read_bytes(), sorted(out.rglob("cells/*/*/*.json"))
    times = [path.stat().st_mtime_ns for path in cells]
    again = study(out)
    assert (again["cells"], again["computed"]) == (8, 0)
    assert (out / "study.html").read_bytes() == page
    more = study(out, seeds=3)
    assert (more["cells"], more["computed"]) == (12, 4)
    assert [path.stat().st_mtime_ns for path in cells] == times
    assert json.loads((out / "study.json").read_text(encoding="utf-8"))["seeds"] == {"selection +0.8": 3, "tiny right": 3}
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    for less in ({}, {"seeds": 3, "objectives": ["naive"]}, {"seeds": 3, "worlds": ["tiny right"]}):
        with pytest.raises(ConfigError, match=r"has [a-z2-]+ in world .* with 3 seeds, you ask for (2|none)\nhint: ask for at least"):
            study(out, **less)  # type: ignore[arg-type]
    assert {path: path.read_bytes() for path in out.glob("*.*")} == before


def test_a_study_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "study"
    study(out)
    (out / "manifest.json").unlink()
    before = (out / "cells" / "tiny_right" / "naive" / "0.json").stat().st_mtime_ns
    assert study(out, objectives=["naive", "esmm"])["cells"] == 8
    assert (out / "cells" / "tiny_right" / "naive" / "0.json").stat().st_mtime_ns == before
    settings = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    assert set(settings["candidates"]) == {"naive", "escm2-ips", "esmm"}

    (out / "manifest.json").unlink()
    monkeypatch.setattr(cell, "BATCH_ROWS", 1_000)
    said = r"was begun with other constants: BATCH_ROWS was 4000, is 1000\nhint: choose another --out; --overwrite begins anew"
    with pytest.raises(ConfigError, match=said):
        study(out)
    assert study(out, overwrite=True)["cells"] == 8
    assert (out / "cells" / "tiny_right" / "naive" / "0.json").stat().st_mtime_ns != before


def test_other_worlds_under_the_same_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "study"
    study(out, objectives=["naive"])
    (out / "manifest.json").unlink()
    worlds = (replace(TINY_PRESET.worlds[0], ctr=0.2), TINY_PRESET.worlds[1])
    monkeypatch.setitem(PRESETS, "quick", TINY_PRESET.__class__(worlds, ("naive",), 2, 2))
    with pytest.raises(ConfigError, match=r"was begun with other worlds: selection \+0\.8 was .*, is "):
        study(out)


def test_an_unknown_candidate_is_named(tmp_path: Path) -> None:
    for name, near in (("dragonnet", ""), ("escm2-isp", r"; did you mean 'escm2-ips'\?")):
        with pytest.raises(ConfigError, match=f"no candidate is named '{name}'{near}\nhint: known are: esmm, naive, naive"):
            study(tmp_path / "study", objectives=["naive", name])
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("content", ['{"editor": "settings"}', "[1]", "no JSON"])
def test_a_folder_that_is_no_study_is_never_removed(content: str, tmp_path: Path) -> None:
    (tmp_path / verb.SETTINGS).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="exists\nhint: choose another --out"):
        study(tmp_path)
    with pytest.raises(ConfigError, match=r"will not overwrite .*: it holds no study that escm2rec made"):
        study(tmp_path, overwrite=True)
    assert (tmp_path / verb.SETTINGS).read_text(encoding="utf-8") == content
