"""The `study` verb: worlds, candidates and seeds in, `study.json` and `study.html` out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from escm2rec import __version__
from escm2rec.errors import ConfigError, did_you_mean
from escm2rec.folder import MANIFEST, refuse_existing, write_json, write_manifest
from escm2rec.study import cell
from escm2rec.study.candidates import CANDIDATES, Candidate
from escm2rec.study.finding import counted
from escm2rec.study.html import write_study_page
from escm2rec.study.presets import PRESETS, Preset
from escm2rec.study.run import default_workers, read_cells, run_cells
from escm2rec.study.summary import ALWAYS, summarise

SETTINGS = "settings.json"
CONSTANTS = (
    "EPOCHS",
    "LEARNING_RATE",
    "EPOCHS_OF_IDS",
    "LEARNING_RATE_OF_IDS",
    "LEARNING_RATE_OF_TABLES",
    "BATCH_ROWS",
    "BATCH_ROWS_OF_IDS",
    "LEAST_BATCHES",
    "WEIGHT_DECAY",
    "WARM_UP",
    "FLEXIBLE",
    "ID_DIM",
    "ID_STD",
    "FRESH_ROWS",
)
Plan = list[tuple[Any, int, tuple[str, ...]]]


def study(
    out: Path,
    preset: str = "quick",
    objectives: Sequence[str] = (),
    worlds: Sequence[str] = (),
    seeds: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train candidates in worlds whose truth is known, and compare them.

    `objectives` names candidates, `worlds` worlds and `seeds` how many a world has, each by default as the preset has it. The folder
    holds `cells/WORLD/CANDIDATE/SEED.json`, `settings.json`, and, when all cells are there, `study.json`, `study.html` and the manifest.
    What is in the folder is not computed again: the same command goes on with a study that was cut off, and one that asks for more extends
    a finished one.

    Returns out, the page, worlds, candidates, cells, how many of them were computed now and in how many seconds, what ten seeds chose and
    what fresh ones say of it, and how near the best choosers end. Raises ConfigError for an unknown name, or when `out` holds a study of
    other settings, a finished one of more than is asked, or something else.
    """
    began = time.monotonic()
    plan = _plan(PRESETS[preset], objectives, worlds, seeds)
    _open(out, plan, overwrite)
    computed = run_cells(out, plan, default_workers())
    cells = {world.name: {name: read_cells(out, world, count, name) for name in names} for world, count, names in plan}
    result = {"settings": _settings(plan), "seeds": {world.name: count for world, count, _ in plan}, **summarise(cells)}
    write_json(out / "study.json", result)
    write_study_page(result, out / "study.html")
    total = sum(count * len(names) for _, count, names in plan)
    content = {"preset": preset, "cells": total, "computed": computed, "seconds": round(time.monotonic() - began, 1)}
    write_manifest(out, "study", content)
    return {
        "out": str(out),
        "html": str(out / "study.html"),
        "worlds": len(plan),
        "candidates": len(plan[0][2]),
        **content,
        "chosen": result["chosen"],
        "choosers": {
            name: {key: value for key, value in each.items() if key != "worlds"}
            for name, each in result["choosers"].items()
            if each["of_worlds"] and not name.startswith(ALWAYS)
        },
    }


def _plan(preset: Preset, objectives: Sequence[str], worlds: Sequence[str], seeds: int | None) -> Plan:
    unknown = [name for name in objectives if name not in CANDIDATES]
    if unknown:
        raise ConfigError(
            f"no candidate is named {unknown[0]!r}{did_you_mean(unknown[0], CANDIDATES)}", f"known are: {', '.join(CANDIDATES)}"
        )
    known = [world.name for world in preset.worlds]
    for name in worlds:
        if name not in known:
            raise ConfigError(f"the preset has no world named {name!r}{did_you_mean(name, known)}", _worlds_of(name))
    names = tuple(dict.fromkeys(objectives)) or preset.candidates
    taken = [world for world in preset.worlds if not worlds or world.name in worlds]
    return [(world, seeds or preset.seeds_of(world), names) for world in taken]


def _worlds_of(missing: str) -> str:
    elsewhere = next((name for name, other in PRESETS.items() if missing in [world.name for world in other.worlds]), None)
    if elsewhere:
        return f"--preset {elsewhere} has it"
    of_presets = [f"--preset {name}: {', '.join(repr(world.name) for world in each.worlds)}" for name, each in PRESETS.items()]
    return f"the worlds of {'; of '.join(of_presets)}"


def _settings(plan: Plan) -> dict[str, Any]:
    return {
        "version": __version__,
        "constants": {name: getattr(cell, name) for name in CONSTANTS},
        "worlds": {world.name: asdict(world) for world, _, _ in plan},
        "candidates": {name: _told(CANDIDATES[name]) for _, _, names in plan for name in names},
    }


def _told(candidate: Candidate) -> dict[str, Any]:
    return {"reference": candidate.reference, **candidate.objective.model_dump(mode="json")}


def _open(out: Path, plan: Plan, overwrite: bool) -> None:
    """Make the folder, or check that what is there was made with the same settings and is a part of the plan."""
    held, settings = _held(out), _settings(plan)
    if held is None:
        refuse_existing(out, "study", overwrite)
    elif not overwrite:
        settings = _merged(out, held, settings)
        if (out / MANIFEST).exists():
            _refuse_less(out, plan)
    if held is None or overwrite:
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
    (out / MANIFEST).unlink(missing_ok=True)
    write_json(out / SETTINGS, settings)


def _held(out: Path) -> dict[str, Any] | None:
    """The settings that a study in `out` was begun with; None where there is none, or a file of that name that no study wrote."""
    try:
        held = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) and {"constants", "worlds", "candidates"} <= held.keys() else None


def _refuse_less(out: Path, plan: Plan) -> None:
    """ConfigError when a finished study holds what the plan does not ask for: its page and numbers would be lost."""
    tree = json.loads((out / "study.json").read_text(encoding="utf-8"))
    asked = {(world.name, name): count for world, count, names in plan for name in names}
    for world, count in tree["seeds"].items():
        for name in tree["means"][world]:
            if asked.get((world, name), 0) < count:
                raise ConfigError(
                    f"the finished study in {out} has {name} in world {world!r} with {counted(count, 'seed')}, you ask for "
                    f"{asked.get((world, name), 0) or 'none'}",
                    "ask for at least what it holds to extend it, choose another --out, or pass --overwrite to drop it",
                )


def _merged(out: Path, held: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a study that goes on, with those it was begun with; ConfigError where they differ."""
    now: dict[str, Any] = json.loads(json.dumps(settings))
    if held.get("version") != now["version"]:
        raise ConfigError(
            f"{out} was begun by escm2rec {held.get('version')}, this is {now['version']}",
            "go on with that version, or choose another --out",
        )
    for part in ("constants", "worlds", "candidates"):
        both = held[part].keys() & now[part].keys()
        for name in held[part].keys() | now[part].keys() if part == "constants" else both:
            before, after = held[part].get(name), now[part].get(name)
            if before != after:
                raise ConfigError(
                    f"{out} was begun with other {part}: {name} was {before}, is {after}",
                    "choose another --out; --overwrite begins anew and drops what is there",
                )
        now[part] = {**held[part], **now[part]}
    return now
