"""`python -m escm2rec.study.document STUDY > docs/study.md`: the findings of a study as Markdown."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from escm2rec.errors import Escm2Error
from escm2rec.folder import read_manifest
from escm2rec.study.finding import Table, Tree
from escm2rec.study.findings import findings
from escm2rec.study.html import TITLE
from escm2rec.study.presets import PRESETS

ON_THE_PAGE_ALONE = ("Imputation", "What does not work")
"""Leads of the findings whose tables are too long for a document."""


def document(folder: Path, date: str, commit: str) -> str:
    """Markdown of a finished study: what was run, when and from which commit, and what was found. DataError for another folder."""
    manifest = read_manifest(folder, "study", frozenset({"preset", "cells"}))
    tree = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    run = f"{date}, commit {commit}, {manifest['cells']:,} trained models: `{_command(tree, manifest)}`."
    lines = [
        f"# {TITLE}",
        "",
        f"{run} Written by `python -m escm2rec.study.document`; plots and all numbers are in the study's `study.html`.",
    ]
    for finding in findings(tree):
        lines += ["", f"## {finding.title}"]
        if not finding.lead:
            lines += [f"- **{lead}**{colon}{text}" for lead, colon, text in (each.partition(": ") for each in finding.found)]
            continue
        lines += [" ".join(part for part in (*finding.found, finding.how) if part)]
        if finding.table and finding.lead not in ON_THE_PAGE_ALONE:
            lines += ["", *_table(finding.table)]
    return "\n".join(lines) + "\n"


def _table(table: Table) -> list[str]:
    marks = ["---" if index in table.texts else "---:" for index in range(len(table.head))]
    return [f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in row)} |" for row in (table.head, marks, *table.rows)]


def _command(tree: Tree, manifest: dict[str, Any]) -> str:
    """The command that makes the study again, from what sets it apart from its preset."""
    preset = PRESETS[manifest["preset"]]
    words = ["escm2rec", "study", "--preset", manifest["preset"]]
    names = tuple(next(iter(tree["means"].values())))
    if names != preset.candidates:
        words += ["--objectives", ",".join(names)]
    if list(tree["seeds"]) != [world.name for world in preset.worlds]:
        words += ["--worlds", ",".join(tree["seeds"])]
    if any(tree["seeds"].get(world.name, preset.seeds_of(world)) != preset.seeds_of(world) for world in preset.worlds):
        words += ["--seeds", str(max(tree["seeds"].values()))]
    return shlex.join([*words, "--out", "STUDY"])


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the document of a study; the exit code, 2 for a folder that holds none."""
    parser = argparse.ArgumentParser(prog="python -m escm2rec.study.document", description="The findings of a study as Markdown.")
    parser.add_argument("study", type=Path, help="folder of a finished study")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="when it was run, by default today")
    parser.add_argument("--commit", help="what it was run from, by default that of this checkout")
    given = parser.parse_args(arguments)
    try:
        print(document(given.study, given.date, given.commit or _commit()), end="")
    except Escm2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
